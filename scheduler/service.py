"""The scheduler process: one loop that reads the inbox, lets :mod:`scheduler.autoscaler` decide, and acts.

Only the leader acts; a standby waits for the lease. Everything the loop knows is rebuilt from Redis when it starts
to lead, so a restart loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from pathlib import Path
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.autoscaler import (
    Action,
    Drain,
    GiveUp,
    RefuseQueue,
    Spawn,
    WorkerView,
    choose_prefetch_node,
    decide,
    decide_idle_deadline_s,
)
from scheduler.config import SchedulerConfig, load_config
from scheduler.contract import codec, keys
from scheduler.contract.config_file import find_changed
from scheduler.contract.connection import CONNECTION_ERRORS
from scheduler.contract.errors import ContractError, ErrorCode, ErrorInfo
from scheduler.contract.job_queue import release_worker
from scheduler.contract.messages import (
    AgentCommand,
    Demand,
    DrainWorker,
    ForgetModel,
    InboxMessage,
    ModelCard,
    ModelOrder,
    ModelsChanged,
    NodeReport,
    ParkWorker,
    PolicyChanged,
    PrefetchModel,
    SpawnWorker,
    StageEvent,
    StatusReport,
    WorkerChanged,
    WorkerReport,
)
from scheduler.contract.reloading import SCHEDULER, ReloadListener
from scheduler.contract.states import AWAY_STATES, ModelAct, SlotState
from scheduler.contract.telemetry import Mark
from scheduler.dispatch import Dispatcher
from scheduler.fleet import Fleet
from scheduler.leader import RENEW_EVERY_S, Leadership
from scheduler.sweeper import SWEEP_EVERY_S, Sweeper

TICK_S: Final = 0.5  # while a worker lives or a request waits: queue lengths, idle timers
IDLE_TICK_S: Final = 2.0  # otherwise: heartbeat of the status report
STANDBY_POLL_S: Final = 0.25
STATUS_EVERY_S: Final = 1.0
NODES_EVERY_S: Final = 1.0
MIN_BLOCK_S: Final = 0.005
INBOX_BATCH: Final = 500
REFUSALS: Final = frozenset(
    {ErrorCode.SNAPSHOT_SIGNATURE_INVALID, ErrorCode.SNAPSHOT_CORRUPT, ErrorCode.SNAPSHOT_INCOMPATIBLE}
)


class Scheduler:
    """The loop and its effects. One instance a process; runs on the event loop."""

    def __init__(
        self, redis: Redis, config: SchedulerConfig, scheduler_id: str, config_path: Path | None = None
    ) -> None:
        self._redis: Any = redis  # redis-py types each reply as sync-or-async; Any keeps the awaits readable
        self._config = config
        self._config_path = config_path
        self._drained: frozenset[str] = frozenset()
        self._leadership = Leadership(redis, scheduler_id)
        self._dispatcher = Dispatcher(redis)
        self._fleet = Fleet(config)
        self._scheduler_id = scheduler_id
        self._log = structlog.get_logger(scheduler=scheduler_id)
        self._last_inbox_id = b"0-0"
        self._sweeper = Sweeper(redis, self._dispatcher, config.unheard_grace_s)
        self._renewed_s = self._status_s = self._nodes_s = self._swept_s = 0.0
        self._nodes: list[NodeReport] = []
        self.reloading = ReloadListener(redis, SCHEDULER, scheduler_id, self._reload_config)
        self._stopping = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Ask the loop to end now, also while it waits for news. Idempotent."""
        self._stopping.set()
        if self._loop_task is not None:
            self._loop_task.cancel()

    async def _reload_config(self) -> tuple[str, ...]:
        """Read the configuration again; policies hold from the next decision on.

        Raises:
            SettingsError: it is wrong, and nothing changed.
        """
        self._config = load_config(self._config_path)  # a file of some KiB on the local disk: a millisecond
        self._fleet.set_config(self._config)
        return find_changed(("logging",))

    async def run(self) -> None:
        """Lead when possible, stand by otherwise, until :meth:`stop`. Survives a Redis that goes away."""
        self._loop_task = asyncio.create_task(self._loop(), name="scheduler-loop")
        self.reloading.start()
        try:
            await self._loop_task
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
        await self.reloading.aclose()
        with contextlib.suppress(*CONNECTION_ERRORS):
            await self._leadership.release()

    async def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                if await self._leadership.try_acquire():
                    await self._lead()
                else:
                    await self._pause(STANDBY_POLL_S)
            except (*CONNECTION_ERRORS, RedisError) as error:  # away, loading, or out of memory: all of it passes
                self._log.warning("redis_unreachable", error=f"{type(error).__name__}: {error}")
                self._leadership.fencing_token = 0
                await self._pause(STANDBY_POLL_S)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    # --- leading ----------------------------------------------------------------------------------------------

    async def _lead(self) -> None:
        self._renewed_s = time.monotonic()
        await self._rebuild()
        await self._publish_status()
        await self._act()
        while not self._stopping.is_set():
            if time.monotonic() - self._renewed_s > RENEW_EVERY_S:
                if not await self._leadership.renew():
                    return
                self._renewed_s = time.monotonic()
            await self._turn()

    async def _rebuild(self) -> None:
        """Learn models, nodes, workers and queues from Redis, and read the inbox from its present end on."""
        newest = await self._redis.xrevrange(keys.INBOX, count=1)
        self._last_inbox_id = newest[0][0] if newest else b"0-0"
        self._fleet = Fleet(self._config)
        await self._read_policies()
        await self._read_cards()
        await self._read_nodes()
        for report in await self._read_worker_reports():
            self._fleet.on_worker_changed(
                WorkerChanged(report.node_id, report.worker_id, report.model, report.state), time.monotonic()
            )
        await self._read_queues(self._fleet.model_names())

    async def _turn(self) -> None:
        """Wait for news (at most until the next timer), take it in, decide, act, publish."""
        batch = await self._redis.xread({keys.INBOX: self._last_inbox_id}, count=INBOX_BATCH, block=self._block_ms())
        seen_mono_ns = time.monotonic_ns()
        has_demand = False
        for _, entries in batch or ():
            for entry_id, fields in entries:
                self._last_inbox_id = entry_id
                has_demand |= await self._on_message(fields.get(keys.FIELD.encode(), b""))
        if has_demand:
            await self._act(seen_mono_ns)  # a demand is answered before any bookkeeping
        await self._read_queues(self._fleet.awake_or_waiting())
        if time.monotonic() - self._nodes_s > NODES_EVERY_S:
            await self._read_nodes()
        self._fleet.expire_wishes(time.monotonic())
        for model in self._fleet.take_recovered(time.monotonic()):
            self._log.info("model_steady_again", model=model)
        await self._act(seen_mono_ns)
        for model, node_id in self._fleet.take_forgettable():
            await self._order(node_id, ForgetModel(model, self._leadership.fencing_token))
        if time.monotonic() - self._swept_s > SWEEP_EVERY_S:
            self._swept_s = time.monotonic()
            await self._sweeper.sweep(self._fleet.model_names())
        if batch or time.monotonic() - self._status_s > STATUS_EVERY_S:
            await self._publish_status()

    def _block_ms(self) -> int:
        """How long to wait for news: to the next idle deadline, but no longer than a tick."""
        now_s = time.monotonic()
        wait_s = TICK_S if self._fleet.awake_or_waiting() else IDLE_TICK_S
        deadline_s = decide_idle_deadline_s(self._fleet.view())
        if deadline_s is not None:
            wait_s = min(wait_s, deadline_s - now_s)
        wait_s = min(wait_s, self._renewed_s + RENEW_EVERY_S - now_s)
        return int(max(MIN_BLOCK_S, wait_s) * 1000)

    async def _on_message(self, data: bytes) -> bool:
        """Take one message in; whether it was a demand (news of workers must not act on an old queue length)."""
        try:
            message: InboxMessage = codec.decode(data, InboxMessage)
        except ContractError as error:
            self._log.error("inbox_message_refused", error=str(error))
            return False
        now_s = time.monotonic()
        match message:
            case Demand(model=model):
                if not self._fleet.on_demand(model, now_s):
                    await self._read_cards()
                    self._fleet.on_demand(model, now_s)
            case WorkerChanged(error=cause):
                self._fleet.on_worker_changed(message, now_s)
                if message.exited and message.had_requests:
                    await self._tell_deaths(message, now_s)
                if message.exited and any(node.gpus for node in self._nodes):
                    await self._read_nodes()  # its agent has said how much device memory is free now
                if cause is not None and cause.code in REFUSALS:
                    await self._read_cards()  # its agent has published why; the queue is refused with that
            case ModelsChanged():  # also an agent's first word: its node may be new
                await self._read_cards()
                await self._read_nodes()
                await self._read_queues(self._fleet.model_names())  # a model may have come after its first requests
            case ModelOrder(model=model, act=act):
                await self._on_order(model, act, now_s)
            case PolicyChanged(reload_config=reload_config):
                await self._read_policies()
                if reload_config:
                    await self.reloading.reload()
        return isinstance(message, Demand)

    async def _tell_deaths(self, change: WorkerChanged, now_s: float) -> None:
        """Log a worker's death while it ran requests; if the next one has to wait for it, tell clients who wait too."""
        deaths, retry_at_s = self._fleet.crash_streak(change.model)
        if change.error is None or deaths == 0:
            return
        wait_s = max(0.0, retry_at_s - now_s)
        facts = {"worker_id": change.worker_id, "deaths": deaths, "wait_s": round(wait_s, 2)}
        self._log.error("worker_died_running", model=change.model, error=change.error.message, **facts)
        if wait_s > 0:
            stage = StageEvent(change.model, "held-back", int(wait_s * 1000))
            await self._redis.publish(keys.EVENTS, codec.encode(stage))

    async def _on_order(self, model: str, act: ModelAct, now_s: float) -> None:
        """An operator wants something of ``model``."""
        self._log.info("operator_order", model=model, act=act.value)
        if act is ModelAct.WAKE:
            self._fleet.on_wake_asked(model, now_s)
            for state in AWAY_STATES:
                await self._park(self._fleet.workers_in(model, state), is_parked=False)
        elif act is ModelAct.PARK:
            await self._park(self._fleet.workers_in(model, SlotState.READY))
        elif act is ModelAct.UNLOAD:
            self._fleet.on_unload_asked(model)
        elif (node_id := choose_prefetch_node(self._fleet.view(), model)) is not None:
            await self._order(node_id, PrefetchModel(model, self._leadership.fencing_token))
        else:
            self._log.error("prefetch_without_room", model=model)

    async def _park(self, workers: list[WorkerView], *, is_parked: bool = True) -> None:
        for worker in workers:
            order = ParkWorker(worker.worker_id, self._leadership.fencing_token, is_parked)
            await self._order(worker.node_id, order)

    # --- reading ----------------------------------------------------------------------------------------------

    async def _read_cards(self) -> None:
        raw = await self._redis.hgetall(keys.MODELS)
        self._fleet.on_cards([codec.decode(data, ModelCard) for data in raw.values()], time.monotonic())

    async def _read_policies(self) -> None:
        """Pins and drained nodes, as operators left them."""
        pinned, drained = [await self._redis.smembers(key) for key in (keys.PINNED, keys.DRAINED_NODES)]
        self._drained = frozenset(name.decode() for name in drained)
        self._fleet.set_policies(frozenset(name.decode() for name in pinned), self._drained)

    async def _read_nodes(self) -> None:
        self._nodes_s = time.monotonic()
        node_ids = await self._redis.smembers(keys.NODES)
        found = await self._redis.mget([keys.node(node_id.decode()) for node_id in node_ids]) if node_ids else []
        self._nodes = [codec.decode(data, NodeReport) for data in found if data]
        self._fleet.on_nodes(self._nodes)
        lost = self._fleet.forget_workers_of_lost_nodes()
        if lost:
            self._log.error("workers_lost_with_their_node", worker_ids=lost)

    async def _read_worker_reports(self) -> list[WorkerReport]:
        worker_ids = await self._redis.smembers(keys.WORKERS)
        found = await self._redis.mget([keys.worker(i.decode()) for i in worker_ids]) if worker_ids else []
        return [codec.decode(data, WorkerReport) for data in found if data]

    async def _read_queues(self, models: list[str]) -> None:
        if models:
            depths = await self._dispatcher.queue_depths(models)
            for model, depth in depths.items():
                self._fleet.on_in_flight(model, depth, time.monotonic())

    # --- acting -----------------------------------------------------------------------------------------------

    async def _act(self, seen_mono_ns: int | None = None) -> None:
        seen = time.monotonic_ns() if seen_mono_ns is None else seen_mono_ns
        now_s = time.monotonic()
        for action in decide(self._fleet.view(now_s), now_s):
            await self._carry_out(action, seen)

    async def _carry_out(self, action: Action, seen_mono_ns: int) -> None:
        match action:
            case Spawn():
                await self._spawn(action, seen_mono_ns)
            case Drain(worker=worker, reason=reason):
                grace_s = self._config.policy_of(worker.model).drain_grace_s
                self._fleet.on_draining(worker.worker_id, worker.model)
                order = DrainWorker(worker.worker_id, self._leadership.fencing_token, grace_s)
                await self._order(worker.node_id, order)
                self._log.info("drain_ordered", model=worker.model, worker_id=worker.worker_id, reason=reason)
            case RefuseQueue(model=model, error=error):
                count = await self._dispatcher.fail_queued(model, error)
                self._fleet.on_in_flight(model, 0, time.monotonic())
                self._log.error(
                    "queue_refused", model=model, requests=count, code=error.code.value, error=error.message
                )
            case GiveUp(worker=worker):
                error = ErrorInfo(ErrorCode.WAKE_FAILED, f"worker {worker.worker_id} was not ready in time")
                self._fleet.on_given_up(worker, error, time.monotonic())
                await self._order(
                    worker.node_id, DrainWorker(worker.worker_id, self._leadership.fencing_token, grace_s=0.0)
                )
                self._log.error("worker_given_up", model=worker.model, worker_id=worker.worker_id)

    async def _spawn(self, spawn: Spawn, seen_mono_ns: int) -> None:
        model, node_id = spawn.model, spawn.node_id
        worker_id = f"{model}-{secrets.token_hex(4)}"
        policy = self._config.policy_of(model)
        self._fleet.on_ordered(worker_id, model, node_id, time.monotonic(), spawn.device)
        order = SpawnWorker(
            worker_id=worker_id,
            model=model,
            fencing_token=self._leadership.fencing_token,
            max_running=policy.max_running,
            kv_budget_bytes=policy.kv_budget_bytes,
            park_after_s=policy.park_after_s,
            park=policy.park,
            device=spawn.device,
            marks={Mark.DEMAND_SEEN: seen_mono_ns, Mark.SPAWN_ORDERED: time.monotonic_ns()},
        )
        await self._order(node_id, order)
        await self._redis.publish(keys.EVENTS, codec.encode(StageEvent(model, "spawning")))
        self._log.info("spawn_ordered", model=model, worker_id=worker_id, node_id=node_id)

    async def _replace_silent(self, worker: WorkerView) -> None:
        """A worker that reports no more: its requests go elsewhere, and its agent is to end what is left of it."""
        error = ErrorInfo(ErrorCode.WORKER_FAILED, f"worker {worker.worker_id} stopped reporting and was replaced")
        self._fleet.on_given_up(worker, error, time.monotonic())
        await self._order(worker.node_id, DrainWorker(worker.worker_id, self._leadership.fencing_token, grace_s=0.0))
        released = await release_worker(self._redis, worker.model, worker.worker_id)
        self._log.error("worker_silent", model=worker.model, worker_id=worker.worker_id, requests=released)

    async def _order(self, node_id: str, order: AgentCommand) -> None:
        fields: dict[Any, Any] = {keys.FIELD: codec.encode(order)}
        await self._redis.xadd(keys.node_commands(node_id), fields, maxlen=1000, approximate=True)

    async def _publish_status(self) -> None:
        self._status_s = time.monotonic()
        reports = await self._read_worker_reports()
        for worker in self._fleet.on_reports(reports, self._status_s):
            await self._replace_silent(worker)
        status = StatusReport(
            published_at_s=time.time(),
            leader=self._scheduler_id,
            models=self._fleet.statuses(reports, self._status_s),
            nodes=tuple(self._nodes),
            workers=tuple(reports),
            swept=self._sweeper.counts,
            drained_nodes=tuple(sorted(self._drained)),
        )
        await self._redis.set(keys.STATUS, codec.encode(status), ex=keys.STATUS_TTL_S)
