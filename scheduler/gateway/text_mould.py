"""A chunk of a stream encoded once, with a hole for its text: most chunks of a stream differ in nothing else.

Building the objects of a chunk and encoding them costs three times what filling a mould does, and a gateway does it
for every token of every stream.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

import msgspec

_encoder: Final = msgspec.json.Encoder()


class TextMould:
    """Chunks that differ in their text only. ``make_chunk(text)`` gives the chunk of a text, to be encoded."""

    __slots__ = ("_head", "_tail")

    def __init__(self, make_chunk: Callable[[str], object]) -> None:
        """Raises ValueError: the text is not in the chunk exactly once."""
        mark = secrets.token_hex(16)  # in no name of a model, which a fixed one might be
        pieces = _encoder.encode(make_chunk(mark)).split(f'"{mark}"'.encode())
        if len(pieces) != 2:
            raise ValueError(f"a chunk holds its text {len(pieces) - 1} times: a mould needs one")
        self._head, self._tail = b"data: " + pieces[0], pieces[1] + b"\nid: "

    def event(self, text: str, event_id: bytes) -> bytes:
        """The event of the chunk with ``text``: what :func:`scheduler.gateway.sse.event` makes of its encoding."""
        return b"".join((self._head, _encoder.encode(text), self._tail, event_id, b"\n\n"))
