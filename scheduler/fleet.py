"""The scheduler's own picture of the fleet: written only by the scheduler's loop, read as frozen views.

Times are seconds of the scheduler's monotonic clock, passed in by the caller.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from scheduler.autoscaler import FleetView, ModelView, NodeView, WorkerView
from scheduler.config import SchedulerConfig
from scheduler.contract.errors import ErrorInfo
from scheduler.contract.messages import ModelCard, ModelStatus, NodeReport, WorkerChanged, WorkerReport
from scheduler.contract.states import AWAY_STATES, CLAIMING_STATES, SlotState, Task, Tier
from scheduler.crash_streak import DEATHS_AT_ONCE, CrashStreak
from scheduler.gpu_ledger import RETURN_S, Departed, Tenant, view_gpus
from scheduler.gpu_placement import GpuNeed, GpuView
from scheduler.model_history import ModelHistory

NODE_BUDGET_FRACTION: Final = 0.8
SILENT_S: Final = 1.0
GPU_BACKEND: Final = "cuda"  # of nodes whose workers use their GPUs
WAKE_ASKED_S: Final = 60.0  # how long a wake that an operator asked for is tried
SERVING: Final = frozenset({*CLAIMING_STATES, SlotState.DRAINING})


@dataclass(slots=True)
class _Model:
    card: ModelCard
    in_flight: int = 0
    last_active_s: float = 0.0
    failures: int = 0
    last_failure_s: float = 0.0
    last_error: ErrorInfo | None = None
    workers: dict[str, WorkerView] = field(default_factory=dict)
    known_since_s: float = 0.0
    awake_s: float = 0.0  # worker-seconds up to ``counted_s``
    counted_s: float = 0.0
    wake_asked_s: float | None = None
    unloading: frozenset[str] = frozenset()
    forget_asked: bool = False
    crashes: CrashStreak = field(default_factory=CrashStreak)
    history: ModelHistory = field(default_factory=ModelHistory)

    def count_awake(self, now_s: float) -> None:
        """Add the worker-seconds since the last count; call before the set of workers changes, and to read."""
        self.awake_s += len(self.workers) * max(0.0, now_s - self.counted_s)
        self.counted_s = now_s


class Fleet:
    """Models, their workers and the nodes, as last heard of."""

    def __init__(self, config: SchedulerConfig, draw_jitter: Callable[[], float] = random.random) -> None:
        self._config = config
        self._draw_jitter = draw_jitter
        self._models: dict[str, _Model] = {}
        self._nodes: dict[str, NodeReport] = {}
        self._reporting: frozenset[str] = frozenset()
        self._silent_since_s: dict[str, float] = {}
        self._pinned: frozenset[str] = frozenset()
        self._drained: frozenset[str] = frozenset()
        self._departed: list[tuple[str, Departed]] = []  # with its node; written only by `_on_departed`

    # --- events ---------------------------------------------------------------------------------------------

    def on_cards(self, cards: list[ModelCard], now_s: float) -> None:
        """The set of models as the nodes publish it. Models with live workers are kept until those are gone."""
        present = {card.name for card in cards}
        for card in cards:
            known = self._models.get(card.name)
            if known is None:
                self._models[card.name] = _Model(card, last_active_s=now_s, known_since_s=now_s, counted_s=now_s)
            elif known.card != card:
                known.card, known.failures = card, 0
                known.crashes.forgive()
        for name in [name for name, model in self._models.items() if name not in present and not model.workers]:
            del self._models[name]

    def on_nodes(self, reports: list[NodeReport]) -> None:
        """Nodes that are alive now; workers of others are gone with them."""
        self._nodes = {report.node_id: report for report in reports}

    def forget_workers_of_lost_nodes(self) -> list[str]:
        """Drop workers whose node is no longer alive, and that do not report themselves; their ids."""
        lost: list[str] = []
        for model in self._models.values():
            for worker_id in [w.worker_id for w in model.workers.values() if w.node_id not in self._nodes]:
                if worker_id not in self._reporting:  # else only its agent stands still
                    del model.workers[worker_id]
                    lost.append(worker_id)
        return lost

    def on_reports(self, reports: list[WorkerReport], now_s: float) -> list[WorkerView]:
        """Who reports now. Workers that nobody had told of are taken in; those that were ready and have been silent
        for :data:`SILENT_S` on top of their report's life are returned."""
        self._reporting = frozenset(report.worker_id for report in reports)
        for report in reports:
            model = self._models.get(report.model)
            if model is not None and report.device and (known := model.workers.get(report.worker_id)) is not None:
                # A new leader has not heard it.
                model.workers[report.worker_id] = replace(known, device=report.device, park=report.park)
            if model is not None and report.worker_id not in model.workers and report.state in SERVING:
                model.workers[report.worker_id] = WorkerView(
                    *(report.worker_id, report.node_id, report.model, report.state, now_s, report.device, now_s),
                    report.park,
                )
        served = [w for m in self._models.values() for w in m.workers.values() if w.state in SERVING]
        missing = {worker.worker_id: worker for worker in served if worker.worker_id not in self._reporting}
        self._silent_since_s = {i: self._silent_since_s.get(i, now_s) for i in missing}
        return [missing[i] for i, since_s in self._silent_since_s.items() if now_s - since_s >= SILENT_S]

    def on_demand(self, name: str, now_s: float) -> bool:
        """A request was enqueued; False if the model is not known."""
        model = self._models.get(name)
        if model is None:
            return False
        model.in_flight += 1
        model.last_active_s = now_s
        model.history.on_request(now_s)
        return True

    def on_in_flight(self, name: str, in_flight: int, now_s: float) -> None:
        """The queue's present length, running requests included."""
        model = self._models.get(name)
        if model is not None:
            if in_flight > 0 or model.in_flight > 0:
                model.last_active_s = now_s
            model.in_flight = in_flight

    def on_ordered(self, worker_id: str, model: str, node_id: str, now_s: float, device: str = "") -> None:
        """A spawn order is about to be sent."""
        self._models[model].count_awake(now_s)
        park = self._config.policy_of(model).park  # as in the order
        worker = WorkerView(worker_id, node_id, model, SlotState.COLD, now_s, device, park=park)
        self._models[model].workers[worker_id] = worker

    def on_draining(self, worker_id: str, model: str) -> None:
        """A drain order is about to be sent."""
        self._set_state(model, worker_id, SlotState.DRAINING)

    def on_worker_changed(self, change: WorkerChanged, now_s: float) -> None:
        """A worker told of itself, or its agent told of its end."""
        model = self._models.get(change.model)
        if model is None:
            return
        model.count_awake(now_s)
        was_ready = (known := model.workers.get(change.worker_id)) is not None and known.state in CLAIMING_STATES
        if change.exited or change.state is SlotState.FAILED:
            removed = model.workers.pop(change.worker_id, None)
            self._on_departed(model, removed, now_s)
            if change.error is not None and (removed is not None or change.state is SlotState.FAILED):
                counted = removed is not None and not change.had_requests
                self._on_failure(model, change.error, now_s, counted=counted)
                if removed is not None and change.had_requests:
                    model.crashes.on_death(change.worker_id, change.error, now_s, self._draw_jitter())
            model.crashes.on_gone(change.worker_id)
            return
        if known is None:
            model.workers[change.worker_id] = WorkerView(
                change.worker_id, change.node_id, change.model, change.state, now_s
            )
        elif known.state is not SlotState.DRAINING:
            self._set_state(change.model, change.worker_id, change.state)
        if change.state is SlotState.READY:
            model.wake_asked_s = None
        if known is not None and known.state in AWAY_STATES and change.state is SlotState.READY:
            self._on_returned(model, change.worker_id, now_s)
        if change.state is SlotState.READY and not was_ready:
            model.crashes.on_ready(change.worker_id, now_s)
            self._on_ready(model, change.worker_id, now_s)
            model.failures = 0
            model.last_active_s = now_s

    def on_given_up(self, worker: WorkerView, error: ErrorInfo, now_s: float) -> None:
        """A worker was not ready in time."""
        model = self._models.get(worker.model)
        if model is None:
            return
        model.count_awake(now_s)
        model.crashes.on_gone(worker.worker_id)
        if (removed := model.workers.pop(worker.worker_id, None)) is not None:
            self._on_departed(model, removed, now_s)
            self._on_failure(model, error, now_s, counted=True)

    def crash_streak(self, name: str) -> tuple[int, float]:
        """How many of the model's workers have died in a row, and when the next one may start."""
        crashes = self._models[name].crashes if name in self._models else CrashStreak()
        return crashes.num_deaths, crashes.retry_at_s

    def take_recovered(self, now_s: float) -> list[str]:
        """Models that were held back for their workers' deaths and have one now that stays up; told once."""
        return [name for name, model in self._models.items() if model.crashes.end_if_steady(now_s)]

    def _on_failure(self, model: _Model, error: ErrorInfo, now_s: float, *, counted: bool) -> None:
        model.last_error = error
        model.last_failure_s = now_s
        if counted:
            model.failures += 1

    def _on_ready(self, model: _Model, worker_id: str, now_s: float) -> None:
        worker = model.workers[worker_id]
        if worker.state is SlotState.READY and not worker.ready_at_s:
            model.history.on_ready(now_s - worker.ordered_at_s)
            model.workers[worker_id] = replace(worker, ready_at_s=now_s)

    def _on_returned(self, model: _Model, worker_id: str, now_s: float) -> None:
        """A parked model is on its device again: its residence begins anew, so that two do not take turns for ever."""
        worker = model.workers[worker_id]
        if worker.state is SlotState.READY:
            model.workers[worker_id] = replace(worker, ready_at_s=now_s)

    def _on_departed(self, model: _Model, worker: WorkerView | None, now_s: float) -> None:
        """Its node's next reports may still miss the memory that it had on a GPU."""
        self._departed = [entry for entry in self._departed if now_s - entry[1].ended_s < RETURN_S]
        if worker is not None and worker.device:
            held_bytes = self._tenant(model, worker, now_s).held_bytes
            self._departed.append((worker.node_id, Departed(worker.device, held_bytes, now_s)))

    def _set_state(self, name: str, worker_id: str, state: SlotState) -> None:
        model = self._models.get(name)
        if model is not None and (known := model.workers.get(worker_id)) is not None:
            model.workers[worker_id] = replace(known, state=state)

    # --- what operators want ----------------------------------------------------------------------------------

    def set_config(self, config: SchedulerConfig) -> None:
        """The configuration was read again; policies hold from now on."""
        self._config = config

    def set_policies(self, pinned: frozenset[str], drained: frozenset[str]) -> None:
        """Models pinned and nodes drained by operators, as they are stored."""
        self._pinned, self._drained = pinned, drained

    def on_wake_asked(self, name: str, now_s: float) -> None:
        """A worker is wanted without a request: until it is there, or :data:`WAKE_ASKED_S` have passed."""
        if (model := self._models.get(name)) is not None:
            model.wake_asked_s, model.failures = now_s, 0
            model.crashes.forgive()
            model.last_active_s = now_s

    def on_unload_asked(self, name: str) -> None:
        """The present workers are to go, and then the sealed bytes."""
        if (model := self._models.get(name)) is not None:
            model.wake_asked_s, model.unloading, model.forget_asked = None, frozenset(model.workers), True

    def expire_wishes(self, now_s: float) -> None:
        """Forget wakes that were asked for and did not come in time."""
        for model in self._models.values():
            if model.wake_asked_s is not None and now_s - model.wake_asked_s > WAKE_ASKED_S:
                model.wake_asked_s = None

    def take_forgettable(self) -> list[tuple[str, str]]:
        """(model, node) of sealed bytes that an operator wants gone and whose workers are gone; told once."""
        found: list[tuple[str, str]] = []
        for name, model in self._models.items():
            if model.forget_asked and not model.unloading & model.workers.keys():
                model.forget_asked, model.unloading = False, frozenset()
                found += [(name, node_id) for node_id in self._nodes]
        return found

    def workers_in(self, name: str, state: SlotState) -> list[WorkerView]:
        """A model's workers in ``state``."""
        model = self._models.get(name)
        return [worker for worker in model.workers.values() if worker.state is state] if model is not None else []

    # --- views ----------------------------------------------------------------------------------------------

    def model_names(self) -> list[str]:
        return list(self._models)

    def awake_or_waiting(self) -> list[str]:
        """Models with a worker or a request: those whose queues are worth looking at."""
        return [n for n, m in self._models.items() if m.workers or m.in_flight or m.forget_asked or self._is_wanted(n)]

    def _is_wanted(self, name: str) -> bool:
        return self._is_pinned(name) or self._models[name].wake_asked_s is not None

    def _is_pinned(self, name: str) -> bool:
        return name in self._pinned or self._config.policy_of(name).pinned

    def view(self, now_s: float = 0.0) -> FleetView:
        """A frozen picture for the decisions. ``now_s`` matters where there are GPUs."""
        models = tuple(
            ModelView(
                name=name,
                policy=self._config.policy_of(name),
                weights_bytes=model.card.weights_bytes,
                in_flight=model.in_flight,
                last_active_s=model.last_active_s,
                workers=tuple(model.workers.values()),
                refused=model.card.refused,
                failures=model.failures,
                last_failure_s=model.last_failure_s,
                last_error=model.last_error,
                pinned=self._is_pinned(name),
                wake_asked=model.wake_asked_s is not None,
                unloading=model.unloading,
                retry_at_s=model.crashes.retry_at_s,
                deaths=model.crashes.num_deaths,
                death_error=model.crashes.last_error,
                takes_gpu=model.card.task is Task.GENERATE,
            )
            for name, model in self._models.items()
        )
        nodes = tuple(
            NodeView(node_id, self._node_budget_bytes(report), node_id in self._drained, self._view_gpus(report, now_s))
            for node_id, report in self._nodes.items()
        )
        return FleetView(models, nodes)

    def _view_gpus(self, report: NodeReport, now_s: float) -> tuple[GpuView, ...]:
        """The GPUs that the node's workers use; empty on a CPU node."""
        if report.backend != GPU_BACKEND or not report.gpus:
            return ()
        tenants = [
            self._tenant(model, worker, now_s)
            for model in self._models.values()
            for worker in model.workers.values()
            if worker.node_id == report.node_id
        ]
        departed = [one for node_id, one in self._departed if node_id == report.node_id]
        return view_gpus(report.node_id, report.gpus, tenants, departed, frozenset(report.sealed_bytes), now_s)

    def _tenant(self, model: _Model, worker: WorkerView, now_s: float) -> Tenant:
        name, weights_bytes = model.card.name, model.card.weights_bytes
        return Tenant(
            worker_id=worker.worker_id,
            device=worker.device,
            state=worker.state,
            need=GpuNeed(name, weights_bytes, self._config.policy_of(name).kv_budget_bytes),
            ready_s=worker.ready_at_s,
            last_active_s=model.last_active_s,
            reload_s=model.history.reload_s(weights_bytes),
            requests_per_s=model.history.requests_per_s(now_s),
            in_flight=model.in_flight + (model.wake_asked_s is not None),  # a wish brings a parked one back too
            is_wanted=self._is_wanted(name),
            park=worker.park,
        )

    def _node_budget_bytes(self, report: NodeReport) -> int:
        return self._config.memory_budget_bytes or int(report.memory_total_bytes * NODE_BUDGET_FRACTION)

    def statuses(self, reports: list[WorkerReport], now_s: float) -> tuple[ModelStatus, ...]:
        """Rows of ``ps``, by name."""
        return tuple(self._status(name, reports, now_s) for name in sorted(self._models))

    def _status(self, name: str, reports: list[WorkerReport], now_s: float) -> ModelStatus:
        model = self._models[name]
        model.count_awake(now_s)
        own = [report for report in reports if report.model == name]
        running = sum(report.num_running for report in own)
        sealed_bytes = sum(report.sealed_bytes.get(name, 0) for report in self._nodes.values())
        states = sorted({worker.state.value for worker in model.workers.values()})
        refused = model.card.refused
        present = {worker.state for worker in model.workers.values()}
        if present & {SlotState.READY, SlotState.DRAINING}:
            tier = Tier.HOT
        elif SlotState.PARKED in present:
            tier = Tier.PARKED
        elif SlotState.RELEASED in present:
            tier = Tier.RELEASED
        else:
            tier = Tier.HOST_RAM if sealed_bytes else Tier.DISK
        is_pinned = self._is_pinned(name)
        is_idle = model.in_flight == 0 and bool(model.workers) and not is_pinned
        return ModelStatus(
            name=name,
            tier=tier,
            workers=len(model.workers),
            in_flight=model.in_flight,
            queued=max(0, model.in_flight - running),
            idle_for_s=round(now_s - model.last_active_s, 3) if is_idle else None,
            idle_timeout_s=self._config.policy_of(name).idle_timeout_s,
            sealed_bytes=sealed_bytes,
            worker_bytes=sum(report.private_bytes for report in own),
            state="refused" if refused else ",".join(states),
            error=refused.message if refused else _wake_error(model),
            deaths=model.crashes.num_deaths,
            proportional_bytes=sum(report.proportional_bytes for report in own),
            awake_s=round(model.awake_s, 3),
            known_s=round(now_s - model.known_since_s, 3),
            pinned=is_pinned,
        )


def _wake_error(model: _Model) -> str | None:
    """Why the last wake failed, or worker died, where none has worked since."""
    crashes = model.crashes
    if crashes.num_deaths > DEATHS_AT_ONCE and crashes.last_error:
        return f"{crashes.num_deaths} workers in a row died; last cause: {crashes.last_error.message}"
    return model.last_error.message if model.failures and model.last_error else None
