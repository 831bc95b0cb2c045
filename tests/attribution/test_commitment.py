"""A receipt's commitment opens to exactly one prompt, answer and index."""

import pytest

from attribution.commitment import Turn, answer_commitment, prompt_sha256

PARTS = tuple(bytes([n]) * 32 for n in range(4))


@pytest.mark.parametrize("index", range(4))
def test_every_part_moves_the_commitment(index: int) -> None:
    changed = [b"\xff" * 32 if i == index else part for i, part in enumerate(PARTS)]
    assert answer_commitment(*changed) != answer_commitment(*PARTS)


def test_turns_cannot_be_shifted_into_one_another() -> None:
    prompts = (
        [Turn("user", "ab")],
        [Turn("usera", "b")],
        [Turn("user", "a"), Turn("", "b")],
        [Turn("", "userab")],
        [],
    )
    assert len({prompt_sha256(turns) for turns in prompts}) == len(prompts)
