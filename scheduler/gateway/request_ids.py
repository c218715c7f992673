"""Request ids: 26 characters that sort by time of creation.

48 bits of wall-clock milliseconds, then 80 random bits, in Crockford's base 32.
Source: the ULID specification, https://github.com/ulid/spec
"""

from __future__ import annotations

import secrets
import time
from typing import Final

ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
REQUEST_ID_CHARS: Final = 26
RANDOM_BITS: Final = 80


def create_request_id(now_s: float | None = None) -> str:
    """A new request id; ids of different milliseconds sort by time."""
    milliseconds = int((time.time() if now_s is None else now_s) * 1000)
    value = (milliseconds & (2**48 - 1)) << RANDOM_BITS | secrets.randbits(RANDOM_BITS)
    digits = []
    for _ in range(REQUEST_ID_CHARS):
        digits.append(ALPHABET[value & 31])
        value >>= 5
    return "".join(reversed(digits))


def is_request_id(text: str) -> bool:
    """Whether ``text`` has the form of a request id (so that it may go into a Redis key)."""
    return len(text) == REQUEST_ID_CHARS and all(character in ALPHABET for character in text)
