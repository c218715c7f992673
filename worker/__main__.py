"""``python -m worker agent`` and, started by the agent, ``python -m worker zygote FD`` and ``releaser FD``."""

from __future__ import annotations

import os
import sys
from typing import Final

USAGE: Final = """usage: python -m worker agent
       python -m worker zygote FD    (started by the agent; FD is its end of a socket pair)
       python -m worker releaser FD  (likewise; FD is a listening socket)
Settings come from the environment: REDIS_URL, GLOWPLUG_STATE_DIR, GLOWPLUG_SNAPSHOT_KEYS, ..."""


def main(arguments: list[str]) -> int:
    """Run the mode that ``arguments`` name; exit code."""
    # Read by OpenBLAS when NumPy is imported: with a second thread a zygote could not be forked, and in workers it
    # would spin beside the backend's own threads.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    match arguments:
        case ["agent"]:
            from scheduler.contract.config_file import apply_config_file
            from scheduler.contract.environment import EXIT_SETTINGS, SettingsError

            try:
                apply_config_file()  # before the zygote, whose workers log as the file says
            except SettingsError as error:
                print(f"glowplug agent: {error}", file=sys.stderr)
                return EXIT_SETTINGS
            from worker.zygote_process import start_zygote_process

            zygote = start_zygote_process()  # its imports take as long as the agent's: let them run side by side
            from worker.agent_process import main as run_agent

            return run_agent(zygote)
        case ["zygote", fd] if fd.isdecimal():
            from worker.lean_imports import leave_out_unused

            leave_out_unused()
            from worker.zygote import main as run_zygote

            return run_zygote(int(fd))
        case ["releaser", fd] if fd.isdecimal():
            from worker.releaser import main as run_releaser

            return run_releaser(int(fd))
        case _:
            print(USAGE, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
