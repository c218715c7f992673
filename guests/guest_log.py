"""Lines that a guest logs while it is initialised."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class LogLevel(IntEnum):
    """Levels of a guest's ``log``."""

    DEBUG = 0
    INFO = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class LogLine:
    """What a guest logged during its initialisation."""

    level: LogLevel
    text: str
