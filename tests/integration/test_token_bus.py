"""Publisher, token log and hub together against a real server: every stream exact, whatever breaks in between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from scheduler.contract import codec, keys, token_log
from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import GenerateRequest, StageEvent, StepFrame, TerminalFrame, Usage
from scheduler.contract.subscription import Subscription
from scheduler.dispatch import Dispatcher
from tests.eventually import eventually
from tests.queue_fixtures import (
    GATEWAY,
    MODEL,
    KillableServer,
    Recorder,
    connected,
    make_request,
    make_step,
    serving_worker,
    started_hub,
)
from worker.publisher import MAX_MESSAGE_BYTES, Fenced, TokenPublisher

CHANNEL = keys.gateway_channel(GATEWAY)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connected(redis_url) as client:
        yield client


@pytest.fixture
async def publisher(redis: Redis) -> AsyncIterator[TokenPublisher]:
    made = TokenPublisher(redis)
    yield made
    await made.aclose()


@pytest.fixture
def server(short_tmp_path: Path) -> Iterator[KillableServer]:
    killable = KillableServer(short_tmp_path)
    yield killable
    killable.stop()


async def test_frames_arrive_once_in_order_and_are_logged(redis: Redis, publisher: TokenPublisher) -> None:
    """Undisturbed, every frame comes as a live message, and the log holds the same."""
    recorder = Recorder()
    async with started_hub(redis, silence_s=60.0) as hub:
        hub.open("r1", recorder)
        run = await publisher.begin(make_request("r1"), 1)
        for i in range(50):
            publisher.publish([("r1", make_step(i))])
        publisher.publish([("r1", TerminalFrame(usage=Usage(3, 50)))])
        await publisher.wait_logged(run)
        assert run.published_mono_ns is not None
        await eventually(lambda: recorder.terminals)
        statistics = hub.statistics()
    assert recorder.numbers == list(range(50))
    assert recorder.terminals == [TerminalFrame(usage=Usage(3, 50))]
    assert (statistics.live, statistics.filled, statistics.open_streams) == (51, 0, 0)
    assert await redis.llen(keys.token_log("r1")) == 51
    assert 0 < await redis.ttl(keys.token_log("r1")) <= keys.LOG_TTL_S


async def test_one_step_of_many_requests_is_one_message_each_gateway(redis: Redis, publisher: TokenPublisher) -> None:
    """A step's frames go out together, grouped by gateway."""
    requests = [make_request(f"r{i}", gateway_id=GATEWAY if i % 2 else "gateway-2") for i in range(10)]
    runs = [await publisher.begin(request, 1) for request in requests]
    publisher.publish([(request.request_id, make_step(0)) for request in requests])
    for run in runs:
        await publisher.wait_logged(run)
    statistics = publisher.statistics()
    assert (statistics.messages, statistics.frames_logged, statistics.backlog_bytes) == (2, 10, 0)


async def test_big_steps_are_split(redis: Redis, publisher: TokenPublisher) -> None:
    """No message grows past the size that a slow subscriber's limit counts, and nothing is lost by splitting."""
    sizes: list[int] = []
    spy = Subscription(redis, [CHANNEL], lambda _, data: sizes.append(len(data)), lambda: None)
    await spy.start()
    recorders = {f"r{i}": Recorder() for i in range(40)}
    async with started_hub(redis) as hub:
        for request_id, recorder in recorders.items():
            hub.open(request_id, recorder)
            await publisher.begin(make_request(request_id), 1)
        for i in range(3):
            publisher.publish([(request_id, make_step(i, "x" * 1000)) for request_id in recorders])
        await eventually(lambda: all(recorder.numbers == [0, 1, 2] for recorder in recorders.values()))
    await spy.aclose()
    assert len(sizes) > 5
    assert max(sizes) <= MAX_MESSAGE_BYTES


