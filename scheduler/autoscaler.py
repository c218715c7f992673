"""What to spawn, drain or refuse, decided purely from a view of the fleet. No I/O, no clock, no log.

A model's life, as the scheduler sees it:

========== ========================= ==========================================================
state      on                        action
========== ========================= ==========================================================
asleep     demand                    spawn one worker (single-flight: further demand adds none)
waking     worker ready              serve
waking     worker failed             retry after a back-off; after MAX_FAILURES refuse the queue
serving    workers die in a row      each next one later (crash_streak.py); at its limit refuse the queue
serving    queue over all batches    spawn another, up to ``max_workers``
serving    no request for idle time  drain every worker
asleep     asked for, or pinned      spawn one worker, as on demand
serving    to be unloaded            drain the workers there were when that was asked for
serving    its node is drained       drain the workers there; others are spawned elsewhere
parked     demand, its GPU is full   drain idle workers of other models there (it comes back by itself)
draining   demand                    spawn a new worker; the draining one takes nothing more
========== ========================= ==========================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from scheduler.config import ModelPolicy
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.states import AWAY_STATES, CLAIMING_STATES, ParkPolicy, SlotState
from scheduler.crash_streak import REFUSED_FROM, describe_held_back
from scheduler.gpu_placement import GpuNeed, GpuView, Place, Refuse, Wait, decide_placement, decide_return

MAX_FAILURES: Final = 3  # wakes in a row that failed before the queue is refused
FAILURE_BACKOFF_S: Final = (0.2, 1.0, 5.0)  # wait before the next wake, by failures in a row
FAILURE_MEMORY_S: Final = 30.0  # after this long without an attempt, a model may be tried afresh
SPAWN_TIMEOUT_S: Final = 60.0  # a worker that is not ready by then is given up
WORKER_BASE_BYTES: Final = 128 * 1024 * 1024  # private memory of a worker besides its KV cache
#: Host memory of a worker on a GPU: libraries, context and pinned ring. Its KV cache is on the device.
GPU_WORKER_HOST_BYTES: Final = 640 * 1024 * 1024
LIVE_STATES: Final = frozenset({SlotState.COLD, SlotState.RESTORING, *CLAIMING_STATES})


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as last heard of. COLD: ordered, not heard of yet."""

    worker_id: str
    node_id: str
    model: str
    state: SlotState
    ordered_at_s: float
    device: str = ""  # UUID of its GPU
    ready_at_s: float = 0.0
    park: ParkPolicy = ParkPolicy.DROP


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model with its demand. ``in_flight`` counts queued and running requests."""

    name: str
    policy: ModelPolicy
    weights_bytes: int
    in_flight: int
    last_active_s: float
    workers: tuple[WorkerView, ...] = ()
    refused: ErrorInfo | None = None
    failures: int = 0
    last_failure_s: float = 0.0
    last_error: ErrorInfo | None = None
    pinned: bool = False
    wake_asked: bool = False  # by an operator, and not there yet
    unloading: frozenset[str] = frozenset()  # workers that an operator wants gone
    retry_at_s: float = 0.0  # no worker before this: those before it died one after the other
    deaths: int = 0  # of workers in a row, while they ran requests
    death_error: ErrorInfo | None = None  # of the last one
    takes_gpu: bool = True  # on a node that has some

    @property
    def is_wanted(self) -> bool:
        """Whether it is to have a worker without any request."""
        return self.pinned or self.wake_asked

    @property
    def live_workers(self) -> tuple[WorkerView, ...]:
        return tuple(worker for worker in self.workers if worker.state in LIVE_STATES)

    @property
    def worker_bytes(self) -> int:
        """Memory to set aside for one worker, its shared weights not counted."""
        return self.policy.kv_budget_bytes + WORKER_BASE_BYTES

    @property
    def gpu_need(self) -> GpuNeed:
        """Device memory to set aside for one worker."""
        return GpuNeed(self.name, self.weights_bytes, self.policy.kv_budget_bytes)


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node that is alive, with the memory it may use for workers and sealed weights."""

    node_id: str
    budget_bytes: int
    drained: bool = False
    gpus: tuple[GpuView, ...] = ()  # whose workers they are for; empty: a CPU node


@dataclass(frozen=True, slots=True)
class FleetView:
    """Everything that a decision may look at."""

    models: tuple[ModelView, ...]
    nodes: tuple[NodeView, ...]


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a worker of ``model`` on ``node_id``, on the GPU of UUID ``device`` where it has some."""

    model: str
    node_id: str
    device: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """Let ``worker_id`` finish and exit."""

    worker: WorkerView
    reason: str


@dataclass(frozen=True, slots=True)
class RefuseQueue:
    """End every queued request of ``model`` with ``error``."""

    model: str
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Treat a worker that was never heard of in time as failed."""

    worker: WorkerView


Action = Spawn | Drain | RefuseQueue | GiveUp


