"""What a check found, and how a check that itself goes wrong is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

Level = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of ``glowplug doctor``. ``remedy`` says what to do; empty where all is well."""

    check: str
    level: Level
    seen: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]


def run_check(name: str, check: Check) -> list[Finding]:
    """What ``check`` finds. Never raises: a check that breaks is a failure of its own."""
    try:
        return list(check())
    except Exception as error:  # whatever it is, the other checks must still be told
        return [Finding(name, "fail", f"{type(error).__name__}: {error}", "this check broke: please report it")]
