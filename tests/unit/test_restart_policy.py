"""When the supervisor starts a part again, and when it gives up."""

from __future__ import annotations

import os
from collections import deque

from scheduler.child_process import (
    EXIT_SETTINGS,
    EXITS_WINDOW_S,
    MAX_EXITS,
    RESTART_BASE_S,
    decide_restart_delay_s,
    read_start_ticks,
    stop_leftovers,
)


def test_delay_doubles_with_each_exit() -> None:
    """The first restart is quick, later ones wait longer."""
    assert decide_restart_delay_s(deque([10.0]), 10.0, 1) == RESTART_BASE_S
    assert decide_restart_delay_s(deque([10.0, 11.0, 12.0]), 12.0, -9) == 4 * RESTART_BASE_S


def test_too_many_exits_in_the_window_end_it() -> None:
    """A part that keeps ending is not started for ever."""
    assert decide_restart_delay_s(deque(float(i) for i in range(MAX_EXITS)), MAX_EXITS - 1.0, 1) is None


def test_old_exits_are_forgotten() -> None:
    """Exits of long ago do not count."""
    exits_s = deque([float(i) for i in range(MAX_EXITS - 1)] + [EXITS_WINDOW_S + 100.0])
    assert decide_restart_delay_s(exits_s, EXITS_WINDOW_S + 100.0, 1) == RESTART_BASE_S
    assert len(exits_s) == 1


def test_refused_settings_are_not_retried() -> None:
    """Starting again with the same wrong settings cannot help."""
    assert decide_restart_delay_s(deque([1.0]), 1.0, EXIT_SETTINGS) is None


def test_leftovers_are_identified_by_their_start() -> None:
    """A recorded number that belongs to another process by now is left alone, and a free one is no error."""
    ticks = read_start_ticks(os.getpid())
    assert ticks is not None
    assert stop_leftovers({str(os.getpid()): ticks + 1, "4194303": 1}, timeout_s=0.1) == []
