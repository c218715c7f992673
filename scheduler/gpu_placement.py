"""Which GPU a model goes to, and who has to leave for it. Pure: no I/O, no clock, no log.

A model needs its weights, its KV blocks and some scratch memory on one GPU; nothing is split over several. Free memory
is what the driver says, other processes' use included, less what was promised and has not been taken yet. Who leaves is
chosen by what it costs to bring back: seconds to reload, times how likely it is wanted before the newcomer is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scheduler.contract.errors import ErrorCode, ErrorInfo

#: Scratch memory, graphs and the allocator's rounding beside weights and KV blocks.
OVERHEAD_BYTES: Final = 512 * 1024 * 1024
#: A model that came this recently is not sent away for another: else two models that do not fit take turns for ever.
MIN_RESIDENCE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Resident:
    """A worker's model on a GPU. ``reload_s`` is its last measured time to come back; ``requests_per_s`` its recent
    rate. ``in_flight``: requests queued or running."""

    worker_id: str
    model: str
    device_bytes: int
    since_s: float
    last_active_s: float
    reload_s: float
    requests_per_s: float
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class GpuView:
    """One GPU. ``promised_bytes`` are of workers that were ordered and have not taken their memory yet;
    ``leaving_bytes`` of workers that give theirs back now, not counted as free.

    ``is_usable`` is False after an error that the driver reports as the device's own (Xid, uncorrectable ECC)."""

    node_id: str
    number: int
    total_bytes: int
    free_bytes: int
    promised_bytes: int = 0
    residents: tuple[Resident, ...] = ()
    host_models: frozenset[str] = frozenset()  # whose weights are in the node's memory
    is_usable: bool = True
    leaving_bytes: int = 0
    uuid: str = ""

    @property
    def room_bytes(self) -> int:
        """What can still be promised."""
        return self.free_bytes - self.promised_bytes


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """What a model takes of a GPU."""

    model: str
    weights_bytes: int
    kv_bytes: int

    @property
    def device_bytes(self) -> int:
        """Bytes on the device, all together."""
        return self.weights_bytes + self.kv_bytes + OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Place:
    """Start the model on that GPU, once ``evicted`` have gone (parked or drained); empty: at once."""

    node_id: str
    number: int
    evicted: tuple[str, ...] = ()  # worker ids
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can leave now: ask again at ``at_s``, or (None) when something changes."""

    at_s: float | None


@dataclass(frozen=True, slots=True)
class Refuse:
    """It fits on no GPU, whoever leaves."""

    error: ErrorInfo


def decide_placement(need: GpuNeed, gpus: Sequence[GpuView], now_s: float) -> Place | Wait | Refuse:
    """Where ``need`` goes.

    A GPU with room is taken at once: on a node that holds the weights before one that does not, then the fullest one
    that fits, so that large models find room later. Else the GPU is chosen whose evictions cost least.
    """
    usable = [gpu for gpu in gpus if gpu.is_usable]
    if not any(gpu.total_bytes >= need.device_bytes for gpu in usable):
        largest = max((gpu.total_bytes for gpu in usable), default=0)
        return Refuse(_describe_refusal(need, largest, len(gpus) - len(usable)))
    fitting = [gpu for gpu in usable if gpu.room_bytes >= need.device_bytes]
    if fitting:
        best = min(
            fitting, key=lambda gpu: (need.model not in gpu.host_models, gpu.room_bytes, gpu.node_id, gpu.number)
        )
        return Place(best.node_id, best.number, uuid=best.uuid)
    if any(gpu.room_bytes + gpu.leaving_bytes >= need.device_bytes for gpu in usable):
        return Wait(None)  # room is on its way; nobody else leaves for it
    return _decide_evictions(need, usable, now_s)


def decide_return(need: GpuNeed, gpu: GpuView, now_s: float) -> tuple[str, ...]:
    """Who leaves so that a parked model can come back to ``gpu``: worker ids; empty: there is room, or it is on its
    way, or nobody may leave now."""
    if gpu.room_bytes + gpu.leaving_bytes >= 0:  # what comes back is promised already
        return ()
    chosen = _choose_evicted(need, gpu, now_s, missing_bytes=-gpu.room_bytes - gpu.leaving_bytes)
    return tuple(resident.worker_id for resident in chosen or ())


def compute_eviction_cost(resident: Resident, horizon_s: float) -> float:
    """Expected seconds that sending ``resident`` away costs its requests: its reload, times the chance that one comes
    within ``horizon_s`` (as of arrivals at its recent rate, independent of each other)."""
    chance = min(1.0, resident.requests_per_s * horizon_s)
    return resident.reload_s * chance


def _decide_evictions(need: GpuNeed, usable: list[GpuView], now_s: float) -> Place | Wait:
    plans: list[tuple[float, bool, Place]] = []
    for gpu in usable:
        chosen = _choose_evicted(need, gpu, now_s)
        if chosen is not None:
            cost = sum(compute_eviction_cost(resident, MIN_RESIDENCE_S) for resident in chosen)
            place = Place(gpu.node_id, gpu.number, tuple(resident.worker_id for resident in chosen), gpu.uuid)
            plans.append((cost, need.model not in gpu.host_models, place))
    if plans:
        return min(plans, key=lambda plan: (plan[0], plan[1], len(plan[2].evicted), plan[2].node_id))[2]
    ripening = [
        resident.since_s + MIN_RESIDENCE_S
        for gpu in usable
        for resident in gpu.residents
        if not resident.in_flight and now_s - resident.since_s < MIN_RESIDENCE_S
    ]
    return Wait(min(ripening, default=None))


def _choose_evicted(
    need: GpuNeed, gpu: GpuView, now_s: float, missing_bytes: int | None = None
) -> tuple[Resident, ...] | None:
    """The cheapest idle residents whose memory is enough, cheapest a byte first; None: not enough may leave."""
    missing = need.device_bytes - gpu.room_bytes - gpu.leaving_bytes if missing_bytes is None else missing_bytes
    candidates = [
        resident
        for resident in gpu.residents
        if not resident.in_flight and now_s - resident.since_s >= MIN_RESIDENCE_S and resident.model != need.model
    ]
    candidates.sort(
        key=lambda one: (compute_eviction_cost(one, MIN_RESIDENCE_S) / max(one.device_bytes, 1), one.last_active_s)
    )
    chosen: list[Resident] = []
    for resident in candidates:
        if missing <= 0:
            break
        chosen.append(resident)
        missing -= resident.device_bytes
    if missing > 0:
        return None
    for resident in sorted(chosen, key=lambda one: one.device_bytes):  # who was taken needlessly stays
        if missing + resident.device_bytes <= 0:
            chosen.remove(resident)
            missing += resident.device_bytes
    return tuple(chosen)


def _describe_refusal(need: GpuNeed, largest_bytes: int, num_faulty: int) -> ErrorInfo:
    if not largest_bytes:
        message = f"model {need.model!r} needs a GPU and none can be used: {num_faulty} report faults"
        remedy = "`glowplug doctor` says which and what helps (a reset, or `glowplug config reload` after it)"
        return ErrorInfo(ErrorCode.BACKEND_UNAVAILABLE, f"{message}. {remedy}")
    faulty = f", {num_faulty} more report faults" if num_faulty else ""
    return ErrorInfo(
        ErrorCode.OUT_OF_MEMORY,
        f"model {need.model!r} needs {need.device_bytes} bytes of one GPU; the largest has {largest_bytes}{faulty}. "
        "Models are not split over GPUs: use a smaller format (int8), lower kv_budget_bytes, or run it on the CPU",
    )
