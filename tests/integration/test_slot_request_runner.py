"""The request runner between a real Redis and an engine that the test plays."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.connection import connect
from scheduler.contract.errors import ErrorCode
from scheduler.contract.host_clock import CLOCK_ID
from scheduler.contract.messages import (
    GenerateRequest,
    SamplingParams,
    StepFrame,
    TerminalFrame,
    TokenEvent,
    Usage,
)
from scheduler.contract.states import Tier
from scheduler.contract.telemetry import Mark, arrived_before
from tests.eventually import eventually
from worker.engine.types import EngineRequest, RequestStep
from worker.publisher import Fenced, TokenPublisher
from worker.request_runner import RequestRunner, WakeRecord

WAKE = WakeRecord("w1", "snapshot-1", Tier.HOST_RAM, {Mark.FORKED: 50, Mark.RESTORED: 100})


class PlayedEngine:
    """Records what it is asked; the test answers in its place."""

    def __init__(self) -> None:
        self.submitted: dict[str, EngineRequest] = {}
        self.cancelled: list[str] = []

    def submit(self, request: EngineRequest) -> None:
        self.submitted[request.request_id] = request

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


class Bench:
    """A runner, its engine, and its token log."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.engine = PlayedEngine()
        self.gone_clients: set[str] = set()
        self.publisher = TokenPublisher(redis, on_fenced=lambda request_id: self.runner.on_fenced(request_id))
        self.runner = RequestRunner(self.publisher, WAKE, self.gone_clients.__contains__)

    def steps(self, *steps: RequestStep) -> None:
        """Report engine steps from another thread, as the engine does."""
        thread = threading.Thread(target=self.runner.on_steps, args=(list(steps),))
        thread.start()
        thread.join()

    async def wait_submitted(self, request_id: str = "r1") -> EngineRequest:
        found: EngineRequest = await eventually(lambda: self.engine.submitted.get(request_id), what="submission")
        return found

    async def log(self, request_id: str = "r1") -> list[StepFrame | TerminalFrame]:
        return [codec.decode_frame(f) for f in await self.redis.lrange(keys.token_log(request_id), 0, -1)]  # type: ignore[misc]


@pytest.fixture
async def bench(redis_url: str) -> AsyncIterator[Bench]:
    async with opened(redis_url) as made:
        yield made


@asynccontextmanager
async def opened(redis_url: str) -> AsyncIterator[Bench]:
    redis = connect(redis_url)
    made = Bench(redis)
    made.runner.attach(made.engine)
    try:
        yield made
    finally:
        await made.runner.aclose()
        await made.publisher.aclose()
        await redis.aclose()


def request(marks: dict[str, int] | None = None, num_choices: int = 1) -> GenerateRequest:
    sampling = SamplingParams(seed=1, max_tokens=8)
    return GenerateRequest("r1", "tiny", "gw", "prompt", sampling, num_choices, marks=marks or {Mark.ACCEPTED: 10})


def step(*tokens: int, choice: int = 0, **fields: object) -> RequestStep:
    events = [TokenEvent(choice, token, f"<{token}>") for token in tokens]
    return RequestStep("r1", events, sampled_mono_ns=7, **fields)  # type: ignore[arg-type]


async def test_steps_are_logged_and_closed_with_marks_of_a_cold_start(bench: Bench) -> None:
    """Each engine step is a frame; the last frame tells usage, tier, worker, and the instants of the wake."""
    run = asyncio.create_task(bench.runner.run(request(), 1))
    await bench.wait_submitted()
    bench.steps(step(5, marks={Mark.TOKENISED: 101, Mark.SAMPLED: 103}))
    bench.steps(step(6, finished=True, usage=Usage(3, 2)))
    await run
    first, second, terminal = await bench.log()
    assert (first, second) == (StepFrame((TokenEvent(0, 5, "<5>"),), 7), StepFrame((TokenEvent(0, 6, "<6>"),), 7))
    assert isinstance(terminal, TerminalFrame)
    assert (terminal.usage, terminal.error) == (Usage(3, 2), None)
    assert (terminal.worker_id, terminal.snapshot_id, terminal.cold_tier) == ("w1", "snapshot-1", Tier.HOST_RAM)
    assert {Mark.ACCEPTED, Mark.FORKED, Mark.RESTORED, Mark.CLAIMED, Mark.SAMPLED, Mark.PUBLISHED} <= set(
        terminal.marks
    )
    assert len(bench.runner) == 0
    assert bench.publisher.statistics().num_runs == 0


