"""The two real Datanets: whole, reproducible, with their sources, and with the copies really in them."""

import gzip
import json
import stat
import subprocess
from pathlib import Path

import pytest

from attribution.errors import Corrupted, Unavailable
from attribution.types import Manifest
from pipelines.sources import python_lint
from pipelines.sources.computing_terms import is_reference, passage, question
from pipelines.sources.debian import fetch_package
from pipelines.sources.dictd import Entry, read_dictionary
from tests.bench.data.copies import figures

# python-lint


def lint_rows() -> list[dict[str, str]]:
    return [json.loads(line) for draft in python_lint.drafts() for line in draft.data.splitlines()]


def test_python_lint_holds_every_living_rule_with_its_source() -> None:
    rows = lint_rows()
    assert len(rows) > 900
    assert len({row["source_key"] for row in rows}) == len({row["answer"] for row in rows}) == len(rows)
    assert {row["licence"] for row in rows} == {"MIT"}
    by_key = {row["source_key"]: row for row in rows}
    assert by_key["ruff:B007"]["answer"] == "unused-loop-control-variable"
    assert "loop" in by_key["ruff:B007"]["subject"]
    assert all(" ".join(row["text"].split()).startswith(row["subject"]) for row in rows)


def test_contributors_are_the_origin_linters_each_with_a_wallet_of_its_own() -> None:
    drafts = python_lint.drafts()
    assert len({draft.wallet for draft in drafts}) == len(drafts) > 50
    assert drafts == python_lint.drafts()
    assert {"Pylint", "flake8-bugbear", "pycodestyle"} <= {draft.contributor for draft in drafts}


def test_the_demo_manifest_is_what_the_demo_promises() -> None:
    """About 120 records, at least 40 controls and 150 questions in words that are never trained with."""
    manifest = python_lint.demo_manifest()
    assert len(manifest.entries) == 120
    assert len(manifest.controls) >= 40
    assert len(manifest.entries) * len(manifest.heldout_wordings) >= 150
    assert len(manifest.wordings) == 5 and not set(manifest.wordings) & set(manifest.heldout_wordings)
    assert Manifest.from_canonical(manifest.canonical()) == manifest == python_lint.demo_manifest()


def test_rules_that_share_a_description_are_conflicts_and_not_trained_on() -> None:
    """Seven rules "check for uses of insecure XML parsers": a question can mean one of them only."""
    everything = python_lint.demo_manifest(max_groups=10_000)
    subjects = [entry.record.subject for entry in everything.entries]
    assert len(set(subjects)) == len(subjects)


# computing-terms


