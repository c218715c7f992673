"""Which stop string ended a text, from the tokens: the one that a guest stops at."""

from __future__ import annotations

import pytest

from guests.abi import SequenceEnd
from guests.errors import GuestTrap
from guests.push_result import PushResult
from worker.engine.stop_strings import find_stop_string


class Letters:
    """A detokeniser whose tokens are code points."""

    def __init__(self, traps: bool = False) -> None:
        self.traps = traps
        self.pushed: list[int] = []
        self.is_closed = False

    def push(self, token_id: int) -> PushResult:
        if self.traps:
            raise GuestTrap("unreachable executed")
        self.pushed.append(token_id)
        return PushResult(chr(token_id), SequenceEnd.NONE)

    def flush(self) -> str:
        return ""

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("stop", "text", "found"),
    [
        (("END", "X"), "the END", "END"),
        (("ND", "END", "D"), "the END", "END"),  # all end at once: the longest
        (("é!", "\n\n"), "un été é!", "é!"),
        (("a", "b"), "none of them is here: xyz", None),
        (("only",), "what the guest saw counts", "only"),
    ],
)
def test_the_longest_of_those_that_end_first_is_found(stop: tuple[str, ...], text: str, found: str | None) -> None:
    """As the guest's matcher picks; a single one needs no look at the text."""
    letters = Letters()
    assert find_stop_string(lambda: letters, stop, [ord(letter) for letter in text]) == found
    assert letters.is_closed == (len(stop) > 1)


def test_only_the_end_of_a_long_text_is_looked_at() -> None:
    """The work is bounded by the longest stop string, not by the text."""
    letters = Letters()
    assert find_stop_string(lambda: letters, ("END", "X"), [ord("a")] * 100_000 + [ord("X")]) == "X"
    assert len(letters.pushed) < 50


def test_a_guest_that_traps_costs_the_name_and_not_the_request() -> None:
    """The state is closed all the same."""
    letters = Letters(traps=True)
    assert find_stop_string(lambda: letters, ("a", "b"), [97]) is None
    assert letters.is_closed
