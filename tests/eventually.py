"""Waiting in tests: poll a condition until a deadline, never sleep and hope."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

#: What comes at once is seen at once; a longer wait takes no core from what is waited for.
POLL_INTERVALS_S = (0.002, 0.02)
POLL_GROWTH = 1.2
#: Only a failing test waits this long: a loaded machine is no reason to fail.
WITHIN_S = 30.0


async def eventually(
    predicate: Callable[[], Any | Awaitable[Any]], *, within_s: float = WITHIN_S, what: str = ""
) -> Any:
    """The first truthy value of ``predicate`` (plain or async), polled until ``within_s`` have passed.

    Raises:
        AssertionError: it never became true; the message holds ``what`` and the last value.
    """
    deadline_mono_s = time.monotonic() + within_s
    interval_s, longest_s = POLL_INTERVALS_S
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline_mono_s:
            raise AssertionError(f"not within {within_s:g} s: {what or predicate} (last value {value!r})")
        await asyncio.sleep(interval_s)
        interval_s = min(interval_s * POLL_GROWTH, longest_s)


def eventually_sync(predicate: Callable[[], Any], *, within_s: float = WITHIN_S, what: str = "") -> Any:
    """Like :func:`eventually`, for tests without a loop."""
    deadline_mono_s = time.monotonic() + within_s
    interval_s, longest_s = POLL_INTERVALS_S
    while not (value := predicate()):
        if time.monotonic() > deadline_mono_s:
            raise AssertionError(f"not within {within_s:g} s: {what or predicate} (last value {value!r})")
        time.sleep(interval_s)
        interval_s = min(interval_s * POLL_GROWTH, longest_s)
    return value
