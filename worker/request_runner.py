"""Runs requests on the engine: from a claimed job to the terminal frame in its token log.

A run is one attempt at one request. It replays what earlier attempts logged, hands the rest to the engine, forwards
every engine step to the publisher, and ends in exactly one of these ways:

========================== ============================================================
the engine finished it     terminal frame with usage, or with the engine's error
the client went away       the engine drops it; terminal frame with error ``cancelled``
another attempt overtook   nothing is written: that attempt ends the request
the worker closes          nothing is written: the job goes back to the queue
========================== ============================================================
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.host_clock import CLOCK_ID
from scheduler.contract.messages import GenerateRequest, StepFrame, TerminalFrame
from scheduler.contract.states import Tier
from scheduler.contract.telemetry import Mark, arrived_before
from scheduler.contract.trace_context import parse
from worker.engine.types import AnyRequest, EncodeRequest, EngineRequest, RequestStep, TextRequest
from worker.publisher import Fenced, Frame, Run, TokenPublisher
from worker.vector_frames import collect_encoded, split_vector


class EngineHandle(Protocol):
    """The part of the engine that runs use; safe from any thread."""

    def submit(self, request: AnyRequest) -> None: ...

    def cancel(self, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class WakeRecord:
    """How this worker came to be: what a request that waited for it reports. ``marks`` is complete once ready."""

    worker_id: str
    snapshot_id: str
    cold_tier: Tier
    marks: dict[str, int]


@dataclass(slots=True)
class _Running:
    """A run under way. ``outcome`` is the engine's last step; set once, on the loop."""

    request: GenerateRequest
    run: Run
    marks: dict[str, int]
    outcome: asyncio.Future[RequestStep]
    met_tier: Tier | None = None  # where its worker's model was when it came, if off the device
    is_submitted: bool = False
    is_saying_farewell: bool = False
    emitted: tuple[tuple[int, ...], ...] = ()
    encoded: dict[int, int] = field(default_factory=dict)  # inputs whose vectors are logged, and their tokens


