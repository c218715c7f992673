"""Processes on a machine with GPUs that are not there: the driver's library is a stand-in, devices are emulated."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.checkpoint_fixtures import FakeCheckpointDriver
from tests.nvml_fixtures import FakeDriver, FakeGpu
from tests.worker_fixtures import Host

ROOT = Path(__file__).resolve().parent.parent
GPU = "GPU-11111111-aaaa"
OTHER_GPU = "GPU-22222222-bbbb"


class EmulatedGpus:
    """Two GPUs for every process that gets :attr:`env`."""

    def __init__(self, folder: Path) -> None:
        self.driver = FakeDriver(folder / "nvml.txt", [FakeGpu(GPU), FakeGpu(OTHER_GPU)])
        self.driver.write()
        self.checkpoint = FakeCheckpointDriver(folder / "checkpoint")
        self._orders = folder / "emulated.json"
        self.govern()
        paths = (str(ROOT / "tests" / "emulated_gpu"), str(ROOT), os.environ.get("PYTHONPATH", ""))
        self.env = {
            **self.driver.env,
            **self.checkpoint.env,
            "EMULATED_GPU": str(self._orders),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "GLOWPLUG_BACKEND": "cuda",
        }

    def govern(self, *, capacity_bytes: int = 1 << 30, lose: int = 0) -> None:
        """Device memory of each worker, and the process whose next launch fails for good."""
        new = self._orders.with_suffix(".new")
        new.write_text(json.dumps({"capacity_bytes": capacity_bytes, "lose": lose}))
        os.replace(new, self._orders)


class GpuHost(Host):
    """An agent with both. See :class:`tests.worker_fixtures.Host`."""

    def __init__(self, redis_url: str, state_dir: Path, **env: str) -> None:
        self.gpus = EmulatedGpus(state_dir)
        super().__init__(redis_url, state_dir, **self.gpus.env, **env)
