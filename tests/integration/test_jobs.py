"""The claiming worker against a real server: leases, fences, cancellation, death and restart."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import GenerateRequest, RequestRecord, TerminalFrame
from scheduler.contract.states import Priority
from scheduler.dispatch import Dispatcher
from tests.eventually import eventually
from tests.queue_fixtures import (
    MODEL,
    KillableServer,
    Recorder,
    connected,
    make_request,
    make_step,
    serving_worker,
    started_hub,
)
from worker.jobs import MAX_TRIES, release_worker
from worker.publisher import Fenced, TokenPublisher


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connected(redis_url) as client:
        yield client


@pytest.fixture
def dispatcher(redis: Redis) -> Dispatcher:
    return Dispatcher(redis)


class Handler:
    """A job handler that notes what it was given and holds each run until it is let go."""

    def __init__(self, *, holds: bool = False) -> None:
        self.started: list[tuple[str, int]] = []
        self.ended: list[str] = []
        self.cancelled: list[str] = []
        self.go = asyncio.Event()
        if not holds:
            self.go.set()

    async def __call__(self, request: GenerateRequest, attempt: int) -> None:
        self.started.append((request.request_id, attempt))
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        self.ended.append(request.request_id)


async def test_request_runs_once_and_leaves_nothing_private(redis: Redis, dispatcher: Dispatcher) -> None:
    """A finished request is gone from the queue, and no key in the server holds its prompt any more."""
    handler = Handler()
    async with serving_worker(redis, handler) as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: handler.ended == ["r1"])
        await eventually(lambda: worker.num_running == 0)
    assert handler.started == [("r1", 1)]
    assert await dispatcher.queue_depth(MODEL) == 0
    of_the_queue = {key.encode() for key in (keys.bell(MODEL), keys.fair(MODEL), keys.INBOX)}
    remaining = set(await redis.keys("*")) - of_the_queue
    assert remaining == {keys.result("r1").encode()}
    assert 0 < await redis.ttl(keys.result("r1")) <= keys.RESULT_TTL_S


async def test_a_record_lives_no_longer_than_the_log_of_a_request_that_ended(
    redis: Redis, dispatcher: Dispatcher
) -> None:
    """There is nothing to come back for then; a busy server would keep an hour of them."""
    record = RequestRecord("r1", "acme", MODEL, "5ca1ab1e", "chat", "gw", ("r1",), 1, False, 1)
    handler = Handler(holds=True)
    async with serving_worker(redis, handler) as worker:
        await dispatcher.enqueue(make_request("r1"), record=record)
        await eventually(lambda: handler.started)
        assert await redis.ttl(keys.record("r1")) > keys.LOG_TTL_S
        handler.go.set()
        await eventually(lambda: worker.num_running == 0)
    assert 0 < await redis.ttl(keys.record("r1")) <= keys.LOG_TTL_S


async def test_repeated_enqueue_after_the_end_is_recognised(
    redis: Redis, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call retried after its request has already finished is accepted and does not run it again."""
    monkeypatch.setattr("scheduler.dispatch.time.time", lambda: 1_000_000.0)
    handler = Handler()
    async with serving_worker(redis, handler) as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: handler.ended == ["r1"] and worker.num_running == 0)
        await dispatcher.enqueue(make_request("r1"))
    assert await dispatcher.queue_depth(MODEL) == 0
    assert handler.started == [("r1", 1)]


async def test_interactive_runs_before_batch(redis: Redis, dispatcher: Dispatcher) -> None:
    """With room for one, waiting interactive requests run before waiting batch requests."""
    for i in range(3):
        await dispatcher.enqueue(make_request(f"batch-{i}", priority=Priority.BATCH))
    for i in range(3):
        await dispatcher.enqueue(make_request(f"now-{i}"))
    handler = Handler()
    async with serving_worker(redis, handler, room=1):
        await eventually(lambda: len(handler.ended) == 6)
    assert [request_id.split("-")[0] for request_id in handler.ended] == ["now"] * 3 + ["batch"] * 3


