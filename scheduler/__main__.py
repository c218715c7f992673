"""``python -m scheduler gateway | scheduler``: one part of glowplug, with its settings from the environment."""

from __future__ import annotations

import sys
from typing import Final

USAGE: Final = """usage: python -m scheduler gateway      the HTTP front, on GLOWPLUG_HOST and GLOWPLUG_PORT
       python -m scheduler scheduler    demand, placement, idle timers
Both find the rest through REDIS_URL, or GLOWPLUG_STATE_DIR's embedded server."""


def main(arguments: list[str]) -> int:
    """Run the part that ``arguments`` name; exit code."""
    match arguments:
        case ["gateway"]:
            from scheduler.gateway.app import main as run_gateway

            return run_gateway() or 0
        case ["scheduler"]:
            from scheduler.service import main as run_scheduler

            run_scheduler()
            return 0
        case _:
            print(USAGE, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
