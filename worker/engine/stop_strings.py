"""Which of several stop strings ended a text: the guest says that one did, some dialects tell their clients which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from guests.errors import GuestError
from worker.engine.text import TextSequence

#: Tokens without text (special ones) that may lie within a stop string's.
_SILENT_TOKENS: Final = 16


def find_stop_string(
    open_plain_text: Callable[[], TextSequence], stop: Sequence[str], token_ids: Sequence[int]
) -> str | None:
    """The stop string that the last of ``token_ids`` completed, as guests pick it: the first to end, then the longest.

    ``open_plain_text`` opens a sequence that stops at nothing. Only the tokens that the longest of ``stop`` can span
    are turned into text again, and none where there is but one. None where no text can be had.
    """
    if len(stop) == 1:
        return stop[0]
    num_tail = max(len(string.encode()) for string in stop) + _SILENT_TOKENS
    try:
        text = open_plain_text()
        try:
            tail = "".join(text.push(token_id).text for token_id in token_ids[-num_tail:])
        finally:
            text.close()
    except GuestError:  # the request is complete without it
        return None
    ends = [(at + len(string), -len(string), string) for string in stop if (at := tail.find(string)) >= 0]
    return min(ends)[2] if ends else None