async def test_later_attempt_reads_the_log_and_fences_the_earlier(redis: Redis) -> None:
    """The newer run gets the frames so far; the older one can write nothing from then on, and is told."""
    fenced: list[str] = []
    old, new = TokenPublisher(redis, fenced.append), TokenPublisher(redis)
    request = make_request("r1")
    run = await old.begin(request, 1)
    old.publish([("r1", make_step(0)), ("r1", make_step(1))])
    await old.wait_logged(run)
    newer = await new.begin(request, 2)
    assert newer.decode_frames() == [make_step(0), make_step(1)]
    old.publish([("r1", make_step(99))])
    with pytest.raises(Fenced):
        await old.wait_logged(run)
    assert fenced == ["r1"]
    new.publish([("r1", make_step(2))])
    await new.wait_logged(newer)
    with pytest.raises(Fenced):
        await old.begin(request, 1)
    logged = [codec.decode_frame(data) for data in await redis.lrange(keys.token_log("r1"), 0, -1)]
    assert logged == [make_step(0), make_step(1), make_step(2)]
    await old.aclose()
    await new.aclose()


async def test_refused_run_does_not_hold_up_its_neighbours(redis: Redis, publisher: TokenPublisher) -> None:
    """When one request of a step is fenced, the others' frames still arrive without waiting for silence."""
    recorder = Recorder()
    async with started_hub(redis, silence_s=60.0) as hub:
        hub.open("good", recorder)
        await publisher.begin(make_request("good"), 1)
        await publisher.begin(make_request("zombie"), 1)
        await redis.set(keys.fence("zombie"), 2)
        publisher.publish([("zombie", make_step(7)), ("good", make_step(0))])
        await eventually(lambda: recorder.numbers == [0])
    assert await redis.llen(keys.token_log("zombie")) == 0


async def test_cancelled_request_is_seen_when_its_run_begins(redis: Redis, publisher: TokenPublisher) -> None:
    """A client that went away while the request was being claimed costs no tokens."""
    await Dispatcher(redis).cancel("r1", MODEL)
    assert (await publisher.begin(make_request("r1"), 1)).is_cancelled
    assert not (await publisher.begin(make_request("r2"), 1)).is_cancelled


async def test_frames_of_unknown_and_ended_runs_are_dropped(redis: Redis, publisher: TokenPublisher) -> None:
    """The engine may still step a request that was ended a moment ago."""
    run = await publisher.begin(make_request("r1"), 1)
    publisher.end(run)
    publisher.publish([("r1", make_step(0)), ("never", make_step(0))])
    assert publisher.statistics().backlog_bytes == 0
    assert await redis.llen(keys.token_log("r1")) == 0


async def test_slow_server_coalesces_and_pushes_back(server: KillableServer) -> None:
    """While the server stands still, frames are kept up to a bound, the engine is asked to pause, all arrive later."""
    recorder = Recorder()
    async with connected(server.url) as redis, started_hub(redis) as hub:
        publisher = TokenPublisher(redis, max_backlog_bytes=20_000)
        hub.open("r1", recorder)
        run = await publisher.begin(make_request("r1"), 1)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            number = 0
            while publisher.room.is_set():
                publisher.publish([("r1", make_step(number))])
                number += 1
                assert number < 5000
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await publisher.wait_logged(run)
        assert publisher.room.is_set()
        assert publisher.statistics().messages < number / 10
        await eventually(lambda: recorder.numbers == list(range(number)))
        await publisher.aclose()


@pytest.mark.parametrize("also_fence", [False, True], ids=["log tail", "log tail and fence"])
async def test_run_repairs_what_the_server_lost(redis: Redis, publisher: TokenPublisher, also_fence: bool) -> None:
    """A server that came back without the end of a log gets it back from the run that wrote it."""
    recorder = Recorder()
    async with started_hub(redis, silence_s=60.0) as hub:
        hub.open("r1", recorder)
        run = await publisher.begin(make_request("r1"), 1)
        publisher.publish([("r1", make_step(i)) for i in range(10)])
        await publisher.wait_logged(run)
        await redis.ltrim(keys.token_log("r1"), 0, 4)
        if also_fence:
            await redis.delete(keys.fence("r1"))
        publisher.publish([("r1", make_step(10))])
        await publisher.wait_logged(run)
        await eventually(lambda: recorder.numbers == list(range(11)))
    assert publisher.statistics().repairs == 1
    assert await redis.llen(keys.token_log("r1")) == 11