async def test_answer_of_one_step_still_tells_when_it_was_published(bench: Bench) -> None:
    """Even when tokens and end come in one step, the terminal frame waits for the first frame's PUBLISHED mark."""
    run = asyncio.create_task(bench.runner.run(request(), 1))
    await bench.wait_submitted()
    bench.steps(step(5, finished=True, usage=Usage(3, 1)))
    await run
    _, terminal = await bench.log()
    assert isinstance(terminal, TerminalFrame)
    assert Mark.PUBLISHED in terminal.marks


async def test_requests_that_come_before_the_engine_wait_for_it(redis_url: str) -> None:
    """A claim may overtake the restore: the request is handed to the engine the moment there is one."""
    redis = connect(redis_url)
    bench = Bench(redis)
    run = asyncio.create_task(bench.runner.run(request(), 1))
    await eventually(lambda: len(bench.runner) == 1)
    assert bench.engine.submitted == {}
    bench.runner.attach(bench.engine)
    assert set(bench.engine.submitted) == {"r1"}
    bench.steps(step(finished=True))
    await run
    await bench.publisher.aclose()
    await redis.aclose()


async def test_second_attempt_replays_what_the_first_logged(bench: Bench) -> None:
    """The tokens in the log go to the engine by choice; what it adds follows them, and nothing is written twice."""
    run = asyncio.create_task(bench.runner.run(request(num_choices=2), 1))
    await bench.wait_submitted()
    bench.steps(step(5, 6), step(8, choice=1))
    await eventually(lambda: bench.publisher.statistics().frames_logged == 2)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    assert bench.engine.cancelled == ["r1"]
    bench.engine.submitted.clear()
    again = asyncio.create_task(bench.runner.run(request(num_choices=2), 2))
    assert (await bench.wait_submitted()).emitted == ((5, 6), (8,))
    bench.steps(step(9, finished=True))
    await again
    frames = await bench.log()
    assert [[event.token_id for event in frame.events] for frame in frames[:-1] if isinstance(frame, StepFrame)] == [
        [5, 6],
        [8],
        [9],
    ]


async def test_finished_request_is_not_run_again(bench: Bench) -> None:
    """A job that is claimed once more after its end changes nothing."""
    run = asyncio.create_task(bench.runner.run(request(), 1))
    await bench.wait_submitted()
    bench.steps(step(5, finished=True))
    await run
    before = await bench.log()
    bench.engine.submitted.clear()
    await bench.runner.run(request(), 2)
    assert await bench.log() == before
    assert bench.engine.submitted == {}


async def test_older_attempt_is_fenced_and_writes_nothing(bench: Bench, redis_url: str) -> None:
    """When another worker takes over, the run ends as fenced, the engine drops it, and the log stays the other's."""
    run = asyncio.create_task(bench.runner.run(request(), 1))
    await bench.wait_submitted()
    async with opened(redis_url) as other:
        overtaking = asyncio.create_task(other.runner.run(request(), 2))
        await other.wait_submitted()
        bench.steps(step(5))
        with pytest.raises(Fenced):
            await run
        assert bench.engine.cancelled == ["r1"]
        assert await bench.log() == []
        other.steps(step(6, finished=True))
        await overtaking
        with pytest.raises(Fenced):
            await bench.runner.run(request(), 1)
    assert len(await bench.log()) == 2


