"""Decisions of quotas and admission, without clock or server."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduler.gateway.admission import decide_queue_limit, decide_retry_after_s
from scheduler.gateway.quotas import WINDOW_S, Window, decide_wait_s, format_duration


def count_after(window: Window, wait_s: float) -> float:
    """What the window counts after ``wait_s`` without a new request."""
    if wait_s < window.current_ends_in_s:
        previous_s = max(0.0, window.previous_ends_in_s - wait_s)
        return window.previous * previous_s / WINDOW_S + window.current
    return window.current * max(0.0, 1 - (wait_s - window.current_ends_in_s) / WINDOW_S)


@given(
    previous=st.integers(0, 1000),
    ends_in_s=st.floats(0.1, WINDOW_S),
    current=st.integers(0, 1000),
    limit=st.integers(1, 2000),
    cost=st.integers(1, 2000),
)
@example(previous=0, ends_in_s=1.0, current=1, limit=1, cost=1)  # at the very end of the window all of it counts still
@example(previous=60, ends_in_s=31.0, current=0, limit=30, cost=1)  # 30 count after 1 s sharp
def test_after_the_wait_the_cost_fits_and_the_wait_is_bounded(
    previous: int, ends_in_s: float, current: int, limit: int, cost: int
) -> None:
    """Whoever comes back after Retry-After, alone, is let in; nobody is sent away for longer than two windows."""
    window = Window(previous, ends_in_s, current, ends_in_s)
    cost = min(cost, limit)
    wait_s = decide_wait_s(window, limit, cost)
    assert 0 <= wait_s <= 2 * WINDOW_S
    assert math.floor(count_after(window, math.ceil(wait_s))) <= limit - cost


def test_queue_limits_by_number_and_by_time() -> None:
    """Unmeasured: by number. Measured: the shorter of both, and a Retry-After that fits the rate."""
    assert decide_queue_limit(512, 64, None, 120).max_queued == 512
    slow = decide_queue_limit(512, 64, service_s=60.0, max_wait_s=30.0)
    assert (slow.max_queued, slow.by_wait) == (96, True)
    fast = decide_queue_limit(512, 64, service_s=0.1, max_wait_s=30.0)
    assert (fast.max_queued, fast.by_wait) == (512, False)
    assert decide_retry_after_s(96, slow) == 1
    assert decide_retry_after_s(96 + 64, slow) == 61
    assert decide_retry_after_s(10**6, slow) == 120


@pytest.mark.parametrize(("seconds", "text"), [(0, "0ms"), (0.02, "20ms"), (1, "1s"), (59.2, "1m0s"), (361, "6m1s")])
def test_resets_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    """20ms, 1s, 6m0s."""
    assert format_duration(seconds) == text