@dataclass(slots=True)
class _Reservations:
    """Memory taken on each node: workers, plus each model's weights once. ``gpus``: of each node that has some."""

    free_bytes: dict[str, int]
    holders: dict[str, set[str]] = field(default_factory=dict)
    gpus: dict[str, list[GpuView]] = field(default_factory=dict)

    def need_bytes(self, model: ModelView, node_id: str) -> int:
        shared = 0 if model.name in self.holders.get(node_id, set()) else model.weights_bytes
        on_gpu = model.takes_gpu and bool(self.gpus.get(node_id))
        return (GPU_WORKER_HOST_BYTES if on_gpu else model.worker_bytes) + shared

    def take(self, model: ModelView, node_id: str) -> None:
        if node_id in self.free_bytes:
            self.free_bytes[node_id] -= self.need_bytes(model, node_id)
            self.holders.setdefault(node_id, set()).add(model.name)

    def has_room(self, model: ModelView, node_id: str) -> bool:
        return self.need_bytes(model, node_id) <= self.free_bytes[node_id]

    def promise(self, model: ModelView, place: Place) -> None:
        """Take device memory; host memory is :meth:`take`'s."""
        self.gpus[place.node_id] = [
            replace(gpu, promised_bytes=gpu.promised_bytes + model.gpu_need.device_bytes)
            if gpu.uuid == place.uuid
            else gpu
            for gpu in self.gpus[place.node_id]
        ]


def decide(fleet: FleetView, now_s: float) -> list[Action]:
    """Actions for this instant, in the order to carry them out."""
    reservations = _reserve(fleet)
    drained = frozenset(node.node_id for node in fleet.nodes if node.drained)
    actions: list[Action] = []
    for model in fleet.models:
        actions += _decide_given_up(model, now_s)
        leaving = _decide_leaving(model, drained)
        actions += leaving
        if model.in_flight > 0:
            actions += _decide_wake(model, fleet, reservations, now_s)
        elif model.is_wanted and model.refused is None:
            wake = _decide_wake(model, fleet, reservations, now_s)
            actions += [action for action in wake if not isinstance(action, RefuseQueue)]  # there is no queue
        elif leaving:
            continue
        else:
            actions += _decide_sleep(model, now_s)
    return actions


def decide_idle_deadline_s(fleet: FleetView) -> float | None:
    """When the next idle timer runs out, on the clock of ``last_active_s``; None: no timer is running."""
    deadlines = [
        model.last_active_s + model.policy.idle_timeout_s
        for model in fleet.models
        if model.in_flight == 0
        and not model.pinned
        and any(worker.state in CLAIMING_STATES for worker in model.workers)
    ]
    return min(deadlines, default=None)


def _reserve(fleet: FleetView) -> _Reservations:
    nodes = [node for node in fleet.nodes if not node.drained]
    reservations = _Reservations(
        {node.node_id: node.budget_bytes for node in nodes},
        gpus={node.node_id: list(node.gpus) for node in nodes if node.gpus},
    )
    for model in fleet.models:
        for worker in model.workers:
            reservations.take(model, worker.node_id)
    return reservations


def _decide_given_up(model: ModelView, now_s: float) -> list[Action]:
    return [
        GiveUp(worker)
        for worker in model.workers
        if worker.state in (SlotState.COLD, SlotState.RESTORING) and now_s - worker.ordered_at_s > SPAWN_TIMEOUT_S
    ]


def _decide_leaving(model: ModelView, drained: frozenset[str]) -> list[Action]:
    """Workers that an operator wants gone: of a model that is unloaded, or on a node that is drained."""
    return [
        Drain(worker, "unloaded" if worker.worker_id in model.unloading else "node drained")
        for worker in model.workers
        if worker.state in CLAIMING_STATES and (worker.worker_id in model.unloading or worker.node_id in drained)
    ]


def choose_prefetch_node(fleet: FleetView, name: str) -> str | None:
    """Where a model that is asked for without a worker is held: where a wake of it would go. None: no room."""
    model = next((model for model in fleet.models if model.name == name), None)
    return None if model is None else _choose_node(model, _reserve(fleet))


def _decide_wake(model: ModelView, fleet: FleetView, reservations: _Reservations, now_s: float) -> list[Action]:
    if model.refused is not None:
        return [RefuseQueue(model.name, model.refused)]
    live = model.live_workers
    if live and all(worker.state in AWAY_STATES for worker in live):
        return _decide_return(model, live, fleet, reservations, now_s)
    if live and not _wants_another(model, live):
        return []
    if now_s < model.retry_at_s:
        if live or model.deaths < REFUSED_FROM:
            return []
        wait_s = model.retry_at_s - now_s
        error = describe_held_back(model.name, model.deaths, model.death_error, wait_s)
        return [RefuseQueue(model.name, error)]
    if not live and (waiting := _decide_failing(model, now_s)) is not None:
        return waiting
    if model.takes_gpu and reservations.gpus:
        on_gpu = _decide_gpu(model, fleet, reservations, now_s)
        if on_gpu is not None:
            return on_gpu
    node_id = _choose_node(model, reservations, without_gpus=model.takes_gpu)
    if node_id is not None:
        reservations.take(model, node_id)
        return [Spawn(model.name, node_id)]
    if live:
        return []  # a second worker is a wish, not a need
    return _decide_without_room(model, fleet, reservations)


