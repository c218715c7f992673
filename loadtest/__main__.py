"""``python -m loadtest demo|bench|batch-interference|chaos|streams|soak|engine-compare|waterfall|gpu-check``."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Dispatch on the first argument; exit status 2 for wrong usage."""
    # A terminated measurement unwinds, so that the servers it started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    mode, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if mode == "demo":
        from loadtest.demo import run_demo

        return run_demo(arguments)
    if mode == "bench":
        from loadtest.bench import run_bench

        return run_bench(arguments)
    if mode == "batch-interference":
        from loadtest.batch_interference import run_batch_interference

        return run_batch_interference(arguments)
    if mode == "chaos":
        from loadtest.chaos import run_chaos

        return run_chaos(arguments)
    if mode == "streams":
        from loadtest.streams import run_streams

        return run_streams(arguments)
    if mode == "soak":
        from loadtest.soak import run_soak

        return run_soak(arguments)
    if mode == "engine-compare":
        from loadtest.engine_compare import run_engine_compare

        return run_engine_compare(arguments)
    if mode == "waterfall":
        from loadtest.waterfall import run_waterfall

        return run_waterfall(arguments)
    if mode == "gpu-check":
        from loadtest.gpu_check import run_gpu_check

        return run_gpu_check(arguments)
    modes = "demo|bench|batch-interference|chaos|streams|soak|engine-compare|waterfall|gpu-check"
    print(f"usage: python -m loadtest {modes} [--help]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
