"""C headers of generated tables: arrays as text, and the command line of the scripts that write them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

LINE_CHARS: Final = 112


def c_array(declaration: str, entries: list[str]) -> list[str]:
    """Lines of ``static const DECLARATION[...]`` with its entries, as many of them in a line as fit."""
    per_line = LINE_CHARS // (max(map(len, entries)) + 2)
    lines = [", ".join(entries[i : i + per_line]) + "," for i in range(0, len(entries), per_line)]
    return [f"static const {declaration}[{len(entries)}] = {{", *(f"    {line}" for line in lines), "};", ""]


def write_or_check(path: Path, text: str) -> int:
    """Command line of a generator: write ``text`` to ``path``, or with ``--check`` only compare; the exit code."""
    parser = argparse.ArgumentParser(description=f"Write {path.name}.")
    parser.add_argument("--check", action="store_true", help="only compare with the committed header")
    if not parser.parse_args().check:
        path.write_text(text)
    elif path.read_text() != text:
        print(f"{path} is out of date: generate it again", file=sys.stderr)
        return 1
    return 0
