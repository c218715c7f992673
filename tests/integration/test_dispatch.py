"""The control side of the queue against a real server."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from scheduler.contract import codec, job_queue, keys
from scheduler.contract.errors import ErrorCode, ErrorInfo, GlowplugError
from scheduler.contract.messages import Demand, InboxMessage
from scheduler.contract.states import Priority
from scheduler.contract.subscription import Subscription
from scheduler.dispatch import Dispatcher
from tests.eventually import eventually
from tests.queue_fixtures import MODEL, Recorder, connected, make_request, started_hub


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connected(redis_url) as client:
        yield client


@pytest.fixture
def dispatcher(redis: Redis) -> Dispatcher:
    return Dispatcher(redis)


async def test_enqueue_queues_rings_and_announces(redis: Redis, dispatcher: Dispatcher) -> None:
    """One call leaves the job, its place in the queue, a ring of the bell and a demand for the scheduler."""
    assert await dispatcher.enqueue(make_request("r1")) == 0
    assert await dispatcher.enqueue(make_request("r2")) == 1
    assert await dispatcher.queue_depths([MODEL, "other"]) == {MODEL: 2, "other": 0}
    assert await redis.xlen(keys.bell(MODEL)) == 1
    assert 0 < await redis.ttl(keys.job("r1")) <= keys.REQUEST_TTL_S
    entries = await redis.xrange(keys.INBOX)
    demands = [codec.decode(fields[keys.FIELD.encode()], InboxMessage) for _, fields in entries]
    assert [demand.request_id for demand in demands if isinstance(demand, Demand)] == ["r1", "r2"]


async def test_used_request_id_is_refused(redis: Redis, dispatcher: Dispatcher) -> None:
    """A second request under an id that is queued is refused and changes nothing."""
    await dispatcher.enqueue(make_request("r1"))
    with pytest.raises(GlowplugError, match="already in use") as caught:
        await dispatcher.enqueue(make_request("r1", prompt="another"))
    assert caught.value.info.code is ErrorCode.INVALID_REQUEST
    assert await dispatcher.queue_depth(MODEL) == 1


async def test_retried_call_is_accepted_once(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very same call again, as after a lost reply, is accepted and queues nothing twice."""
    monkeypatch.setattr("scheduler.dispatch.time.time", lambda: 1_000_000.0)
    await dispatcher.enqueue(make_request("r1"))
    await dispatcher.enqueue(make_request("r1"))
    assert await dispatcher.queue_depth(MODEL) == 1


async def test_full_queue_is_refused_with_a_hint(redis: Redis, dispatcher: Dispatcher) -> None:
    """At the limit the call is refused, says when to retry, and leaves no trace."""
    await dispatcher.enqueue(make_request("r1"), max_queued=1)
    with pytest.raises(GlowplugError, match="the limit is 1") as caught:
        await dispatcher.enqueue(make_request("r2"), max_queued=1)
    assert caught.value.info.code is ErrorCode.QUEUE_FULL
    assert caught.value.info.retry_after_s
    assert not await redis.exists(keys.job("r2"))


async def test_server_out_of_memory_is_overload(redis: Redis, dispatcher: Dispatcher) -> None:
    """A server that refuses writes gives a 503 with a hint, and nothing is half queued."""
    before = (await redis.config_get("maxmemory"))["maxmemory"]
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(GlowplugError) as caught:
            await dispatcher.enqueue(make_request("r1"))
    finally:
        await redis.config_set("maxmemory", before)
    assert caught.value.info.code is ErrorCode.OVERLOADED
    assert caught.value.info.retry_after_s
    assert await redis.keys("*") == []


