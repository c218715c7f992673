"""A node's GPUs as its agent keeps them: what the driver tells, spares, the helper that takes workers off them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from scheduler.contract.messages import GpuReport
from worker.agent_settings import AgentSettings
from worker.backends.detection import CPU_BACKENDS
from worker.gpu_monitor import GpuMonitor
from worker.releaser_child import ReleaseProcess
from worker.spare_workers import SpareForker, SpareWorkers


class NodeGpus:
    """Event loop only. On a CPU node it does nothing."""

    def __init__(self, zygote: SpareForker, settings: AgentSettings, on_changed: Callable[[], None]) -> None:
        """``on_changed`` hears of each spare that is warm."""
        self._monitor = GpuMonitor()
        self.spares = SpareWorkers(zygote, settings, on_changed)
        self._uses_gpus = settings.backend not in CPU_BACKENDS
        self._release = ReleaseProcess()

    async def run(self) -> None:
        """Keep the helper that takes workers off their GPUs, where the driver can; else return."""
        if self._uses_gpus:
            await self._release.run()

    def release_address(self) -> str:
        """Where workers ask to be taken off their GPU; empty: nowhere."""
        return self._release.address

    async def refresh(self, *, is_drained: bool, now: bool = False) -> None:
        """Read the GPUs (see :meth:`GpuMonitor.refresh`), and have the spares that are wanted: none on a drained node,
        where no wake will take one."""
        await self._monitor.refresh(now=now)
        self.spares.keep(() if is_drained else self._monitor.devices())

    def reports(self, workers: Mapping[str, int]) -> tuple[GpuReport, ...]:
        """Every GPU as last read. ``workers``: process ids by worker id."""
        return self._monitor.reports(workers, self.spares.pids())

    def accept_errors(self) -> None:
        """Use GPUs in spite of the errors so far; see :meth:`GpuMonitor.accept`."""
        self._monitor.accept()

    def close(self) -> None:
        """Let spares, the helper and the driver's library go. Idempotent."""
        self._release.close()
        self.spares.close()
        self._monitor.close()