async def test_full_worker_does_not_starve_a_free_one(redis: Redis, dispatcher: Dispatcher) -> None:
    """300 running requests of a full worker do not hide the new ones from another worker."""
    full, free = Handler(holds=True), Handler(holds=True)
    async with serving_worker(redis, full, worker_id="full", room=300) as full_worker:
        await asyncio.gather(*(dispatcher.enqueue(make_request(f"old-{i}")) for i in range(300)))
        await eventually(lambda: full_worker.num_running == 300)
        async with serving_worker(redis, free, worker_id="free", room=10):
            await asyncio.gather(*(dispatcher.enqueue(make_request(f"new-{i}")) for i in range(10)))
            await eventually(lambda: len(free.started) == 10)
            full.go.set()
            free.go.set()
            await eventually(lambda: len(full.ended) + len(free.ended) == 310)
    assert all(request_id.startswith("new") for request_id, _ in free.started)
    assert await dispatcher.queue_depth(MODEL) == 0


async def test_competing_workers_share_without_duplicates(redis: Redis, dispatcher: Dispatcher) -> None:
    """Two workers on one queue run every request exactly once between them."""
    one, two = Handler(), Handler()
    async with serving_worker(redis, one, worker_id="one", room=3), serving_worker(redis, two, worker_id="two", room=3):
        await asyncio.gather(*(dispatcher.enqueue(make_request(f"r{i}")) for i in range(100)))
        await eventually(lambda: len(one.ended) + len(two.ended) >= 100)
    assert sorted(one.started + two.started) == sorted((f"r{i}", 1) for i in range(100))


async def test_room_and_pause_bound_what_is_claimed(redis: Redis, dispatcher: Dispatcher) -> None:
    """Room is an upper bound; a paused worker finishes what it has and claims nothing, which is left for another."""
    handler, other = Handler(holds=True), Handler()
    for i in range(5):
        await dispatcher.enqueue(make_request(f"r{i}"))
    async with serving_worker(redis, handler, room=3) as worker:
        await eventually(lambda: worker.num_running == 3)
        worker.pause_claims()
        handler.go.set()
        await eventually(lambda: len(handler.ended) == 3 and worker.num_running == 0)
        async with serving_worker(redis, other, worker_id="w2"):
            await eventually(lambda: len(other.ended) == 2)
    assert len(handler.started) == 3


async def test_cancel_ends_a_run_and_the_request(redis: Redis, dispatcher: Dispatcher) -> None:
    """The client went away: the run is cancelled, and the request does not run again."""
    handler = Handler(holds=True)
    async with serving_worker(redis, handler) as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: handler.started)
        await eventually(lambda: _is_listened_to(redis), what="a worker that hears of cancellations")
        assert await dispatcher.cancel("r1", MODEL) is False
        await eventually(lambda: handler.cancelled == ["r1"] and worker.num_running == 0)
        assert await dispatcher.queue_depth(MODEL) == 0
    assert handler.started == [("r1", 1)]


async def test_cancel_missed_by_a_cut_connection_is_found(redis: Redis, dispatcher: Dispatcher) -> None:
    """A cancellation published while the control connection was down is read when it is up again."""
    handler = Handler(holds=True)
    async with serving_worker(redis, handler) as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: handler.started)
        await redis.set(keys.cancelled("r1"), "1")  # as if its message had been lost
        await eventually(lambda: redis.client_kill_filter(_type="pubsub"))
        await eventually(lambda: handler.cancelled == ["r1"] and worker.num_running == 0)


