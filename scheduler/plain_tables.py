"""Tables that keep what they say: cut to the width of a terminal, and whole in a pipe or a file."""

from __future__ import annotations

import os
from typing import Any, Final

#: Columns where nobody says how many: wider than any table here.
PLAIN_WIDTH: Final = 240


def make_console() -> Any:
    """A console on stdout. rich would take a pipe for a terminal of 80 columns, and shorten names in it."""
    from rich.console import Console

    console = Console()
    if console.is_terminal or os.environ.get("COLUMNS"):
        return console
    return Console(width=PLAIN_WIDTH)


def make_table(*left: str, right: tuple[str, ...] = ()) -> Any:
    """A table without lines. The first column may break a long name, so that the terminal shows all of it."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(left):
        table.add_column(column, no_wrap=number > 0, overflow="fold" if number == 0 else "ellipsis")
    for column in right:
        table.add_column(column, no_wrap=True, justify="right")
    return table
