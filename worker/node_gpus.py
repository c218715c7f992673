"""The GPUs of a node as its agent keeps them: what the driver tells, and the spares that are warm on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from scheduler.contract.messages import GpuReport
from worker.agent_settings import AgentSettings
from worker.gpu_monitor import GpuMonitor
from worker.spare_workers import SpareForker, SpareWorkers


class NodeGpus:
    """Event loop only. Where there is no driver and no spare is wanted it does nothing."""

    def __init__(self, zygote: SpareForker, settings: AgentSettings, on_changed: Callable[[], None]) -> None:
        """``on_changed`` hears of each spare that is warm."""
        self._monitor = GpuMonitor()
        self.spares = SpareWorkers(zygote, settings, on_changed)

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
        """Let spares and the driver's library go. Idempotent."""
        self.spares.close()
        self._monitor.close()
