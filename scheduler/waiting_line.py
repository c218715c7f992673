"""What a model does while it wakes, on one line of the user's terminal, until its first words take the place."""

from __future__ import annotations

import os
import re
import sys
from typing import Final

import click

#: A gateway's comment, each second and at each step of a wake.
COMMENT: Final = re.compile(r": waking model=(\S+) stage=(\S+)")
ERASE: Final = "\r\x1b[K"


class WaitingLine:
    """On stderr, and only where that is a terminal that can erase."""

    def __init__(self) -> None:
        self._can_erase = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._is_shown = False

    def show(self, line: str) -> None:
        """Show what ``line`` tells, if it is such a comment."""
        if self._can_erase and (told := COMMENT.match(line)):
            click.echo(f"{ERASE}waking {told[1]}: {told[2]}", nl=False, err=True, color=True)
            self._is_shown = True

    def clear(self) -> None:
        """Leave the line as it was. Idempotent."""
        if self._is_shown:
            click.echo(ERASE, nl=False, err=True, color=True)
            self._is_shown = False
