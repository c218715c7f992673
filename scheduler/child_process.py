"""One supervised process: start it, notice its end, decide when to start it again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from scheduler.contract.environment import EXIT_SETTINGS

RESTART_BASE_S: Final = 0.1
RESTART_CAP_S: Final = 5.0
MAX_EXITS: Final = 5
EXITS_WINDOW_S: Final = 60.0


def decide_restart_delay_s(exits_s: deque[float], now_s: float, exit_code: int) -> float | None:
    """How long to wait before starting again a child that just exited, or ``None`` to give up.

    ``exits_s`` holds the times of its exits, the present one last; those outside the window are dropped.
    """
    while exits_s and now_s - exits_s[0] > EXITS_WINDOW_S:
        exits_s.popleft()
    if exit_code == EXIT_SETTINGS or len(exits_s) >= MAX_EXITS:
        return None
    return min(RESTART_BASE_S * 2.0 ** (len(exits_s) - 1), RESTART_CAP_S)


@dataclass(slots=True)
class Child:
    """A part of glowplug and its present process, if any. Owned by the supervisor's loop."""

    name: str
    command: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    restart_at_s: float | None = None  # monotonic
    exits_s: deque[float] = field(default_factory=deque)

    @property
    def is_running(self) -> bool:
        return self.process is not None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    def start(self, environment: Mapping[str, str], pass_fds: tuple[int, ...] = ()) -> None:
        """Start the process, in its own process group: a terminal's Ctrl-C reaches the supervisor alone.

        Raises:
            OSError: it could not be started.
        """
        self.process = subprocess.Popen(
            self.command, env=dict(environment), stdin=subprocess.DEVNULL, pass_fds=pass_fds, process_group=0
        )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.restart_at_s = None

    def reap(self) -> int:
        """Collect the exit code of a process that has ended (negative: killed by that signal)."""
        assert self.process is not None
        code = self.process.wait()
        os.close(self.pidfd)
        self.process, self.pidfd = None, -1
        return code

    def send(self, number: signal.Signals) -> None:
        """Signal the process, if it runs."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)


def read_start_ticks(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot: with the pid, its identity. ``None``: it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold anything. Source: proc(5)
    return None if fields[0] == "Z" else int(fields[19])


def stop_leftovers(recorded: Mapping[str, int], timeout_s: float) -> list[int]:
    """End processes (pid as text -> start ticks) that a killed supervisor left behind; returns their pids."""
    stopped: list[int] = []
    for text, ticks in recorded.items():
        pid = int(text)
        try:
            pidfd = os.pidfd_open(pid)
        except (ProcessLookupError, OSError):
            continue
        try:
            if read_start_ticks(pid) != ticks:  # another process by now
                continue
            for number, wait_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, timeout_s)):
                signal.pidfd_send_signal(pidfd, number)
                if wait_readable(pidfd, wait_s):
                    break
            stopped.append(pid)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)
    return stopped


def wait_readable(descriptor: int, timeout_s: float) -> bool:
    """Wait until ``descriptor`` (a pidfd: its process ended) is readable."""
    import select

    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
