"""When lines of a batch run, and how often they are tried."""

from __future__ import annotations

import pytest

from scheduler.contract.errors import ErrorCode
from scheduler.gateway.batch_policy import (
    LONGEST_RETRY_S,
    MAX_SUSPECT_TRIES,
    WAITS_FOR_WAKE,
    WAITS_FOR_WINDOW,
    decide_retry_s,
    decide_wait,
    is_within,
    read_window_s,
)

NOON, MIDNIGHT = 12 * 60, 0


@pytest.mark.parametrize(
    ("window", "minute", "expected"),
    [
        ("", NOON, True),
        ("22:00-06:00", 22 * 60, True),
        ("22:00-06:00", MIDNIGHT, True),
        ("22:00-06:00", 6 * 60 - 1, True),
        ("22:00-06:00", 6 * 60, False),
        ("22:00-06:00", NOON, False),
        ("08:30-17:15", 8 * 60 + 29, False),
        ("08:30-17:15", 17 * 60 + 14, True),
        ("08:30-17:15", 17 * 60 + 15, False),
    ],
)
def test_windows_may_reach_into_the_next_day(window: str, minute: int, expected: bool) -> None:
    """The beginning is within, the end is not."""
    assert is_within(window, minute) == expected


def test_what_a_batch_waits_for() -> None:
    """All windows must be open; then the policy says whether it may wake the model itself."""
    assert decide_wait(("", "22:00-06:00"), NOON, may_wake=True, is_hot=True) == WAITS_FOR_WINDOW
    assert decide_wait(("11:00-13:00", "22:00-06:00"), NOON, may_wake=True, is_hot=True) == WAITS_FOR_WINDOW
    assert decide_wait(("11:00-13:00", ""), NOON, may_wake=False, is_hot=False) == WAITS_FOR_WAKE
    assert decide_wait(("", ""), NOON, may_wake=False, is_hot=True) == ""
    assert decide_wait(("", ""), NOON, may_wake=True, is_hot=False) == ""


def test_lines_are_tried_again_by_what_went_wrong() -> None:
    """What passes, for ever and ever slower; what may be the line's fault, a few times; its fault, never."""
    waits = [decide_retry_s(ErrorCode.QUEUE_FULL, tries) for tries in range(1, 40)]
    assert waits[0] is not None
    assert waits == sorted(waits)  # type: ignore[type-var]
    assert waits[-1] == LONGEST_RETRY_S
    assert decide_retry_s(ErrorCode.WORKER_FAILED, MAX_SUSPECT_TRIES - 1) is not None
    assert decide_retry_s(ErrorCode.WORKER_FAILED, MAX_SUSPECT_TRIES) is None
    assert decide_retry_s(ErrorCode.INVALID_REQUEST, 1) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86_400), ("1m", 60), ("7d", 604_800), ("8d", None), ("0h", None), ("h", None), ("1y", None)],
)
def test_completion_windows(text: str, seconds: int | None) -> None:
    """One minute to seven days."""
    assert read_window_s(text) == seconds