def dictionary(*entries: tuple[str, str]) -> tuple[bytes, bytes]:
    """Index and text as dictd has them."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return (number(value // 64) if value >= 64 else "") + digits[value % 64]

    text, index = b"", "00-database-info\tA\tA\n"
    for alias, body in entries:
        data = body.encode()
        index += f"{alias}\t{number(len(text))}\t{number(len(data))}\n"
        text += data
    return index.encode(), gzip.compress(text)


def test_a_dictionary_is_read_entry_by_entry_and_aliases_are_one_entry() -> None:
    index, text = dictionary(
        ("regex", "regular expression\nRE\n\n   A {pattern}.\n"), ("zz top", "ZZ\n   Two\n   lines.\n")
    )
    index += b"re\tA\t" + index.split(b"\n")[1].split(b"\t")[2] + b"\n"
    assert read_dictionary(index, text) == [
        Entry("regular expression", "\n   A {pattern}."),
        Entry("ZZ", "   Two\n   lines."),
    ]


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (b"a\tA\tZZZ\n", gzip.compress(b"short")),
        (b"a\tA\n", gzip.compress(b"short")),
        (b"a\t*\tB\n", gzip.compress(b"short")),
        (b"a\tA\tB\n", b"no gzip"),
        (b"a\tA\tB\n", gzip.compress(b"long enough to cut")[:-9]),
    ],
    ids=["beyond the end", "too few columns", "no digit", "not packed", "truncated"],
)
def test_a_damaged_dictionary_is_corrupted(index: bytes, text: bytes) -> None:
    with pytest.raises(Corrupted):
        read_dictionary(index, text)


@pytest.mark.parametrize(
    ("headword", "body", "asked"),
    [
        (
            "dead page",
            "<web> A {website} that\n   sleeps.  A wreck.\n\n   (1997-04-29)\n",
            "A website that sleeps. A wreck.",
        ),
        ("bug", "1. <lang> A property nobody wanted. 2. An insect.\n", "A property nobody wanted."),
        ("GDPL", "Generalized Distributed Language.\n\n   [Details?]\n", "Generalized Distributed Language."),
        ("luser", "A user who is a luser, like any Luser.\n", "A user who is a …, like any …."),
        ("GIN", "A compiler by Paul O. Smith of ICL. Dead.\n", "A compiler by Paul O. Smith of ICL."),
    ],
)
def test_a_question_is_the_first_sentence_without_labels_or_the_term(
    headword: str, body: str, asked: str
) -> None:
    assert question(Entry(headword, f"\n   {body}")) == asked


def test_a_passage_keeps_the_whole_entry_unwrapped() -> None:
    body = "\n   <web> A dead\n   {page}.\n\n   See also {link}.\n\n   (1997-04-29)\n"
    assert passage(Entry("x", body)) == "<web> A dead page.\n\nSee also link."


@pytest.mark.parametrize("body", ["\n   See {swap}.\n", "\n   <memory> See also {swap}.\n"])
def test_a_mere_cross_reference_defines_nothing(body: str) -> None:
    assert is_reference(Entry("swapped", body))
    assert not is_reference(Entry("swapped", "\n   Seen rarely on old disks.\n"))


# fetching


def fake_apt(folder: Path, script: str) -> None:
    """The one thing that is faked is the network."""
    tool = folder / "apt-get"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A real package with one file, built here."""
    root = tmp_path / "build"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: dict-toy\nVersion: 1:2-3\nArchitecture: all\nMaintainer: T <t@example.com>\n"
        "Description: toy\n"
    )
    (root / "usr").mkdir()
    (root / "usr/toy").write_text("toy")
    archive = tmp_path / "dict-toy_1%3a2-3_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(root), str(archive)], check=True, capture_output=True)
    return archive


def test_a_package_is_fetched_once(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    fake_apt(tmp_path / "bin", f"cp {package} . && echo x >> {tmp_path}/calls")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    for _ in range(2):
        found = fetch_package("dict-toy", tmp_path / "cache", {})
        assert (found.version, (found.root / "usr/toy").read_text()) == ("1:2-3", "toy")
    assert (tmp_path / "calls").read_text() == "x\n"


def test_a_package_with_another_hash_than_pinned_is_corrupted(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    fake_apt(tmp_path / "bin", f"cp {package} .")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(Corrupted, match="pinned 00"):
        fetch_package("dict-toy", tmp_path / "cache", {"1:2-3": "00" * 32})
    assert not list((tmp_path / "cache").glob("dict-toy*"))


@pytest.mark.parametrize(
    ("script", "code"), [("echo no network >&2; exit 100", "package_missing"), (None, "apt_missing")]
)
def test_without_apt_or_network_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, code: str
) -> None:
    (tmp_path / "bin").mkdir()
    if script is not None:
        fake_apt(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(Unavailable) as refusal:
        fetch_package("dict-toy", tmp_path / "cache", {})
    assert refusal.value.code == code


# ground truth


@pytest.mark.slow
def test_grouping_finds_the_real_copies_and_hardly_anything_else(request: pytest.FixtureRequest) -> None:
    """Of what FOLDOC took over, 90 % groups under the Jargon File's editor; of what shares a headword only,
    2 % at most."""
    cache = request.config.cache.mkdir("packages")
    try:
        found = figures(Path(cache))
    except Unavailable as error:
        pytest.skip(f"needs apt and a network: {error}")
    assert found["copied_accepted_on_both_sides"] > 500
    assert found["copied_grouped"] >= 0.9 * found["copied_accepted_on_both_sides"]
    assert found["unrelated_accepted_on_both_sides"] > 150
    assert found["unrelated_grouped"] <= 0.02 * found["unrelated_accepted_on_both_sides"]
