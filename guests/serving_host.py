"""Host functions of a guest that serves: it may log, and nothing else.

The text of a line is left out: while serving, a guest sees prompts, and prompts are not logged.
"""

from __future__ import annotations

from typing import Final

from guests.errors import GuestContractError
from guests.guest_log import LogLevel
from guests.linker import HostFunction
from guests.memory import GuestMemory
from guests.signatures import IMPORTS

MAX_LINES: Final = 1_000  # of an engine's life, which is a worker's


class ServingLog:
    """Passes on that a guest logged, until it did so too often. A guest that logs in a loop costs its own time only."""

    def __init__(self) -> None:
        self._lines_left = MAX_LINES

    def __call__(self, _memory: GuestMemory | None, level: int, _pointer: int, length: int) -> None:
        if level > LogLevel.ERROR:
            raise GuestContractError(f"log level {level}: expected 0 to {LogLevel.ERROR.value}")
        if self._lines_left == 0:
            return
        self._lines_left -= 1
        import structlog  # 60 ms, which a build's processes and a worker that never hears a guest do not need

        structlog.get_logger().debug("guest_log", level=level, length_bytes=length, lines_left=self._lines_left)


def _refuse_while_serving(name: str) -> HostFunction:
    def refuse(_memory: GuestMemory, *_arguments: int) -> int:
        raise GuestContractError(f"{name} is available only while gp_init runs")

    return refuse


def serving_functions() -> dict[str, HostFunction]:
    """By import name; for one engine."""
    return {name: ServingLog() if name == "log" else _refuse_while_serving(name) for name in IMPORTS}