async def test_client_that_left_before_the_run_is_told_without_the_engine(bench: Bench) -> None:
    """A request that was cancelled while queued ends as cancelled at once."""
    await bench.redis.set(keys.cancelled("r1"), "1")
    await bench.runner.run(request(), 1)
    (terminal,) = await bench.log()
    assert isinstance(terminal, TerminalFrame)
    assert terminal.error is not None
    assert terminal.error.code is ErrorCode.CANCELLED
    assert bench.engine.submitted == {}


async def test_client_that_leaves_in_mid_stream_gets_one_terminal_frame(bench: Bench) -> None:
    """Cancellation from outside ends the engine's work and the log; steps still under way are dropped."""
    run = asyncio.create_task(bench.runner.run(request(), 1))
    await bench.wait_submitted()
    bench.steps(step(5))
    await eventually(lambda: bench.publisher.statistics().frames_logged == 1)
    bench.gone_clients.add("r1")
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    bench.steps(step(6, finished=True))
    await bench.runner.aclose()
    _, terminal = await bench.log()
    assert isinstance(terminal, TerminalFrame)
    assert terminal.error is not None
    assert terminal.error.code is ErrorCode.CANCELLED
    assert bench.engine.cancelled == ["r1"]
    assert bench.publisher.statistics().num_runs == 0


async def test_client_that_leaves_while_the_end_is_being_written_changes_nothing(bench: Bench) -> None:
    """The engine's own terminal frame is already on its way: it is written, and no second one."""
    run = asyncio.create_task(bench.runner.run(request(), 1))
    await bench.wait_submitted()
    bench.steps(step(5))
    await eventually(lambda: bench.publisher.statistics().frames_logged == 1)
    await bench.redis.execute_command("CLIENT", "PAUSE", 20_000, "WRITE")
    bench.steps(step(6, finished=True, usage=Usage(3, 2)))
    await eventually(lambda: bench.publisher.statistics().backlog_bytes > 0)
    bench.gone_clients.add("r1")
    run.cancel()
    await asyncio.sleep(0)  # it is told while nothing can be written
    await bench.redis.execute_command("CLIENT", "UNPAUSE")
    with pytest.raises(asyncio.CancelledError):
        await run
    await bench.runner.aclose()
    *_, terminal = await bench.log()
    assert isinstance(terminal, TerminalFrame)
    assert (terminal.error, terminal.usage) == (None, Usage(3, 2))
    assert len(await bench.log()) == 3


async def test_worker_that_closes_writes_no_end(bench: Bench) -> None:
    """Without a client that left, a cancelled run leaves the log open for the next attempt."""
    run = asyncio.create_task(bench.runner.run(request(), 1))
    await bench.wait_submitted()
    bench.steps(step(5))
    await eventually(lambda: bench.publisher.statistics().frames_logged == 1)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    await bench.runner.aclose()
    assert len(await bench.log()) == 1


async def test_marks_of_another_host_are_left_to_its_gateway(bench: Bench) -> None:
    """Their clock says nothing here: the frame carries the wake and its tier, and claims neither cold nor hot."""
    foreign = msgspec.structs.replace(request({Mark.ACCEPTED: 10}), clock_id="another-host")
    run = asyncio.create_task(bench.runner.run(foreign, 1))
    await bench.wait_submitted()
    bench.steps(step(5, finished=True, usage=Usage(3, 1)))
    await run
    *_, terminal = await bench.log()
    assert isinstance(terminal, TerminalFrame)
    assert (terminal.cold_tier, terminal.wake_tier, terminal.clock_id) == (None, Tier.HOST_RAM, CLOCK_ID)
    assert terminal.marks.items() >= WAKE.marks.items()


def test_only_requests_older_than_the_worker_met_a_cold_model() -> None:
    """The cold tier is told by instants, not by guesses; an unknown instant counts as hot."""
    assert arrived_before({Mark.ACCEPTED: 99}, WAKE.marks)
    assert arrived_before({Mark.ENQUEUED: 99}, WAKE.marks)
    assert not arrived_before({Mark.ACCEPTED: 101}, WAKE.marks)
    assert not arrived_before({}, WAKE.marks)
    assert not arrived_before({Mark.ACCEPTED: 99}, {})