class RequestRunner:
    """All runs of one worker. Event loop only, except :meth:`on_steps`.

    Runs may begin before there is an engine (the claim overlaps the restore); they are submitted by :meth:`attach`.
    ``was_cancelled(request_id)`` tells whether a cancelled run's client went away.
    """

    def __init__(
        self, publisher: TokenPublisher, wake: WakeRecord, was_cancelled: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._publisher = publisher
        self._wake = wake
        self._was_cancelled = was_cancelled
        self._loop = asyncio.get_running_loop()
        self._engine: EngineHandle | None = None
        self._running: dict[str, _Running] = {}
        self._farewells: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()
        self.away_tier: Tier | None = None  # of the model, while it is off its device; set by the slot

    def __len__(self) -> int:
        return len(self._running)

    def attach(self, engine: EngineHandle) -> None:
        """The worker is ready: submit what waits."""
        self._engine = engine
        for running in self._running.values():
            self._submit(running)

    async def run(self, request: GenerateRequest, attempt: int) -> None:
        """Serve one request; returns once its terminal frame is logged (by this attempt or an earlier one).

        Raises:
            Fenced: another attempt has taken over.
            CancelledError: cancelled from outside.
        """
        marks = {**request.marks, Mark.CLAIMED: time.monotonic_ns()}
        if (span := parse(request.trace_context)) is not None:  # this task's own context: one job, one task
            structlog.contextvars.bind_contextvars(trace_id=span.trace_id)
        run = await self._publisher.begin(request, attempt)
        request_id = request.request_id
        running = _Running(request, run, marks, self._loop.create_future(), met_tier=self.away_tier)
        self._running[request_id] = running
        try:
            if run.is_finished:
                return
            if run.is_cancelled:
                running.outcome.set_result(_cancelled_step(request_id))
            else:
                running.emitted = collect_emitted(run, request.num_choices)
                running.encoded = collect_encoded(run)
                self._submit(running)
            step = await running.outcome
            await self._end(running, step)
        except asyncio.CancelledError:
            if self._was_cancelled(request_id):
                self._say_farewell(running)
            raise
        finally:
            if self._running.get(request_id) is running:
                del self._running[request_id]
            if running.is_submitted and running.outcome.cancelled() and self._engine is not None:
                self._engine.cancel(request_id)  # the await above passed this task's cancellation on to the future
            if not running.is_saying_farewell:
                self._publisher.end(run)

    def on_fenced(self, request_id: str) -> None:
        """The publisher was refused: another attempt writes this request's log now."""
        running = self._running.get(request_id)
        if running is not None and not running.outcome.done():
            running.outcome.set_exception(Fenced(f"request {request_id}: attempt {running.run.attempt} was overtaken"))
            if self._engine is not None:
                self._engine.cancel(request_id)

    def on_steps(self, steps: list[RequestStep]) -> None:
        """What one engine step did. Engine thread; waits there while too much is unpublished (back-pressure)."""
        self._publisher.room.wait()
        self._loop.call_soon_threadsafe(self._forward, steps)

    async def aclose(self) -> None:
        """Wait for terminal frames of cancelled requests that are still being written. Idempotent."""
        if self._farewells:
            await asyncio.gather(*self._farewells, return_exceptions=True)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _submit(self, running: _Running) -> None:
        if self._engine is None or running.is_submitted or running.outcome.done():
            return
        running.is_submitted = True
        self._engine.submit(_describe_request(running))

    def _forward(self, steps: list[RequestStep]) -> None:
        frames: list[tuple[str, Frame]] = []
        for step in steps:
            running = self._running.get(step.request_id)
            if running is None or running.outcome.done():
                continue  # cancelled, fenced, or of a run that has ended
            running.marks.update(step.marks)
            if step.events:
                frames.append((step.request_id, StepFrame(tuple(step.events), step.sampled_mono_ns)))
            for encoded in step.vectors:
                frames += ((step.request_id, frame) for frame in split_vector(encoded))
            if step.finished:
                running.outcome.set_result(step)
                if running.run.published_mono_ns is not None:
                    # In one message with the last tokens. Otherwise `_end` first waits for the PUBLISHED mark.
                    frames.append((step.request_id, self._make_terminal(running, step)))
        self._publisher.publish(frames)

    async def _end(self, running: _Running, step: RequestStep) -> None:
        """See the terminal frame into the log."""
        request_id = running.request.request_id
        if not running.run.is_finished:
            await self._publisher.wait_logged(running.run)
            self._publisher.publish([(request_id, self._make_terminal(running, step))])
        await self._publisher.wait_logged(running.run)
        self._log.info(
            "request_ended",
            request_id=request_id,
            attempt=running.run.attempt,
            prompt_tokens=step.usage.prompt_tokens,
            completion_tokens=step.usage.completion_tokens,
            error=step.error.code.value if step.error else None,
        )

    def _make_terminal(self, running: _Running, step: RequestStep) -> TerminalFrame:
        marks, wake = dict(running.marks), self._wake
        if running.run.published_mono_ns is not None:
            marks[Mark.PUBLISHED] = running.run.published_mono_ns
        is_foreign = running.request.clock_id not in ("", CLOCK_ID)  # then only its gateway can tell
        is_cold = not is_foreign and arrived_before(running.request.marks, wake.marks)
        if is_cold or is_foreign:
            marks = {**wake.marks, **marks}
        return TerminalFrame(
            usage=step.usage,
            error=step.error,
            marks=marks,
            worker_id=wake.worker_id,
            cold_tier=wake.cold_tier if is_cold else running.met_tier,
            snapshot_id=wake.snapshot_id,
            clock_id=CLOCK_ID,
            wake_tier=wake.cold_tier if is_foreign else None,
        )

    def _say_farewell(self, running: _Running) -> None:
        """Write the terminal frame of a request whose client went away, after its job has ended."""
        if running.run.is_fenced:
            return
        step = _cancelled_step(running.request.request_id)
        running.is_saying_farewell = True  # even where the engine's own last frame only waits to be written
        if not running.run.is_finished:
            self._publisher.publish([(step.request_id, self._make_terminal(running, step))])
        task = self._loop.create_task(self._finish_farewell(running.run), name=f"farewell {step.request_id}")
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _finish_farewell(self, run: Run) -> None:
        try:
            await self._publisher.wait_logged(run)
        except Fenced:
            pass  # somebody else ended it: as good
        finally:
            self._publisher.end(run)


def _describe_request(running: _Running) -> AnyRequest:
    """What the engine is to do, less what earlier attempts did."""
    request = running.request
    if request.text_only:
        return TextRequest(
            request_id=request.request_id,
            given=request.prompt,
            add_special=request.add_special,
            parse_special=request.parse_special,
            num_emitted=len(running.emitted[0]) if running.emitted else 0,
        )
    if request.embedding is not None:
        return EncodeRequest(
            request_id=request.request_id,
            inputs=request.embedding.inputs,
            dimensions=request.embedding.dimensions,
            priority=request.priority,
            parse_special=request.parse_special,
            emitted=running.encoded,
        )
    return EngineRequest(
        request_id=request.request_id,
        prompt=request.prompt,
        sampling=request.sampling,
        num_choices=request.num_choices,
        priority=request.priority,
        parse_special=request.parse_special,
        add_special=request.add_special,
        emitted=running.emitted,
        tenant=request.tenant,
    )


def collect_emitted(run: Run, num_choices: int) -> tuple[tuple[int, ...], ...]:
    """Token ids that earlier attempts logged, for each choice; empty when there are none.

    Raises:
        ContractError: the log holds something that is no frame.
    """
    emitted: list[list[int]] = [[] for _ in range(num_choices)]
    for frame in run.decode_frames():
        if isinstance(frame, StepFrame):
            for event in frame.events:
                if event.token_id >= 0 and event.choice < num_choices:
                    emitted[event.choice].append(event.token_id)
    return tuple(map(tuple, emitted)) if any(emitted) else ()


def _cancelled_step(request_id: str) -> RequestStep:
    error = ErrorInfo(ErrorCode.CANCELLED, "the client went away")
    return RequestStep(request_id, finished=True, error=error)
