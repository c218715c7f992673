"""When the lines of a batch run: pure decisions, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from scheduler.contract.errors import ErrorCode

#: Nothing is wrong with the line: it is tried again for as long as its batch lives.
PASSING: Final = frozenset(
    {ErrorCode.QUEUE_FULL, ErrorCode.OVERLOADED, ErrorCode.BACKEND_UNAVAILABLE, ErrorCode.CANCELLED}
)
#: It may be the line's fault: tried again a few times.
SUSPECT: Final = frozenset({ErrorCode.WAKE_FAILED, ErrorCode.WAKE_TIMEOUT, ErrorCode.WORKER_FAILED, ErrorCode.INTERNAL})
MAX_SUSPECT_TRIES: Final = 3
FIRST_RETRY_S: Final = 0.5
LONGEST_RETRY_S: Final = 30.0
MINUTES_A_DAY: Final = 24 * 60

WAITS_FOR_WINDOW: Final = "window"
WAITS_FOR_WAKE: Final = "wake"


def decide_wait(windows: Iterable[str], minute_of_day: int, *, may_wake: bool, is_hot: bool) -> str:
    """What a batch waits for before its next line, which begins within all ``windows``; empty: nothing."""
    if not all(is_within(window, minute_of_day) for window in windows):
        return WAITS_FOR_WINDOW
    return "" if may_wake or is_hot else WAITS_FOR_WAKE


def is_within(window: str, minute_of_day: int) -> bool:
    """Whether a time is in ``HH:MM-HH:MM`` (the end is not; it may be on the next day); an empty window is always."""
    if not window:
        return True
    begin, end = (int(text[:2]) * 60 + int(text[3:]) for text in window.split("-"))
    return (minute_of_day - begin) % MINUTES_A_DAY < (end - begin) % MINUTES_A_DAY


def decide_retry_s(code: ErrorCode, num_tries: int) -> float | None:
    """How long to wait before a line that failed with ``code`` is tried again; None: that is its answer."""
    if code not in PASSING and (code not in SUSPECT or num_tries >= MAX_SUSPECT_TRIES):
        return None
    return min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(16, num_tries - 1))


def read_window_s(text: str) -> int | None:
    """Seconds of a completion window such as ``24h``, ``90m`` or ``7d`` (1 minute to 7 days); None: it is none."""
    units = {"m": 60, "h": 3600, "d": 86_400}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not (number.isascii() and number.isdigit() and len(number) <= 5):
        return None
    seconds = int(number) * units[unit]
    return seconds if 60 <= seconds <= 7 * 86_400 else None