async def test_interactive_is_ahead_of_batch(
    redis: Redis, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later interactive request is claimed before an earlier batch one; within a class, first come first served."""
    clock = itertools.count(1_000_000.0, 0.001)
    monkeypatch.setattr("scheduler.dispatch.time.time", lambda: next(clock))
    await dispatcher.enqueue(make_request("batch", priority=Priority.BATCH))
    await dispatcher.enqueue(make_request("b-first"))
    await dispatcher.enqueue(make_request("a-second"))
    assert await redis.zrange(keys.queue(MODEL), 0, -1) == [b"b-first", b"a-second", b"batch"]


async def claim(redis: Redis, room: int) -> list[str]:
    """Claim up to ``room`` requests, as a worker does."""
    script = redis.register_script(job_queue.CLAIM)
    found = await script(keys=[keys.queue(MODEL)], args=[2_000_000_000_000, room, 10_000, "w", 10_000])
    return [request_id.decode() for request_id in found[::3]]


async def test_tenants_share_by_weight_and_classes_do_not_mix(redis: Redis, dispatcher: Dispatcher) -> None:
    """Weight 3 gets three of four places; a batch request of an idle tenant still waits for all interactive ones."""
    await dispatcher.enqueue(make_request("batch", tenant="c", priority=Priority.BATCH))
    for i in range(40):
        await dispatcher.enqueue(make_request(f"a{i}", tenant="a"), weight=3.0)
        await dispatcher.enqueue(make_request(f"b{i}", tenant="b"), weight=1.0)
    first = await claim(redis, 40)
    assert 29 <= sum(request_id.startswith("a") for request_id in first) <= 31
    assert (await claim(redis, 41))[-1] == "batch"


async def test_idle_time_saves_up_no_share_and_leaves_no_debt(redis: Redis, dispatcher: Dispatcher) -> None:
    """When the queue has been empty all begin alike, and what tells the order is gone with its TTL."""
    for i in range(50):
        await dispatcher.enqueue(make_request(f"a{i}", tenant="a"))
        await dispatcher.cancel(f"a{i}", MODEL)
    await dispatcher.enqueue(make_request("a-new", tenant="a"))
    await dispatcher.enqueue(make_request("b-new", tenant="b"))
    assert await claim(redis, 2) == ["a-new", "b-new"]
    assert 0 < await redis.ttl(keys.fair(MODEL)) <= keys.REQUEST_TTL_S


async def test_cancel_before_start_removes_the_request(redis: Redis, dispatcher: Dispatcher) -> None:
    """A request that nobody runs is gone at once, and flagged for a run that had just been claiming it."""
    await dispatcher.enqueue(make_request("r1"))
    assert await dispatcher.cancel("r1", MODEL) is True
    assert await dispatcher.queue_depth(MODEL) == 0
    assert not await redis.exists(keys.job("r1"))
    assert await redis.exists(keys.cancelled("r1"))
    assert await dispatcher.cancel("r1", MODEL) is False


async def test_cancel_of_a_running_request_tells_its_run(redis: Redis, dispatcher: Dispatcher) -> None:
    """A running request stays queued for its owner to end, and its model's workers hear of it."""
    heard: list[bytes] = []
    control = Subscription(redis, [keys.control_channel(MODEL)], lambda _, data: heard.append(data), lambda: None)
    await control.start()
    await dispatcher.enqueue(make_request("r1"))
    await redis.set(keys.in_progress("r1"), "worker-1")
    assert await dispatcher.cancel("r1", MODEL) is False
    await eventually(lambda: heard == [b"r1"])
    assert await dispatcher.queue_depth(MODEL) == 1
    await control.aclose()


async def test_fail_queued_ends_each_waiting_request_once(redis: Redis, dispatcher: Dispatcher) -> None:
    """Every queued request gets one terminal frame with the error; a running one is left alone."""
    error = ErrorInfo(ErrorCode.WAKE_FAILED, "no memory for a worker")
    recorders = {f"r{i}": Recorder() for i in range(150)}
    async with started_hub(redis) as hub:
        for request_id, recorder in recorders.items():
            hub.open(request_id, recorder)
            await dispatcher.enqueue(make_request(request_id))
        await redis.set(keys.in_progress("r7"), "worker-1")
        assert await dispatcher.fail_queued(MODEL, error) == 149
        assert await dispatcher.fail_queued(MODEL, error) == 0
        await eventually(lambda: sum(len(recorder.terminals) for recorder in recorders.values()) >= 149)
        assert hub.statistics().open_streams == 1
    running = recorders.pop("r7")
    assert running.frames == []
    assert all([frame.error for frame in recorder.terminals] == [error] for recorder in recorders.values())
    assert await dispatcher.queue_depth(MODEL) == 1
    assert await redis.keys(keys.job("*")) == [keys.job("r7").encode()]


async def test_fail_queued_drops_a_body_that_does_not_decode(redis: Redis, dispatcher: Dispatcher) -> None:
    """A job written by somebody else cannot block the queue."""
    await redis.set(keys.job("bad"), b"\x80\x04junk")
    await redis.zadd(keys.queue(MODEL), {"bad": 1})
    assert await dispatcher.fail_queued(MODEL, ErrorInfo(ErrorCode.WAKE_FAILED, "x")) == 0
    assert await dispatcher.queue_depth(MODEL) == 0


async def test_fail_request_is_final(redis: Redis, dispatcher: Dispatcher) -> None:
    """The first terminal frame stays the only one."""
    request = make_request("r1")
    assert await dispatcher.fail_request(request, ErrorInfo(ErrorCode.WORKER_FAILED, "first")) is True
    assert await dispatcher.fail_request(request, ErrorInfo(ErrorCode.WORKER_FAILED, "second")) is False
    assert await redis.llen(keys.token_log("r1")) == 1