async def test_fenced_run_does_not_repair(redis: Redis, publisher: TokenPublisher) -> None:
    """A zombie that finds the log shorter than it remembers keeps its memories to itself."""
    run = await publisher.begin(make_request("r1"), 1)
    publisher.publish([("r1", make_step(i)) for i in range(4)])
    await publisher.wait_logged(run)
    await redis.ltrim(keys.token_log("r1"), 0, 1)
    await redis.set(keys.fence("r1"), 2)
    publisher.publish([("r1", make_step(4))])
    with pytest.raises(Fenced):
        await publisher.wait_logged(run)
    assert await redis.llen(keys.token_log("r1")) == 2


async def test_gateway_gives_back_what_its_client_has_seen(redis: Redis, publisher: TokenPublisher) -> None:
    """Log tail and worker lost together: the gateway restores the log, and the next attempt goes on from there."""
    recorder = Recorder()
    async with started_hub(redis, silence_s=0.05) as hub:
        hub.open("r1", recorder)
        run = await publisher.begin(make_request("r1"), 1)
        publisher.publish([("r1", make_step(i)) for i in range(6)])
        await eventually(lambda: recorder.numbers == list(range(6)))
        publisher.end(run)
        await redis.ltrim(keys.token_log("r1"), 0, 2)
        await eventually(lambda: _has_length(redis, "r1", 6))
        await eventually(lambda: hub.statistics().repaired == 1)
    assert len((await publisher.begin(make_request("r1"), 2)).frames) == 6


async def test_raising_callback_hurts_only_its_own_stream(redis: Redis, publisher: TokenPublisher) -> None:
    """One client's sink that raises is closed; the streams beside it in the same message go on."""
    calls: list[int] = []

    def broken(frame: StepFrame | TerminalFrame) -> None:
        calls.append(1)
        raise OSError("client gone")

    recorder = Recorder()
    async with started_hub(redis) as hub:
        hub.open("bad", broken)
        hub.open("good", recorder)
        await publisher.begin(make_request("bad"), 1)
        await publisher.begin(make_request("good"), 1)
        for i in range(3):
            publisher.publish([("bad", make_step(i)), ("good", make_step(i))])
        await eventually(lambda: recorder.numbers == [0, 1, 2])
        assert hub.statistics().callback_errors == 1
        assert hub.statistics().open_streams == 1
    assert calls == [1]


async def test_late_and_resumed_streams_are_filled_from_the_log(redis: Redis, publisher: TokenPublisher) -> None:
    """A stream opened after frames were published, from the beginning or from the middle, gets all of its rest."""
    run = await publisher.begin(make_request("r1"), 1)
    publisher.publish([("r1", make_step(i)) for i in range(5)])
    await publisher.wait_logged(run)
    whole, rest = Recorder(), Recorder()
    async with started_hub(redis) as hub:
        hub.open("r1", rest, start=3)
        with pytest.raises(ValueError, match="open already"):
            hub.open("r1", whole)
        await eventually(lambda: rest.numbers == [3, 4])
        hub.close("r1")
        hub.open("r1", whole)
        publisher.publish([("r1", make_step(5))])
        await eventually(lambda: whole.numbers == [0, 1, 2, 3, 4, 5])
        assert rest.numbers == [3, 4]


