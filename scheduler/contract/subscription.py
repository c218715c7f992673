"""A pub/sub subscription that never ends by itself: it reconnects, resubscribes and says so."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

_log = structlog.get_logger()

#: A silent connection is asked for a sign of life after this long, and given up after as long again.
PING_AFTER_S: Final = 10.0
RECONNECT_BASE_S: Final = 0.01
RECONNECT_CAP_S: Final = 0.25


class Subscription:
    """Calls ``on_message(channel, data)`` in the loop for every message on ``channels``.

    Its own connection, made as ``redis`` makes its own (unix socket, TCP, TLS, credentials, database alike).
    ``on_subscribed`` runs after each subscribe: what was published before it and after the last message is lost, and
    the owner must look elsewhere for it. Callbacks must not raise or block.
    """

    def __init__(
        self,
        redis: Redis,
        channels: list[str],
        on_message: Callable[[str, bytes], None],
        on_subscribed: Callable[[], None],
    ) -> None:
        self._pool = redis.connection_pool
        self._channels = channels
        self._names = {channel.encode(): channel for channel in channels}
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._subscribed = asyncio.Event()
        self._num_subscribes = 0
        self._lost_mono_s: float | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def num_reconnects(self) -> int:
        """How often the connection was lost and made again."""
        return max(0, self._num_subscribes - 1)

    @property
    def lost_for_s(self) -> float:
        """How long there has been no subscription; 0 while there is one."""
        return 0.0 if self._lost_mono_s is None else time.monotonic() - self._lost_mono_s

    async def start(self) -> None:
        """Start listening and wait until subscribed for the first time."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"subscription {self._channels}")
        await self._subscribed.wait()

    async def aclose(self) -> None:
        """Stop and disconnect. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        delay_s = RECONNECT_BASE_S
        while True:
            connection: Any = self._pool.connection_class(**self._pool.connection_kwargs)
            num_subscribes = self._num_subscribes
            try:
                await connection.connect()
                await connection.send_command("SUBSCRIBE", *self._channels)
                await self._listen(connection)
            except (RedisError, OSError) as error:
                _log.warning("subscription_lost", channels=self._channels, error=str(error))
            finally:
                if self._lost_mono_s is None:
                    self._lost_mono_s = time.monotonic()
                await connection.disconnect(nowait=True)
            if self._num_subscribes > num_subscribes:
                delay_s = RECONNECT_BASE_S
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # not all at the same instant
            delay_s = min(delay_s * 2, RECONNECT_CAP_S)

    async def _listen(self, connection: Any) -> None:
        awaiting = len(self._channels)
        pinged = False
        while True:
            reply = await connection.read_response(disable_decoding=True, timeout=PING_AFTER_S)
            if reply is None:
                if pinged:
                    raise OSError(f"no sign of life for {2 * PING_AFTER_S:g} s")
                await connection.send_command("PING", check_health=False)
                pinged = True
                continue
            pinged = False
            if reply[0] == b"message":
                self._on_message(self._names[reply[1]], reply[2])
            elif reply[0] == b"subscribe":
                awaiting -= 1
                if awaiting == 0:
                    self._num_subscribes += 1
                    self._lost_mono_s = None
                    self._on_subscribed()
                    self._subscribed.set()
