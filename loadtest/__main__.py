"""``python -m loadtest MODE``: one module a mode, imported when it is asked for."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Final

#: Module of this package and its function, which takes the rest of the command line and gives the exit status.
MODES: Final = {
    "demo": ("demo", "run_demo"),
    "new-user": ("new_user", "run_new_user"),
    "bench": ("bench", "run_bench"),
    "batch-interference": ("batch_interference", "run_batch_interference"),
    "chaos": ("chaos", "run_chaos"),
    "streams": ("streams", "run_streams"),
    "soak": ("soak", "run_soak"),
    "engine-compare": ("engine_compare", "run_engine_compare"),
    "waterfall": ("waterfall", "run_waterfall"),
    "gpu-check": ("gpu_check", "run_gpu_check"),
}


def main() -> int:
    """Dispatch on the first argument; exit status 2 for wrong usage."""
    # A terminated measurement unwinds, so that the servers it started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    mode, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if mode not in MODES:
        print(f"usage: python -m loadtest {'|'.join(MODES)} [--help]", file=sys.stderr)
        return 2
    module, function = MODES[mode]
    return int(getattr(importlib.import_module(f"loadtest.{module}"), function)(arguments))


if __name__ == "__main__":
    sys.exit(main())
