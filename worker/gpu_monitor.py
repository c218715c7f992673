"""What an agent knows of its GPUs: read from the driver for each heartbeat, with whose memory is whose.

======================= ============================================================================================
the driver says         then
======================= ============================================================================================
an Xid of a program     it is reported and logged; the worker that caused it restarts by itself
an Xid of the device    the GPU has a *fault*: no worker is sent there until the agent starts anew, after a reset
the GPU is lost         likewise, until the driver can read it again
an uncorrected ECC      it is reported and logged; the driver ends the programs that had read it
======================= ============================================================================================
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import structlog

from scheduler.contract.messages import GpuReport
from worker.nvml import GpuReading, open_nvml

MIN_INTERVAL_S: Final = 1.0
MAX_XIDS: Final = 8  # kept of each GPU
#: Errors of the device itself, after which only a reset helps. Source: NVIDIA, "Xid Errors", tables of r570 and later.
DEVICE_XIDS: Final[dict[int, str]] = {
    48: "uncorrectable memory error",
    62: "internal micro-controller halted",
    64: "a row of memory could not be remapped",
    79: "fallen off the bus",
    95: "uncontained memory error",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "unrecovered memory error",
}


class GpuSource(Protocol):
    """Reads GPUs; see :class:`worker.nvml.Nvml`."""

    def read(self) -> list[GpuReading]: ...

    def close(self) -> None: ...


class GpuMonitor:
    """Event loop only. Where there is no driver it does nothing, and costs nothing."""

    def __init__(self, open_source: Callable[[], GpuSource | None] = open_nvml) -> None:
        self._open_source = open_source
        self._source: GpuSource | None = None
        self._is_opened = False
        self._lock = asyncio.Lock()
        self._read_s = -MIN_INTERVAL_S
        self._readings: list[GpuReading] = []
        self._xids: dict[str, list[int]] = {}
        self._faults: dict[str, str] = {}
        self._ecc: dict[str, int] = {}
        self._log = structlog.get_logger()

    async def refresh(self, *, now: bool = False) -> None:
        """Read the GPUs, unless that was done less than :data:`MIN_INTERVAL_S` ago and not asked for ``now``.

        What cannot be read leaves what was known.
        """
        async with self._lock:
            if not self._is_opened:
                self._is_opened = True
                self._source = await asyncio.to_thread(self._open_source)
            if self._source is None or (not now and time.monotonic() - self._read_s < MIN_INTERVAL_S):
                return
            self._read_s = time.monotonic()
            self._readings = await asyncio.to_thread(self._source.read)
        for reading in self._readings:
            self._note_errors(reading)

    def devices(self) -> list[str]:
        """UUIDs of the GPUs without a fault; one without a name where there is no library to ask."""
        if self._source is None:
            return [""]
        return [reading.uuid for reading in self._readings if not self._fault_of(reading)]

    def reports(self, workers: Mapping[str, int], spares: Mapping[str, Mapping[int, bool]]) -> tuple[GpuReport, ...]:
        """Every GPU as last read. ``workers``: process ids by worker id; ``spares``: by device, process ids of those
        that are being kept, and whether they are warm."""
        return tuple(self._report(reading, workers, spares.get(reading.uuid, {})) for reading in self._readings)

    def close(self) -> None:
        """Let go of the driver's library. Idempotent."""
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _report(self, reading: GpuReading, workers: Mapping[str, int], spares: Mapping[int, bool]) -> GpuReport:
        used = reading.used_by_pid
        return GpuReport(
            index=reading.index,
            uuid=reading.uuid,
            name=reading.name,
            total_bytes=reading.total_bytes,
            free_bytes=reading.free_bytes,
            architecture=reading.architecture,
            driver=reading.driver,
            uncorrected_ecc=reading.uncorrected_ecc,
            xids=tuple(self._xids.get(reading.uuid, ())),
            fault=self._fault_of(reading),
            spare_workers=sum(spares.values()),
            spare_bytes=sum(used.get(pid, 0) for pid, is_warm in spares.items() if is_warm),
            worker_bytes={worker_id: used[pid] for worker_id, pid in workers.items() if pid in used},
        )

    def _fault_of(self, reading: GpuReading) -> str:
        if reading.is_lost:
            return "the driver has lost it: reset it, or restart the machine"
        return self._faults.get(reading.uuid, "")

    def _note_errors(self, reading: GpuReading) -> None:
        for xid in reading.new_xids:
            known = self._xids.setdefault(reading.uuid, [])
            del known[: max(0, len(known) + 1 - MAX_XIDS)]
            known.append(xid)
            if xid in DEVICE_XIDS:
                self._faults[reading.uuid] = f"Xid {xid}, {DEVICE_XIDS[xid]}: reset it, then restart the agent"
            self._log.error(
                "gpu_error", gpu=reading.index, uuid=reading.uuid, xid=xid, cause=DEVICE_XIDS.get(xid, "a program's")
            )
        before = self._ecc.get(reading.uuid, 0)
        if reading.uncorrected_ecc > before:
            self._log.error(
                "gpu_memory_error", gpu=reading.index, uuid=reading.uuid, uncorrected=reading.uncorrected_ecc
            )
        self._ecc[reading.uuid] = reading.uncorrected_ecc