async def test_handler_fault_reaches_the_client(redis: Redis, dispatcher: Dispatcher) -> None:
    """A handler that raises ends its request with one error frame instead of leaving the client waiting."""

    async def handler(request: GenerateRequest, attempt: int) -> None:
        raise ZeroDivisionError(request.prompt)

    recorder = Recorder()
    async with started_hub(redis) as hub, serving_worker(redis, handler):
        hub.open("r1", recorder)
        await dispatcher.enqueue(make_request("r1"))
        frame = (await eventually(lambda: recorder.terminals))[0]
        assert frame.error is not None
        assert frame.error.code is ErrorCode.INTERNAL
        assert "secret" not in frame.error.message
        await eventually(lambda: _is_empty(dispatcher))


async def test_poison_request_ends_with_an_error(redis: Redis, dispatcher: Dispatcher) -> None:
    """A request whose every run died is not tried for ever: its client is told, no run writes to it any more."""
    await dispatcher.enqueue(make_request("r1"))
    await redis.set(keys.retry("r1"), MAX_TRIES)
    handler, recorder = Handler(), Recorder()
    async with started_hub(redis) as hub, serving_worker(redis, handler):
        hub.open("r1", recorder)
        frame = (await eventually(lambda: recorder.terminals))[0]
        await eventually(lambda: _is_empty(dispatcher))
    assert frame.error is not None
    assert frame.error.code is ErrorCode.WORKER_FAILED
    assert handler.started == []


async def test_pickled_job_is_refused_unread(redis: Redis, dispatcher: Dispatcher, tmp_path: Path) -> None:
    """Whoever can write to Redis still cannot make a worker run code."""
    trap = tmp_path / "trap"

    class Exploit:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(trap),))

    await redis.set(keys.job("evil"), pickle.dumps(Exploit()))
    await redis.set(keys.job("wrong"), msgspec.msgpack.encode({"f": "generate", "a": [b"?"], "k": {}, "t": 1, "et": 1}))
    await redis.zadd(keys.queue(MODEL), {"evil": 1, "wrong": 2})
    handler = Handler()
    async with serving_worker(redis, handler):
        await dispatcher.enqueue(make_request("good"))
        await eventually(lambda: handler.ended == ["good"])
        await eventually(lambda: _is_empty(dispatcher))
    assert not trap.exists()
    for request_id in ("evil", "wrong"):  # whoever waits for them is told
        (data,) = await redis.lrange(keys.token_log(request_id), 0, -1)
        frame = codec.decode_frame(data)
        assert isinstance(frame, TerminalFrame)
        assert frame.error is not None
        assert frame.error.code is ErrorCode.INTERNAL


async def test_lost_lease_stops_the_run_and_cannot_finish_it(redis: Redis, dispatcher: Dispatcher) -> None:
    """A run whose lease another worker holds is cancelled, and the request stays for that worker."""
    handler = Handler(holds=True)
    async with serving_worker(redis, handler, lease_s=0.4) as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: handler.started)
        await redis.set(keys.in_progress("r1"), "another", px=60_000)
        await eventually(lambda: handler.cancelled == ["r1"] and worker.num_running == 0)
    assert await redis.get(keys.in_progress("r1")) == b"another"
    assert await redis.exists(keys.job("r1"))
    assert await dispatcher.queue_depth(MODEL) == 1


async def test_run_that_finished_without_its_lease_does_not_delete_the_request(
    redis: Redis, dispatcher: Dispatcher
) -> None:
    """The end of a run that was overtaken unnoticed changes nothing either."""
    handler = Handler(holds=True)
    async with serving_worker(redis, handler) as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: handler.started)
        await redis.set(keys.in_progress("r1"), "another", px=60_000)
        handler.go.set()
        await eventually(lambda: handler.ended == ["r1"] and worker.num_running == 0)
    assert await redis.exists(keys.job("r1"))
    assert await redis.get(keys.in_progress("r1")) == b"another"


