"""The folder ``run`` of a state folder: what a running ``glowplug serve`` tells the next one, and the other verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class RunFolder:
    """Small JSON files, each replaced as a whole. Nothing is cached."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "run"

    def read(self, name: str) -> dict[str, Any]:
        """The object in a file; empty where there is none that can be read."""
        try:
            value = json.loads((self._folder / name).read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Readers see the former file or this one.

        Raises:
            OSError: it cannot be written.
        """
        temporary = self._folder / f"{name}.tmp"
        temporary.write_text(json.dumps(value))
        temporary.rename(self._folder / name)

    def remove(self, name: str) -> None:
        """Nothing happens where there is none."""
        (self._folder / name).unlink(missing_ok=True)