async def test_last_message_lost_is_found_after_silence(redis: Redis, publisher: TokenPublisher) -> None:
    """A terminal frame that was logged but never published still arrives."""
    recorder = Recorder()
    async with started_hub(redis, silence_s=0.05) as hub:
        hub.open("r1", recorder)
        await redis.rpush(keys.token_log("r1"), codec.encode_frame(make_step(0)), codec.encode_frame(TerminalFrame()))
        await eventually(lambda: recorder.terminals)
        assert hub.statistics().filled == 2


async def test_malformed_messages_and_frames_are_contained(redis: Redis) -> None:
    """Junk on the channel is ignored; junk in a log ends that stream with an error and no other."""
    recorder = Recorder()
    async with started_hub(redis) as hub:
        hub.open("r1", recorder)
        await redis.publish(CHANNEL, b"\xc1junk")
        await redis.publish(CHANNEL, token_log.encode_items([("r1", 0, b"zz")]))
        frame = (await eventually(lambda: recorder.terminals))[0]
        assert hub.statistics().open_streams == 0
    assert frame.error is not None
    assert frame.error.code is ErrorCode.INTERNAL


async def test_stage_events_reach_the_watchers_of_their_model(redis: Redis) -> None:
    """Progress of a wake goes to whoever waits for that model, until they stop watching."""
    seen: list[str] = []
    async with started_hub(redis) as hub:
        unwatch = hub.watch_stages(MODEL, lambda event: seen.append(event.stage))
        for model, stage in ((MODEL, "spawning"), ("other", "spawning"), (MODEL, "restoring")):
            await redis.publish(keys.EVENTS, codec.encode(StageEvent(model, stage)))
        await eventually(lambda: seen == ["spawning", "restoring"])
        unwatch()
        unwatch()
        await redis.publish(keys.EVENTS, codec.encode(StageEvent(MODEL, "ready")))
        await redis.publish(keys.EVENTS, b"junk")
    assert seen == ["spawning", "restoring"]


async def test_cut_subscription_loses_nothing(redis: Redis, publisher: TokenPublisher) -> None:
    """The server drops the gateway's connection again and again in mid-stream: no gap, no repeat."""
    recorder = Recorder()
    async with started_hub(redis, silence_s=0.1) as hub:
        hub.open("r1", recorder)
        await publisher.begin(make_request("r1"), 1)
        for i in range(200):
            publisher.publish([("r1", make_step(i))])
            if i % 40 == 20:
                await redis.client_kill_filter(_type="pubsub")
            await asyncio.sleep(0)
        publisher.publish([("r1", TerminalFrame())])
        await eventually(lambda: recorder.terminals)
        await eventually(lambda: hub.statistics().reconnects >= 1)
    assert recorder.numbers == list(range(200))