async def test_expired_lease_is_taken_again(redis: Redis, dispatcher: Dispatcher) -> None:
    """A lease that ran out and that nobody took is renewed; the run goes on and is not started twice."""
    handler = Handler(holds=True)
    async with serving_worker(redis, handler, lease_s=0.4):
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: handler.started)
        await redis.delete(keys.in_progress("r1"))
        await eventually(lambda: redis.exists(keys.in_progress("r1")))
        handler.go.set()
        await eventually(lambda: _is_empty(dispatcher))
    assert handler.started == [("r1", 1)]


async def test_zombie_run_is_fenced_and_saves_nothing(redis: Redis, dispatcher: Dispatcher) -> None:
    """A run that was overtaken writes no frame, and its end leaves the request to the newer run."""
    publisher = TokenPublisher(redis)
    raised: list[str] = []
    proceed = asyncio.Event()

    async def zombie(request: GenerateRequest, attempt: int) -> None:
        run = await publisher.begin(request, attempt)
        await proceed.wait()
        publisher.publish([("r1", make_step(0))])
        try:
            await publisher.wait_logged(run)
        except Fenced:
            raised.append(request.request_id)
            raise

    async with serving_worker(redis, zombie) as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: redis.exists(keys.fence("r1")))
        newer = TokenPublisher(redis)
        await newer.begin(make_request("r1"), 2)
        await redis.set(keys.in_progress("r1"), "another", px=60_000)
        proceed.set()
        await eventually(lambda: raised == ["r1"] and worker.num_running == 0)
        await newer.aclose()
    await publisher.aclose()
    assert await redis.llen(keys.token_log("r1")) == 0
    assert await redis.exists(keys.job("r1"))


async def test_drain_waits_and_close_gives_back(redis: Redis, dispatcher: Dispatcher) -> None:
    """Draining claims nothing more; what does not end in time runs again elsewhere at once, as the next attempt."""
    handler, standby = Handler(holds=True), Handler()
    async with serving_worker(redis, handler, worker_id="leaving") as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: handler.started)
        assert await worker.drain(0.05) is False
        await dispatcher.enqueue(make_request("r2"))
        await worker.aclose()
    async with serving_worker(redis, standby, worker_id="standby"):
        await eventually(lambda: len(standby.ended) == 2)
    assert handler.cancelled == ["r1"]
    assert handler.started == [("r1", 1)]
    assert sorted(standby.started) == [("r1", 2), ("r2", 1)]


async def test_drain_of_finishing_runs_is_complete(redis: Redis, dispatcher: Dispatcher) -> None:
    """When everything ends within the grace time, draining says so."""
    handler = Handler(holds=True)
    async with serving_worker(redis, handler) as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: handler.started)
        asyncio.get_running_loop().call_later(0.02, handler.go.set)
        assert await worker.drain(10.0) is True
        assert worker.num_running == 0


_DOOMED = """
import asyncio, sys
from scheduler.contract.connection import connect
from worker.jobs import ClaimingWorker

async def handler(request, attempt):
    print("started", request.request_id, flush=True)
    await asyncio.sleep(3600)

async def main():
    worker = ClaimingWorker(connect(sys.argv[1]), model=sys.argv[2], worker_id="doomed", handler=handler, room=4)
    await worker.serve()

asyncio.run(main())
"""


