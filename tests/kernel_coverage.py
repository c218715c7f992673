"""``python tests/kernel_coverage.py``: the kernels' suite with a table of what it tried and how exact the results were.

Runs in the emulation, or on a GPU with ``GLOWPLUG_KERNELS_ON=cuda``; other inputs with ``GLOWPLUG_KERNELS_SEED=N``.
Exits with 1 where a test failed or a kernel was never launched.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SUITE = [
    str(TESTS / "conformance" / f"test_cuda_kernels_{name}.py")
    for name in ("elementwise", "linear", "attention", "sampling")
]


class Collector:
    """A pytest plugin: inputs tried and largest relative error of each test function."""

    def __init__(self) -> None:
        self.inputs: dict[str, int] = defaultdict(int)
        self.errors: dict[str, list[float]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test, with every error that it noted."""
        if report.when != "call":
            return
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        self.inputs[name] += 1
        self.errors[name] += [float(str(value)) for key, value in report.user_properties if key == "relative_error"]


def main() -> int:
    """The exit code."""
    collector = Collector()
    status = pytest.main(
        ["-q", "-c", str(TESTS / "gpu.ini"), "--no-header", "-p", "no:asyncio", *SUITE], plugins=[collector]
    )
    from cuda_fixtures import SEED, emulator

    kernels = emulator()
    print(f"{'test':36} {'inputs':>6} {'largest relative error':>24}")
    for name, count in sorted(collector.inputs.items()):
        errors = collector.errors[name]
        print(f"{name.removeprefix('test_'):36} {count:6} {f'{max(errors):.1e}' if errors else 'exact':>24}")
    largest = {name: max(errors) for name, errors in sorted(collector.errors.items()) if errors}
    print(json.dumps({"inputs": sum(collector.inputs.values()), "largest_relative_errors": largest}))
    missing = sorted(kernels.kernels - kernels.launched)
    covered = len(kernels.launched & kernels.kernels)
    print(f"seed {os.environ.get(SEED, '1')}")
    print(f"{sum(collector.inputs.values())} inputs, {kernels.num_launches} launches in three thread orders each")
    print(f"kernels launched: {covered} of {len(kernels.kernels)}{', not: ' + ', '.join(missing) if missing else ''}")
    return 1 if status or missing else 0


if __name__ == "__main__":
    sys.exit(main())
