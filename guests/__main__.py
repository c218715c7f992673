"""``python -m guests``: the same as ``glowplug guests``."""

from __future__ import annotations

from guests.command import guests

if __name__ == "__main__":
    guests(prog_name="python -m guests")
