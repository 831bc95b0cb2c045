#!/bin/sh
# Runs the README's commands under "The same path by hand", as they stand there, on the platform that is up.
set -eu
cd "$(dirname "$0")/.."
commands=$(sed -n '/^## The same path by hand/,/^## /{/^    /p;}' README.md | sed 's/^    //')
[ -n "$commands" ] || { echo "the README has no commands"; exit 1; }
printf '%s\n' "$commands" | sh -eux
