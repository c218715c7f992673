"""The GPUs of a node as decisions see them: what the driver says, and what was ordered and does not show there yet.

A report is up to two seconds old, and a worker takes its memory some time after its order. So free memory is the lesser
of the driver's count and of what is left after everything that our own workers need; and what was promised to workers
that are not ready is taken off. Memory of workers that leave, or have just left, is on its way back: nobody else need
leave for what it will hold. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from scheduler.contract.messages import GpuReport
from scheduler.contract.states import AWAY_STATES, ParkPolicy, SlotState
from scheduler.gpu_placement import GpuNeed, GpuView, Resident

STARTING: Final = frozenset({SlotState.COLD, SlotState.RESTORING})

#: How long after a worker's end its memory may be missing in the node's report: a heartbeat, and the look at it.
RETURN_S: Final = 3.5


@dataclass(frozen=True, slots=True)
class Tenant:
    """A worker on a GPU, with what its model needs there and how dear it is to bring back."""

    worker_id: str
    device: str
    state: SlotState
    need: GpuNeed
    ready_s: float
    last_active_s: float
    reload_s: float
    requests_per_s: float
    in_flight: int
    is_wanted: bool = False  # pinned, or asked for: it does not leave for another
    park: ParkPolicy = ParkPolicy.DROP

    @property
    def held_bytes(self) -> int:
        """What it holds, once it is ready: of a parked model its context, and KV blocks where they are kept."""
        if self.state is SlotState.RELEASED:
            return 0
        if self.state is not SlotState.PARKED:
            return self.need.device_bytes
        kv_bytes = 0 if self.park is ParkPolicy.KEEP else self.need.kv_bytes
        return self.need.device_bytes - self.need.weights_bytes - kv_bytes

    @property
    def promised_bytes(self) -> int:
        """What it is about to take: all of it before it is ready, what it gave where a parked model is called back."""
        if self.state in STARTING:
            return self.need.device_bytes
        return self.need.device_bytes - self.held_bytes if self.state in AWAY_STATES and self.in_flight else 0


@dataclass(frozen=True, slots=True)
class Departed:
    """A worker that has ended, whose memory the driver's count may still miss."""

    device: str
    held_bytes: int
    ended_s: float


def view_gpus(
    node_id: str,
    reports: Iterable[GpuReport],
    tenants: Sequence[Tenant],
    departed: Sequence[Departed],
    host_models: frozenset[str],
    now_s: float,
) -> tuple[GpuView, ...]:
    """A node's GPUs with who is on them."""
    return tuple(
        _view_gpu(
            node_id,
            report,
            [tenant for tenant in tenants if tenant.device == report.uuid],
            [one for one in departed if one.device == report.uuid and now_s - one.ended_s < RETURN_S],
            host_models,
        )
        for report in reports
    )


def _view_gpu(
    node_id: str, report: GpuReport, tenants: list[Tenant], departed: list[Departed], host_models: frozenset[str]
) -> GpuView:
    there = [tenant for tenant in tenants if tenant.state not in STARTING]
    staying = [tenant for tenant in there if tenant.state is not SlotState.DRAINING]
    spare_bytes = report.spare_bytes // report.spare_workers if report.spare_workers else 0  # the next worker is it
    booked_bytes = sum(tenant.held_bytes for tenant in there)
    return GpuView(
        node_id=node_id,
        number=report.index,
        uuid=report.uuid,
        total_bytes=report.total_bytes,
        free_bytes=min(report.free_bytes + spare_bytes, report.total_bytes - booked_bytes),
        promised_bytes=sum(tenant.promised_bytes for tenant in tenants),
        leaving_bytes=sum(tenant.held_bytes for tenant in there if tenant not in staying)
        + sum(one.held_bytes for one in departed),
        residents=tuple(_resident(tenant) for tenant in staying if not tenant.is_wanted),
        host_models=host_models,
        is_usable=not report.fault,
    )


def _resident(tenant: Tenant) -> Resident:
    return Resident(
        worker_id=tenant.worker_id,
        model=tenant.need.model,
        device_bytes=tenant.held_bytes,
        since_s=tenant.ready_s,
        last_active_s=tenant.last_active_s,
        reload_s=tenant.reload_s,
        requests_per_s=tenant.requests_per_s,
        in_flight=tenant.in_flight,
    )
