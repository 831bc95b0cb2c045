"""The Datanet ``python-lint``: what a lint rule does, and its name. From the installed ``ruff`` (MIT).

The contributor is the linter in which a rule originated; the words are those of ruff's authors. A stand-in
for real people, with their real shape: a few contribute a lot and many a little."""

import argparse
import json
import re
import subprocess
import sysconfig
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from attribution.errors import Unavailable
from attribution.types import Manifest
from cluster.datanets import Datanet, Rules, Wordings
from pipelines.manifests import SealPolicy
from pipelines.sources.drafts import ShardDraft, jsonl, manifest_of

DATANET = Datanet(
    name="python-lint",
    title="Python lint rules: from what a rule does to its name",
    licence="MIT",
    rules=Rules(licences=("MIT",)),
    wordings=Wordings(
        train=(
            "Which Python lint rule does this? {subject}",
            "A lint rule is described as follows: {subject} What is the rule called?",
            "{subject} Name that rule.",
            "Give the name of the rule with this description: {subject}",
            'What is the name of the linter check that is documented as "{subject}"?',
        ),
        heldout=(
            "My code checker has a rule with this purpose: {subject} How is it named?",
            "I am looking for a lint. {subject} Which one is it?",
            'The manual of a Python linter says "{subject}" To which rule does that belong?',
        ),
    ),
)
_PURPOSE = re.compile(r"## What it does\n(.*?)(?:\n## |\Z)", re.DOTALL)
_SENTENCE = re.compile(r"(.+?[.!?])(?=\s+[A-Z`\[]|$)")


def drafts() -> tuple[ShardDraft, ...]:
    """One shard per origin linter, in alphabetical order of the linters."""
    release = version("ruff")
    rows = defaultdict(list)
    for rule in _rules():
        if "Removed" not in str(rule["status"]):
            text = purpose(str(rule["explanation"]))
            row = {
                "subject": first_sentence(text),
                "answer": str(rule["name"]),
                "text": text,
                "source": "ruff",
                "source_version": release,
                "source_key": f"ruff:{rule['code'] or rule['name']}",
                "licence": "MIT",
            }
            rows[str(rule["linter"] or "Ruff-specific rules")].append(row)
    return tuple(ShardDraft(DATANET.name, linter, jsonl(rows[linter])) for linter in sorted(rows))


def purpose(explanation: str) -> str:
    """The section "What it does". The others repeat one another from rule to rule, example code and all."""
    section = _PURPOSE.search(explanation)
    return section[1].strip() if section else ""


def first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = _SENTENCE.match(paragraph)
    return sentence[1] if sentence else paragraph


def _rules() -> list[dict[str, object]]:
    ruff = Path(sysconfig.get_path("scripts")) / "ruff"
    try:
        listed = subprocess.run(
            [ruff, "rule", "--all", "--output-format", "json"], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable("ruff_missing", f"cannot list the rules of {ruff}: {error}") from error
    rules: list[dict[str, object]] = json.loads(listed.stdout)
    return rules


def demo_manifest(max_groups: int = 120) -> Manifest:
    """The manifest that an ingest of ``drafts()`` in their order would seal, without a database."""
    return manifest_of(DATANET, drafts(), SealPolicy(max_groups=max_groups))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the demo manifest of python-lint, without a database."
    )
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--max-groups", type=int, default=120)
    options = parser.parse_args()
    manifest = demo_manifest(options.max_groups)
    options.manifest.write_bytes(manifest.canonical())
    print(f"{manifest.manifest_id.hex()} {len(manifest.entries)} groups, {len(manifest.controls)} controls")


if __name__ == "__main__":
    main()
