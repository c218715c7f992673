"""The sweeper against a real server: each thing that can fall between the parts is found at the second look."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.contract import codec, keys, token_log
from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import TerminalFrame
from scheduler.dispatch import Dispatcher
from scheduler.sweeper import Sweeper
from tests.queue_fixtures import GATEWAY, MODEL, connected, make_request, make_step


class Desk:
    """A sweeper with what it works on."""

    def __init__(self, redis: Any, grace_s: float = 60.0) -> None:
        self.redis = redis
        self.dispatcher = Dispatcher(redis)
        self.sweeper = Sweeper(redis, self.dispatcher, grace_s)

    async def sweep(self, times: int = 2) -> dict[str, int]:
        for _ in range(times):
            await self.sweeper.sweep([MODEL])
        return self.sweeper.counts

    async def end_of(self, request_id: str) -> TerminalFrame | None:
        frames = [codec.decode_frame(data) for data in await self.redis.lrange(keys.token_log(request_id), 0, -1)]
        assert sum(isinstance(frame, TerminalFrame) for frame in frames) <= 1
        return frames[-1] if frames and isinstance(frames[-1], TerminalFrame) else None


async def test_a_request_that_waited_too_long_ends_with_an_error(redis_url: str) -> None:
    """Its body has expired: one look does nothing, the second ends it and empties its place."""
    async with connected(redis_url) as redis:
        desk = Desk(redis)
        await desk.dispatcher.enqueue(make_request("r1"))
        await redis.delete(keys.job("r1"))
        assert await desk.sweep(1) == {}
        assert (await desk.sweep(1))["expired_requests"] == 1
        end = await desk.end_of("r1")
        assert end is not None
        assert end.error is not None
        assert (end.error.code, "3600 s" in end.error.message) == (ErrorCode.OVERLOADED, True)
        assert await desk.dispatcher.queue_depth(MODEL) == 0


async def test_a_lease_of_no_worker_is_released_and_one_of_a_living_worker_is_not(redis_url: str) -> None:
    """A worker that reports keeps its requests."""
    async with connected(redis_url) as redis:
        desk = Desk(redis)
        for request_id, owner in (("r1", "dead"), ("r2", "living")):
            await desk.dispatcher.enqueue(make_request(request_id))
            await redis.set(keys.in_progress(request_id), owner, px=60_000)
        await redis.set(keys.worker("living"), b"report", ex=60)
        assert (await desk.sweep())["dead_leases"] == 1
        assert await redis.exists(keys.in_progress("r1")) == 0
        assert await redis.exists(keys.in_progress("r2")) == 1


@pytest.mark.parametrize("is_registered", [True, False])
async def test_requests_of_a_dead_gateway_are_cancelled_after_the_grace(redis_url: str, is_registered: bool) -> None:
    """Not those of a living one, nor of a program that never said it is a gateway."""
    async with connected(redis_url) as redis:
        desk = Desk(redis, grace_s=1e-9)
        if is_registered:
            await redis.sadd(keys.GATEWAYS, GATEWAY)  # type: ignore[misc]
        await redis.set(keys.gateway_alive(GATEWAY), b"1")
        await desk.dispatcher.enqueue(make_request("r1"))
        assert "unheard_requests" not in await desk.sweep()
        await redis.delete(keys.gateway_alive(GATEWAY))
        assert (await desk.sweep()).get("unheard_requests", 0) == int(is_registered)
        assert (await desk.end_of("r1") is not None) == is_registered


async def test_a_request_that_another_gateway_resumed_is_heard_until_that_leaves(redis_url: str) -> None:
    """The listener's key decides, not who took the request."""
    async with connected(redis_url) as redis:
        desk = Desk(redis, grace_s=1e-9)
        await redis.sadd(keys.GATEWAYS, GATEWAY, "other")  # type: ignore[misc]
        await redis.set(keys.gateway_alive("other"), b"1", ex=60)
        await desk.dispatcher.enqueue(make_request("r1"))
        await redis.set(keys.listener("r1"), f"other{keys.LISTENER_MARK}1")
        assert "unheard_requests" not in await desk.sweep()
        assert await desk.dispatcher.cancel("r1", MODEL, GATEWAY) is False, "it is not its client any more"
        await redis.delete(keys.listener("r1"))
        assert (await desk.sweep())["unheard_requests"] == 1


async def test_a_log_without_end_or_job_is_ended(redis_url: str) -> None:
    """Whoever listens to it gets a clear error instead of silence."""
    async with connected(redis_url) as redis:
        desk = Desk(redis)
        await redis.rpush(keys.token_log("r1"), codec.encode_frame(make_step(0)))  # type: ignore[misc]
        await redis.expire(keys.token_log("r1"), 60)
        assert (await desk.sweep())["logs_without_end"] == 1
        end = await desk.end_of("r1")
        assert end is not None
        assert end.error is not None


async def test_keys_without_ttl_or_owner_are_found(redis_url: str) -> None:
    """Ours get a TTL; what nobody knows is counted and left alone; a set's dead members go."""
    async with connected(redis_url) as redis:
        desk = Desk(redis)
        await redis.set(keys.fence("r1"), 1)
        await redis.set("gp:nobody", b"?")
        await redis.set("somebody-elses", b"!")
        await redis.sadd(keys.NODES, "gone")  # type: ignore[misc]
        await redis.set(keys.node_commands("gone"), b"orders")
        counts = await desk.sweep()
        assert (counts["keys_without_ttl"], counts["keys_without_owner"], counts["gone_nodes"]) == (1, 1, 1)
        assert await redis.ttl(keys.fence("r1")) > 0
        assert await redis.exists("gp:nobody", "somebody-elses", keys.node_commands("gone")) == 2


async def test_a_whole_request_leaves_only_keys_with_a_ttl_or_an_owner(redis_url: str) -> None:
    """From enqueue to cancel, nothing that the sweeper would have to mend."""
    async with connected(redis_url) as redis:
        desk = Desk(redis)
        await desk.dispatcher.enqueue(make_request("r1"))
        await desk.dispatcher.enqueue(make_request("r2"))
        await desk.dispatcher.cancel("r1", MODEL)
        await token_log.end_log(redis, "r2", GATEWAY, TerminalFrame())
        counts = await desk.sweep(3)
        assert not counts.keys() & {"keys_without_ttl", "keys_without_owner"}
