"""Server-sent events and HTTP/1.1 chunks as bytes.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html (comments start with a colon, an event ends with
an empty line); RFC 9112 section 7.1 for chunks.
"""

from __future__ import annotations

from typing import Final

DONE: Final = b"data: [DONE]\n\n"


def event(data: bytes, event_id: bytes = b"") -> bytes:
    """An event. ``data`` is JSON without line breaks. The id comes last: naive clients look at the first line only."""
    return b"data: %b\nid: %b\n\n" % (data, event_id) if event_id else b"data: %b\n\n" % data


def named_event(name: str, data: bytes) -> bytes:
    """An event of a type, for clients that look at types. ``data`` is JSON without line breaks."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def comment(text: str) -> bytes:
    """A comment, which clients ignore. Line breaks in ``text`` become spaces, so that it cannot forge an event."""
    return f": {' '.join(text.split())}\n\n".encode()


def comment_line(text: str) -> bytes:
    """A comment that belongs to the next event, for streams whose events have ids.

    After an event with an id, OpenAI's Python client takes the empty line behind a comment for the end of an event
    without data, and fails on it.
    """
    return f": {' '.join(text.split())}\n".encode()


def http_chunk(payload: bytes) -> bytes:
    """``payload`` framed as one HTTP chunk. Never empty: an empty chunk would end the body."""
    if not payload:
        raise ValueError("an empty chunk ends the body; do not send one")
    return b"%x\r\n%b\r\n" % (len(payload), payload)