async def test_killed_worker_process_is_replaced_at_once(redis: Redis, dispatcher: Dispatcher, redis_url: str) -> None:
    """kill -9 of a worker, then release by whoever saw it exit: a standby runs its requests without waiting a lease."""
    for i in range(3):
        await dispatcher.enqueue(make_request(f"r{i}"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _DOOMED, redis_url, MODEL, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(3):
        assert (await process.stdout.readline()).startswith(b"started")
    process.kill()
    await process.wait()
    standby = Handler()
    async with serving_worker(redis, standby, worker_id="standby"):
        assert standby.started == []
        assert await release_worker(redis, MODEL, "doomed") == 3
        await eventually(lambda: len(standby.ended) == 3, within_s=12.0)  # a lease lasts 15 s
    assert sorted(standby.started) == [(f"r{i}", 2) for i in range(3)]
    assert await release_worker(redis, MODEL, "doomed") == 0


@pytest.fixture
def server(short_tmp_path: Path) -> Iterator[KillableServer]:
    killable = KillableServer(short_tmp_path)
    yield killable
    killable.stop()


async def test_running_and_new_requests_survive_a_server_restart(server: KillableServer) -> None:
    """kill -9 of the server: what runs ends normally, what comes later runs, nothing runs twice."""
    async with connected(server.url) as redis:
        dispatcher, handler = Dispatcher(redis), Handler(holds=True)
        async with serving_worker(redis, handler):
            await dispatcher.enqueue(make_request("before"))
            await eventually(lambda: handler.started)
            server.kill()
            await asyncio.to_thread(server.restart)
            await dispatcher.enqueue(make_request("after"))
            await eventually(lambda: len(handler.started) == 2)
            handler.go.set()
            await eventually(lambda: len(handler.ended) == 2)
            await eventually(lambda: _is_empty(dispatcher))
    assert sorted(handler.started) == [("after", 1), ("before", 1)]


async def test_worker_survives_a_server_out_of_memory(redis: Redis, dispatcher: Dispatcher) -> None:
    """Claims that the server refuses are tried again until they succeed."""
    await dispatcher.enqueue(make_request("r1"))
    before = (await redis.config_get("maxmemory"))["maxmemory"]
    await redis.config_resetstat()
    await redis.config_set("maxmemory", "1")
    handler = Handler()
    try:
        async with serving_worker(redis, handler) as worker:
            await eventually(lambda: _count_refused(redis))
            assert worker.num_running == 0
            await redis.config_set("maxmemory", before)
            await eventually(lambda: handler.ended == ["r1"])
    finally:
        await redis.config_set("maxmemory", before)


async def test_request_that_has_a_terminal_frame_stays_ended(redis: Redis, dispatcher: Dispatcher) -> None:
    """A run of a request that had finished (its worker died just before telling the queue) sees so in the log."""
    publisher = TokenPublisher(redis)
    request = make_request("r1")
    run = await publisher.begin(request, 1)
    publisher.publish([("r1", make_step(0)), ("r1", TerminalFrame())])
    await publisher.wait_logged(run)
    publisher.end(run)
    again = await publisher.begin(request, 2)
    assert again.is_finished
    assert [type(frame).__name__ for frame in again.decode_frames()] == ["StepFrame", "TerminalFrame"]
    publisher.publish([("r1", make_step(1))])
    await publisher.wait_logged(again)
    await publisher.aclose()
    assert await redis.llen(keys.token_log("r1")) == 2
    assert codec.is_terminal((await redis.lrange(keys.token_log("r1"), -1, -1))[0])


async def _is_listened_to(redis: Redis) -> bool:
    ((_, num_listeners),) = await redis.pubsub_numsub(keys.control_channel(MODEL))
    return bool(num_listeners)


async def _is_empty(dispatcher: Dispatcher) -> bool:
    return await dispatcher.queue_depth(MODEL) == 0


async def _count_refused(redis: Redis) -> int:
    errors = await redis.info("errorstats")
    return int(errors.get("errorstat_OOM", {}).get("count", 0))


@pytest.mark.parametrize("step_s", [-2 * 86_400.0, 2 * 86_400.0])
async def test_a_wall_clock_that_steps_changes_nothing(
    redis: Redis, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    """A worker whose clock is days off takes what is queued, in its order; leases and tries do not look at it."""
    handler = Handler()
    await dispatcher.enqueue(make_request("r1"))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + step_s)
    await dispatcher.enqueue(make_request("r2"))
    async with serving_worker(redis, handler, room=1):
        await eventually(lambda: handler.ended == ["r1", "r2"], what="both ended, oldest first")
