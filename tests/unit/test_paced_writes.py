"""Streams take turns to write: at once while there is time, in larger pieces when writing takes too much of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from scheduler.gateway.paced_writes import BURST_S, MAX_PAUSE_S, WRITES_AT_ONCE, PacedWrites


class Clock:
    """Moves when it is told to, and while the loop sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class PlayedLoop:
    """Runs callbacks on the clock, one by one."""

    def __init__(self, clock: Clock) -> None:
        self.pauses_s: list[float] = []
        self._clock = clock
        self._ready: list[tuple[float, Callable[[], None]]] = []

    def call_soon(self, callback: Callable[[], None]) -> Any:
        return self.call_later(0.0, callback)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Any:
        self._ready.append((delay_s, callback))
        return object()

    def turn(self) -> bool:
        """Run the next callback; whether there was one."""
        if not self._ready:
            return False
        delay_s, callback = self._ready.pop(0)
        self._clock.now_s += delay_s
        self.pauses_s.append(delay_s)
        callback()
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loop(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> PlayedLoop:
    made = PlayedLoop(clock)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: made)
    return made


def test_writes_come_at_once_and_in_order_while_there_is_time(clock: Clock, loop: PlayedLoop) -> None:
    """Cheap writes are never paused, and each comes once."""
    writes, seen = PacedWrites(clock=clock), list[int]()
    for number in range(3 * WRITES_AT_ONCE):
        writes.ask(lambda number=number: seen.append(number))  # type: ignore[misc]
    while loop.turn():
        pass
    assert seen == list(range(3 * WRITES_AT_ONCE))
    assert loop.pauses_s == [0.0] * 3


def test_costly_writes_keep_to_their_share(clock: Clock, loop: PlayedLoop) -> None:
    """Streams that ask again and again get 0.3 of the time, whatever a write costs, each in its turn."""
    writes, counts, spent_s = PacedWrites(max_share=0.3, clock=clock), [0] * 100, 0.0
    began_s = clock.now_s

    def ask(stream: int) -> None:
        def write() -> None:
            nonlocal spent_s
            clock.now_s += 1e-4
            spent_s += 1e-4
            counts[stream] += 1
            ask(stream)

        writes.ask(write)

    for stream in range(100):
        ask(stream)
    for _ in range(400):
        loop.turn()
    assert spent_s / (clock.now_s - began_s) == pytest.approx(0.3, abs=0.03)
    assert max(counts) - min(counts) <= 1
    assert max(loop.pauses_s) <= MAX_PAUSE_S


def test_a_process_that_stood_still_pauses_no_longer_than_the_bound(clock: Clock, loop: PlayedLoop) -> None:
    """A write during which the machine slept for a minute is not paid for with minutes of silence."""
    writes, seen = PacedWrites(clock=clock), list[float]()

    def sleep_a_minute() -> None:
        clock.now_s += 60.0

    writes.ask(sleep_a_minute)
    loop.turn()
    woke_s = clock.now_s
    writes.ask(lambda: seen.append(clock.now_s))
    loop.turn()
    assert seen[0] - woke_s <= MAX_PAUSE_S + BURST_S


def test_a_write_that_fails_stops_no_other(clock: Clock, loop: PlayedLoop) -> None:
    """Its error is the loop's to tell; whoever stands behind it gets a turn."""
    writes, seen = PacedWrites(clock=clock), list[str]()

    def fail() -> None:
        raise RuntimeError("closed")

    writes.ask(lambda: seen.append("before"))
    writes.ask(fail)
    writes.ask(lambda: seen.append("after"))
    with pytest.raises(RuntimeError):
        loop.turn()
    with contextlib.suppress(RuntimeError):
        while loop.turn():
            pass
    assert seen == ["before", "after"]
