"""``python -m scheduler gateway | scheduler``: one part of glowplug, with its settings from the environment."""

from __future__ import annotations

import errno
import sys
from typing import Final

from scheduler.contract.environment import EXIT_SETTINGS, SettingsError

#: Errors of listening that starting again does not cure.
ADDRESS_ERRORS: Final = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)

USAGE: Final = """usage: python -m scheduler gateway      the HTTP front, on GLOWPLUG_HOST and GLOWPLUG_PORT
       python -m scheduler scheduler    demand, placement, idle timers
Both find the rest through REDIS_URL, or GLOWPLUG_STATE_DIR's embedded server."""


def main(arguments: list[str]) -> int:
    """Run the part that ``arguments`` name; exit code."""
    match arguments:
        case ["gateway" | "scheduler" as part]:
            try:
                _apply_config_file()
                return _run(part)
            except SettingsError as error:
                print(f"glowplug {part}: {error}", file=sys.stderr)
                return EXIT_SETTINGS
            except OSError as error:
                if error.errno not in ADDRESS_ERRORS:
                    raise
                print(f"glowplug {part}: cannot listen: {error.strerror}: choose another --port", file=sys.stderr)
                return EXIT_SETTINGS
        case _:
            print(USAGE, file=sys.stderr)
            return 2


def _apply_config_file() -> None:
    from scheduler.contract.config_file import apply_config_file

    apply_config_file()


def _run(part: str) -> int:
    # Only one of the two is imported: the gateway needs no scheduler code, the scheduler no HTTP server.
    if part == "gateway":
        from scheduler.gateway.app import main as run_gateway

        return run_gateway()
    from scheduler.service_process import main as run_scheduler

    run_scheduler()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
