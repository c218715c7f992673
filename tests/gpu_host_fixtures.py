"""A real agent on a machine with GPUs that are not there: the driver's library is a stand-in, devices are emulated."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.nvml_fixtures import FakeDriver, FakeGpu
from tests.worker_fixtures import Host

ROOT = Path(__file__).resolve().parent.parent
GPU = "GPU-11111111-aaaa"
OTHER_GPU = "GPU-22222222-bbbb"


class GpuHost(Host):
    """See :class:`tests.worker_fixtures.Host`."""

    command = (sys.executable, str(ROOT / "tests" / "emulated_gpu_agent.py"))

    def __init__(self, redis_url: str, state_dir: Path, **env: str) -> None:
        self.driver = FakeDriver(state_dir / "nvml.txt", [FakeGpu(GPU), FakeGpu(OTHER_GPU)])
        self.driver.write()
        self._orders = state_dir / "emulated.json"
        self.govern()
        paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
        env = {**self.driver.env, "EMULATED_GPU": str(self._orders), "PYTHONPATH": paths, **env}
        super().__init__(redis_url, state_dir, GLOWPLUG_BACKEND="cuda", **env)

    def govern(self, *, capacity_bytes: int = 1 << 30, lose: int = 0) -> None:
        """Device memory of each worker, and the process whose next launch fails for good."""
        new = self._orders.with_suffix(".new")
        new.write_text(json.dumps({"capacity_bytes": capacity_bytes, "lose": lose}))
        os.replace(new, self._orders)
