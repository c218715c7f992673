"""What an agent knows of its GPUs: read from the driver for each heartbeat, with whose memory is whose.

A GPU with a *fault* gets no worker and no spare; what runs there may end. MIG instances have the faults of their GPU.

=========================== =================================== ====================================================
the driver says             then                                way back
=========================== =================================== ====================================================
an Xid of a program         it is reported and logged; the      (none needed)
                            worker that caused it restarts
an Xid of the device        fault                               a reset, then ``config reload``
an uncorrected ECC error    fault; the driver ends the programs a reset, which sets the driver's count back; or
                            that had read it                    ``config reload``: the count so far is accepted
rows wait to be mapped out  fault                               a reset, which maps them out; or ``config reload``: the
                                                                driver keeps clear of them meanwhile
rows cannot be mapped out   fault                               another card
the GPU is lost             fault                               when the driver can read it again
it is partitioned so that   fault                               another partition
it has no memory of its own
=========================== =================================== ====================================================
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
REMAP_PENDING: Final = "bad rows of its memory wait to be mapped out"
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
        self._accepted_ecc: dict[str, int] = {}  # by an operator
        self._accepted_remaps: set[str] = set()  # likewise: rows may wait there for the next reset
        self._told: dict[str, str] = {}  # faults that the log has, by UUID
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
            self._tell_fault(reading)

    def accept(self) -> None:
        """Use GPUs in spite of what they have told of errors so far (an operator reloads the configuration). What the
        driver says of their present state holds on."""
        self._faults.clear()
        self._accepted_ecc = dict(self._ecc)
        self._accepted_remaps = {reading.uuid for reading in self._readings if reading.remap_pending}
        for reading in self._readings:
            self._tell_fault(reading)

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
            instance=reading.instance,
            spare_workers=sum(spares.values()),
            spare_bytes=sum(used.get(pid, 0) for pid, is_warm in spares.items() if is_warm),
            worker_bytes={worker_id: used[pid] for worker_id, pid in workers.items() if pid in used},
        )

    def _fault_of(self, reading: GpuReading) -> str:
        state = describe_state(reading)
        if state:
            return state
        if reading.uncorrected_ecc > self._accepted_ecc.get(reading.uuid, 0):
            return f"{reading.uncorrected_ecc} uncorrected memory errors: reset it, or accept them (config reload)"
        if reading.remap_pending and reading.uuid not in self._accepted_remaps:
            return f"{REMAP_PENDING}: reset it (nvidia-smi --gpu-reset), or accept that (config reload)"
        return self._faults.get(reading.uuid, "")

    def _note_errors(self, reading: GpuReading) -> None:
        for xid in reading.new_xids:
            known = self._xids.setdefault(reading.uuid, [])
            del known[: max(0, len(known) + 1 - MAX_XIDS)]
            known.append(xid)
            if xid in DEVICE_XIDS:
                self._faults[reading.uuid] = f"Xid {xid}, {DEVICE_XIDS[xid]}: reset it, then reload the configuration"
            self._log.error(
                "gpu_error", gpu=reading.index, uuid=reading.uuid, xid=xid, cause=DEVICE_XIDS.get(xid, "a program's")
            )
        before = self._ecc.get(reading.uuid, 0)
        if reading.uncorrected_ecc > before:
            self._log.error(
                "gpu_memory_error", gpu=reading.index, uuid=reading.uuid, uncorrected=reading.uncorrected_ecc
            )
        self._ecc[reading.uuid] = reading.uncorrected_ecc
        accepted = self._accepted_ecc.get(reading.uuid, 0)
        self._accepted_ecc[reading.uuid] = min(accepted, reading.uncorrected_ecc)  # a reset sets the count back
        if not reading.remap_pending:
            self._accepted_remaps.discard(reading.uuid)

    def _tell_fault(self, reading: GpuReading) -> None:
        fault, told = self._fault_of(reading), self._told.get(reading.uuid, "")
        if fault == told:
            return
        self._told[reading.uuid] = fault
        facts = {"gpu": reading.index, "instance": reading.instance, "uuid": reading.uuid}
        if fault:
            self._log.error("gpu_out_of_use", reason=fault, **facts)
        else:
            self._log.info("gpu_in_use_again", was=told, **facts)


def describe_state(reading: GpuReading) -> str:
    """Why a GPU cannot be used whatever anybody accepts, and the remedy; empty: it can."""
    if reading.refused:
        return reading.refused
    if reading.is_lost:
        return "the driver has lost it: reset it, or restart the machine"
    if reading.remap_failed:
        return "bad rows of its memory cannot be mapped out: replace it"
    return ""