def _decide_gpu(model: ModelView, fleet: FleetView, reservations: _Reservations, now_s: float) -> list[Action] | None:
    """A worker on a GPU, room for one, or patience; None: no GPU will ever do, or their hosts' memory is full."""
    roomy = [
        gpu for node_id, gpus in reservations.gpus.items() if reservations.has_room(model, node_id) for gpu in gpus
    ]
    if not roomy:
        return None
    decision = decide_placement(model.gpu_need, roomy, now_s)
    match decision:
        case Place(evicted=()):
            reservations.take(model, decision.node_id)
            reservations.promise(model, decision)
            return [Spawn(model.name, decision.node_id, decision.uuid)]
        case Place(evicted=evicted):
            return [] if model.live_workers else _evict(fleet, evicted, model.name)
        case Wait():
            return []
        case Refuse(error=error):
            if all(node_id in reservations.gpus for node_id in reservations.free_bytes):
                return [RefuseQueue(model.name, error)]
            return None  # a CPU node may take it


def _decide_return(
    model: ModelView, parked: tuple[WorkerView, ...], fleet: FleetView, reservations: _Reservations, now_s: float
) -> list[Action]:
    """A parked worker claims its request and comes back by itself, as soon as there is room."""
    for gpu in (gpu for gpus in reservations.gpus.values() for gpu in gpus):
        if any(worker.device == gpu.uuid and worker.node_id == gpu.node_id for worker in parked):
            evicted = decide_return(model.gpu_need, gpu, now_s)
            if evicted:
                return _evict(fleet, evicted, model.name)
    return []


def _evict(fleet: FleetView, worker_ids: tuple[str, ...], wanted: str) -> list[Action]:
    workers = [worker for model in fleet.models for worker in model.workers if worker.worker_id in worker_ids]
    return [Drain(worker, f"room on its GPU for {wanted}") for worker in workers]


def _wants_another(model: ModelView, live: tuple[WorkerView, ...]) -> bool:
    all_ready = all(worker.state in CLAIMING_STATES for worker in live)
    return all_ready and len(live) < model.policy.max_workers and model.in_flight > len(live) * model.policy.max_running


def _decide_failing(model: ModelView, now_s: float) -> list[Action] | None:
    """None: go on and spawn. Otherwise wait (empty) or refuse."""
    since_s = now_s - model.last_failure_s
    if model.failures == 0 or since_s > FAILURE_MEMORY_S:
        return None
    if model.failures >= MAX_FAILURES:
        cause = f" Last cause: {model.last_error.message}" if model.last_error else ""
        message = f"Model {model.name!r} failed to wake {model.failures} times in a row.{cause}"
        return [RefuseQueue(model.name, ErrorInfo(ErrorCode.WAKE_FAILED, message, retry_after_s=int(FAILURE_MEMORY_S)))]
    return None if since_s >= FAILURE_BACKOFF_S[model.failures - 1] else []


def _choose_node(model: ModelView, reservations: _Reservations, *, without_gpus: bool = False) -> str | None:
    """The node that already holds the weights if it has room, else the one with most memory left; None: no room."""
    fitting = [
        (model.name in reservations.holders.get(node_id, set()), free_bytes, node_id)
        for node_id, free_bytes in reservations.free_bytes.items()
        if reservations.has_room(model, node_id) and not (without_gpus and node_id in reservations.gpus)
    ]
    return max(fitting)[2] if fitting else None


def _decide_without_room(model: ModelView, fleet: FleetView, reservations: _Reservations) -> list[Action]:
    """Refuse what can never fit; otherwise make room by draining the idle worker that was used longest ago."""
    if all(node.drained for node in fleet.nodes):
        return []  # an agent may be on its way; the gateway's own limit ends the wait
    need_bytes = model.worker_bytes + model.weights_bytes
    largest_bytes = max(node.budget_bytes for node in fleet.nodes if not node.drained)
    if need_bytes > largest_bytes:
        message = (
            f"Model {model.name!r} needs {need_bytes} bytes of memory for one worker; the largest node may use "
            f"{largest_bytes}. Lower kv_budget_bytes, raise memory_budget_bytes, or use a bigger machine."
        )
        return [RefuseQueue(model.name, ErrorInfo(ErrorCode.OUT_OF_MEMORY, message))]
    if any(worker.state is SlotState.DRAINING for other in fleet.models for worker in other.workers):
        return []  # room is on its way
    idle = [
        (other.last_active_s, worker)
        for other in fleet.models
        if other.in_flight == 0 and not other.is_wanted
        for worker in other.workers
        if worker.state in CLAIMING_STATES
    ]
    if not idle:
        return []  # everything is busy: the request waits in its queue
    return [Drain(min(idle, key=lambda pair: pair[0])[1], "room for another model")]


def _decide_sleep(model: ModelView, now_s: float) -> list[Action]:
    if now_s - model.last_active_s < model.policy.idle_timeout_s:
        return []
    return [Drain(worker, "idle") for worker in model.workers if worker.state in CLAIMING_STATES]