async def test_hub_subscribes_over_tcp_with_password_and_database(server: KillableServer) -> None:
    """The subscription's own connection is made from the URL as all others are: address, password and database."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with connected(server.url) as admin:
        await admin.config_set("port", port)
        await admin.config_set("requirepass", "secret")
    recorder = Recorder()
    url = f"redis://:secret@127.0.0.1:{port}/2?decode_responses=true&protocol=3"
    async with connected(url) as redis, started_hub(redis, silence_s=60.0) as hub:
        publisher = TokenPublisher(redis)
        hub.open("r1", recorder)
        await publisher.begin(make_request("r1"), 1)
        publisher.publish([("r1", make_step(0)), ("r1", TerminalFrame())])
        await eventually(lambda: recorder.terminals)
        assert hub.statistics().live == 2
        await publisher.aclose()


async def test_streams_survive_kill_9_of_the_server(server: KillableServer) -> None:
    """The server is killed and restarted in mid-stream, twice: every stream is exact and equals its log."""
    recorders = {f"r{i}": Recorder() for i in range(5)}
    async with connected(server.url) as redis, started_hub(redis) as hub:
        publisher = TokenPublisher(redis)
        for request_id, recorder in recorders.items():
            hub.open(request_id, recorder)
            await publisher.begin(make_request(request_id), 1)
        for i in range(60):
            publisher.publish([(request_id, make_step(i)) for request_id in recorders])
            await asyncio.sleep(0.001)  # a pace, so that the kills fall between frames
            if i in {20, 40}:
                server.kill()
                await asyncio.to_thread(server.restart)
        publisher.publish([(request_id, TerminalFrame()) for request_id in recorders])
        await eventually(lambda: all(recorder.terminals for recorder in recorders.values()))
        await publisher.aclose()
        for request_id, recorder in recorders.items():
            logged = [codec.decode_frame(data) for data in await redis.lrange(keys.token_log(request_id), 0, -1)]
            assert recorder.numbers == list(range(60))
            assert recorder.frames == logged


class FrameEngine:
    """Stands for the engine: makes numbered frames at a pace, going on where the log of an earlier attempt ended."""

    def __init__(self, redis: Redis, num_frames: int) -> None:
        self.publisher = TokenPublisher(redis)
        self.attempts: list[tuple[str, int]] = []
        self._num_frames = num_frames

    async def __call__(self, request: GenerateRequest, attempt: int) -> None:
        self.attempts.append((request.request_id, attempt))
        run = await self.publisher.begin(request, attempt)
        try:
            for number in range(len(run.frames), self._num_frames):
                self.publisher.publish([(request.request_id, make_step(number))])
                await asyncio.sleep(0.005)
            self.publisher.publish([(request.request_id, TerminalFrame())])
            await self.publisher.wait_logged(run)
        finally:
            self.publisher.end(run)


async def test_chaos(server: KillableServer) -> None:
    """20 requests of 60 frames through queue, worker, log and hub, while connections are cut, the server is killed and
    a worker stops in the middle: every client gets every frame once, in order, with one end."""
    recorders = {f"r{i}": Recorder() for i in range(20)}
    async with contextlib.AsyncExitStack() as stack:
        redis = await stack.enter_async_context(connected(server.url))
        hub = await stack.enter_async_context(started_hub(redis))
        dispatcher = Dispatcher(redis)
        first, second = FrameEngine(redis, 60), FrameEngine(redis, 60)
        leaving = await stack.enter_async_context(serving_worker(redis, first, worker_id="one", room=10))
        await stack.enter_async_context(serving_worker(redis, second, worker_id="two", room=20))
        for request_id, recorder in recorders.items():
            hub.open(request_id, recorder)
            await dispatcher.enqueue(make_request(request_id))
        await _until_frames(recorders, 100)
        await redis.client_kill_filter(_type="pubsub")
        await _until_frames(recorders, 300)
        server.kill()
        await asyncio.to_thread(server.restart)
        await _until_frames(recorders, 500)
        await leaving.aclose()  # its requests run again on the other worker
        await redis.client_kill_filter(_type="pubsub")
        await eventually(lambda: all(recorder.terminals for recorder in recorders.values()))
        await eventually(lambda: _is_drained(dispatcher))
        await eventually(lambda: hub.statistics().reconnects >= 2)
        logs = {rid: await redis.lrange(keys.token_log(rid), 0, -1) for rid in recorders}
    await first.publisher.aclose()
    await second.publisher.aclose()
    for request_id, recorder in recorders.items():
        assert recorder.numbers == list(range(60))
        assert len(recorder.terminals) == 1
        assert recorder.frames == [codec.decode_frame(data) for data in logs[request_id]]
    assert first.attempts
    assert any(attempt > 1 for _, attempt in second.attempts)


async def _until_frames(recorders: dict[str, Recorder], total: int) -> None:
    await eventually(lambda: sum(len(recorder.frames) for recorder in recorders.values()) >= total)


async def _has_length(redis: Redis, request_id: str, length: int) -> bool:
    return bool(await redis.llen(keys.token_log(request_id)) == length)


async def _is_drained(dispatcher: Dispatcher) -> bool:
    return await dispatcher.queue_depth(MODEL) == 0
