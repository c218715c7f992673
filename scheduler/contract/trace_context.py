"""Which distributed trace a request belongs to, as it travels: HTTP headers in, the queue's message, logs.

Source: W3C Trace Context Level 2, sections 3.2 (traceparent) and 3.3 (tracestate).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

TRACEPARENT_CHARS: Final = 55  # of version 00
MAX_TRACESTATE_CHARS: Final = 512  # what everybody must pass on; longer ones are dropped whole
MAX_TRACESTATE_MEMBERS: Final = 32
SAMPLED_FLAG: Final = 0x01
RANDOM_FLAG: Final = 0x02  # the trace id is random
KNOWN_FLAGS: Final = SAMPLED_FLAG | RANDOM_FLAG
NO_TRACE_ID: Final = "0" * 32
NO_SPAN_ID: Final = "0" * 16

_PARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MEMBER: Final = re.compile(
    r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


class TraceContext(msgspec.Struct, frozen=True, omit_defaults=True):
    """The span under which a request is to be seen. Both fields are as in W3C's headers; check with :func:`parse`."""

    traceparent: Annotated[str, msgspec.Meta(max_length=TRACEPARENT_CHARS)]
    tracestate: Annotated[str, msgspec.Meta(max_length=MAX_TRACESTATE_CHARS)] = ""


class ParentSpan(msgspec.Struct, frozen=True):
    """A valid ``traceparent``: 32 and 16 lower-case hexadecimal digits, neither all zero."""

    trace_id: str
    span_id: str
    flags: int
    tracestate: str = ""

    @property
    def is_sampled(self) -> bool:
        """Whether whoever began the trace records it."""
        return bool(self.flags & SAMPLED_FLAG)


def parse(context: TraceContext | None) -> ParentSpan | None:
    """What ``context`` says, or None where it says nothing valid."""
    if context is None:
        return None
    return read_headers([context.traceparent], [context.tracestate] if context.tracestate else [])


def read_headers(traceparents: Sequence[str], tracestates: Sequence[str]) -> ParentSpan | None:
    """The span that the headers of a request name; None where there is none, more than one, or no valid one.

    Anything may stand in a header, so nothing is refused: a bad ``traceparent`` begins a new trace, a bad
    ``tracestate`` is left out. A later version's first four fields are read as those of version 00.
    """
    if len(traceparents) != 1 or len(traceparents[0]) > MAX_TRACESTATE_CHARS:
        return None
    found = _PARENT.fullmatch(traceparents[0].strip(" \t"))
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5] is not None):
        return None
    if found[2] == NO_TRACE_ID or found[3] == NO_SPAN_ID:
        return None
    return ParentSpan(found[2], found[3], int(found[4], 16) & KNOWN_FLAGS, read_tracestate(tracestates))


def read_tracestate(headers: Sequence[str]) -> str:
    """The headers' list as one line, or nothing where it is malformed or too long."""
    text = ",".join(headers)
    if not text or len(text) > MAX_TRACESTATE_CHARS:
        return ""
    members = [member for given in text.split(",") if (member := given.strip(" \t"))]
    names = {member.partition("=")[0] for member in members}
    if len(members) > MAX_TRACESTATE_MEMBERS or len(names) != len(members):
        return ""
    return ",".join(members) if all(map(_MEMBER.fullmatch, members)) else ""


def write_context(trace_id: str, span_id: str, flags: int, tracestate: str = "") -> TraceContext:
    """The context of what happens under ``span_id``."""
    return TraceContext(f"00-{trace_id}-{span_id}-{flags:02x}", tracestate)
