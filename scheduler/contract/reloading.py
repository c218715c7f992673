"""``config reload`` for every process that reads the file: an order on one channel, and who followed it.

Whoever gives the order publishes it and reads the answers from a hash of its own. Gateways, schedulers (standbys too)
and agents listen; one that was cut off from Redis just then, or hangs, stays silent, and is named as such.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.contract import codec, keys
from scheduler.contract.environment import SettingsError
from scheduler.contract.errors import ContractError
from scheduler.contract.subscription import Subscription

GATEWAY, SCHEDULER, AGENT = "gateway", "scheduler", "agent"
ANSWER_TTL_S: Final = 60
WAIT_S: Final = 3.0
LOOK_EVERY_S: Final = 0.05

_log = structlog.get_logger()

#: Reads the file again; names of the settings in it that hold only after a restart. Raises SettingsError.
Reload = Callable[[], Awaitable[tuple[str, ...]]]


class ReloadOrder(msgspec.Struct, frozen=True):
    """Read the configuration again, and answer under ``order_id``."""

    order_id: str


class ReloadAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one process made of an order. ``error``: the file cannot be used, and nothing changed there."""

    part: str
    member: str
    error: str = ""
    needs_restart: tuple[str, ...] = ()


class ReloadOutcome(msgspec.Struct, frozen=True):
    """All answers to an order; ``silent`` did not answer in time."""

    reloaded: tuple[ReloadAnswer, ...]
    failed: tuple[ReloadAnswer, ...]
    silent: tuple[ReloadAnswer, ...]


class ReloadListener:
    """Follows the orders of one process. Event loop only. ``redis`` stays the caller's."""

    def __init__(self, redis: Redis, part: str, member: str, reload: Reload) -> None:
        self._redis: Any = redis  # redis-py types each reply as sync-or-async
        self._part = part
        self._member = member
        self._reload = reload
        self._subscription = Subscription(redis, [keys.CONTROL], self._on_message, lambda: None)
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        """Begin to listen; returns at once."""
        self._run(self._subscription.start())

    async def aclose(self) -> None:
        """Stop listening. Idempotent."""
        await self._subscription.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reload_in_background(self) -> None:
        """Reload without an order, for a signal handler; what is wrong goes to the log."""
        self._run(self.reload())

    async def reload(self) -> ReloadAnswer:
        """Reload and say what came of it; never raises but for bugs."""
        try:
            needs_restart = await self._reload()
        except SettingsError as error:
            _log.error("config_not_reloaded", error=str(error))
            return ReloadAnswer(self._part, self._member, str(error))
        _log.info("config_reloaded", needs_restart=needs_restart)
        return ReloadAnswer(self._part, self._member, needs_restart=needs_restart)

    def _on_message(self, _channel: str, data: bytes) -> None:
        try:
            order: ReloadOrder = codec.decode(data, ReloadOrder)
        except ContractError as error:
            _log.error("control_message_refused", error=str(error))
            return
        self._run(self._follow(order))

    async def _follow(self, order: ReloadOrder) -> None:
        answer = await self.reload()
        name = keys.reload_answers(order.order_id)
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hset(name, f"{answer.part}:{answer.member}", codec.encode(answer))
                pipeline.expire(name, ANSWER_TTL_S)
                await pipeline.execute()
        except (RedisError, OSError) as error:  # whoever asked sees that nobody answered
            _log.warning("reload_not_answered", error=str(error))

    def _run(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def order_reload(redis: Redis, *, wait_s: float = WAIT_S) -> ReloadOutcome:
    """Have every process reload; waits at most ``wait_s`` for those that are known to live.

    Raises:
        RedisError: the server is away.
    """
    client: Any = redis  # redis-py types each reply as sync-or-async
    expected = await _list_members(client)
    order = ReloadOrder(secrets.token_hex(8))
    await client.publish(keys.CONTROL, codec.encode(order))
    deadline_s = asyncio.get_running_loop().time() + wait_s
    while True:
        raw = await client.hgetall(keys.reload_answers(order.order_id))
        answers: list[ReloadAnswer] = [codec.decode(data, ReloadAnswer) for data in raw.values()]
        missing = expected - {(answer.part, answer.member) for answer in answers}
        if not missing or asyncio.get_running_loop().time() >= deadline_s:
            break
        await asyncio.sleep(LOOK_EVERY_S)
    answers.sort(key=lambda answer: (answer.part, answer.member))
    return ReloadOutcome(
        tuple(answer for answer in answers if not answer.error),
        tuple(answer for answer in answers if answer.error),
        tuple(ReloadAnswer(part, member) for part, member in sorted(missing)),
    )


async def _list_members(redis: Any) -> set[tuple[str, str]]:
    """Part and id of every process that has shown a sign of life."""
    members = set()
    for part, listed, sign_of in ((GATEWAY, keys.GATEWAYS, keys.gateway_alive), (AGENT, keys.NODES, keys.node)):
        for name in [raw.decode() for raw in await redis.smembers(listed)]:
            if await redis.exists(sign_of(name)):
                members.add((part, name))
    leader = await redis.get(keys.LEADER)
    if leader is not None:
        members.add((SCHEDULER, leader.decode()))
    return members
