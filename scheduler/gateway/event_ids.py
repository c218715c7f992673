"""Ids of a stream's events: the request and how many events of each of its prompts have been sent.

``01HX...:12`` is the twelfth event of a call with one prompt, ``01HX...:12.9`` an event of a call with two. The events
of a prompt follow from its token log alone, so any gateway gives them the same ids, and a client that names the last
one it saw gets exactly the rest.
"""

from __future__ import annotations

from typing import Final

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.gateway.request_ids import is_request_id

HEADER: Final = "Last-Event-ID"
MAX_ID_CHARS: Final = 256
MAX_COUNT_DIGITS: Final = 9


class EventIds:
    """Numbers the events of one call, and knows which of them the client has. ``seen``: as read from its id."""

    def __init__(self, request_id: str, num_parts: int, seen: tuple[int, ...] = ()) -> None:
        self._prefix = f"{request_id}:".encode()
        self._counts = [0] * num_parts
        self._seen = seen or (0,) * num_parts

    def next(self, part: int) -> bytes | None:
        """Id of the next event of prompt ``part``; None when the client has it already."""
        counts = self._counts
        counts[part] += 1
        if counts[part] <= self._seen[part]:
            return None
        if len(counts) == 1:
            return b"%b%d" % (self._prefix, counts[0])
        # A client that resumes has seen the events of the other prompts up to the same id, replayed here or not.
        return self._prefix + b".".join(b"%d" % max(pair) for pair in zip(counts, self._seen, strict=True))


def read_event_id(text: str) -> tuple[str, tuple[int, ...]]:
    """Request id (empty if not named) and counts of an id that a client sends back.

    Raises:
        GlowplugError: not an id of ours.
    """
    request_id, _, counts = text.strip().rpartition(":")
    pieces = counts.split(".")
    is_ours = all(piece.isascii() and piece.isdigit() and len(piece) <= MAX_COUNT_DIGITS for piece in pieces)
    if len(text) > MAX_ID_CHARS or not is_ours or (request_id and not is_request_id(request_id)):
        raise GlowplugError(
            ErrorCode.INVALID_REQUEST,
            f'{HEADER}: "{text[:80]}" is not the id of an event of this server; send the last "id:" line of the stream',
            param=HEADER,
        )
    return request_id, tuple(int(piece) for piece in pieces)
