"""``python -m loadtest MODE``: one module a mode, imported when it is asked for."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Final

#: Module of this package, its function, which takes the rest of the command line and gives the exit status, one line.
MODES: Final = {
    "demo": ("demo", "run_demo", "build a model, wake it from nothing, stream, scale to zero, wake it again"),
    "new-user": ("new_user", "run_new_user", "README's first commands in a fresh clone, timed"),
    "bench": ("bench", "run_bench", "the figures of SPECIFICATION.md, over HTTP"),
    "batch-interference": ("batch_interference", "run_batch_interference", "streams beside a running batch"),
    "chaos": ("chaos", "run_chaos", "load beside a seeded schedule of faults, and a verdict"),
    "streams": ("streams", "run_streams", "thousands of open streams on one gateway"),
    "soak": ("soak", "run_soak", "steady load for long: does anything grow?"),
    "engine-compare": ("engine_compare", "run_engine_compare", "our engine and llama.cpp's server, in turn"),
    "waterfall": ("waterfall", "run_waterfall", "a trace as an SVG"),
    "gpu-check": ("gpu_check", "run_gpu_check", "all that this machine can show of the GPU backend"),
}
USAGE: Final = "\n".join(
    (
        "usage: python -m loadtest MODE [--help]",
        "",
        *(f"  {mode:<20}{text}" for mode, (_, _, text) in MODES.items()),
    )
)


def main() -> int:
    """Dispatch on the first argument; exit status 2 for wrong usage."""
    # A terminated measurement unwinds, so that the servers it started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    mode, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if mode in ("-h", "--help"):
        print(USAGE)
        return 0
    if mode not in MODES:
        print(USAGE, file=sys.stderr)
        return 2
    module, function, _ = MODES[mode]
    return int(getattr(importlib.import_module(f"loadtest.{module}"), function)(arguments))


if __name__ == "__main__":
    sys.exit(main())
