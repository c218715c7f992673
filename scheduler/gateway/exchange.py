"""The generate requests behind one HTTP call, from enqueue to the last terminal frame.

A call with several prompts is several requests; their choices are numbered through. Frames arrive by callback on the
event loop, already in order and without gaps (the Hub's promise), and are handed straight to the listener.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import msgspec
import structlog
from redis.exceptions import RedisError

from scheduler.contract import job_queue, keys
from scheduler.contract.codec import Frame
from scheduler.contract.errors import ErrorCode, ErrorInfo, GlowplugError
from scheduler.contract.host_clock import CLOCK_ID
from scheduler.contract.messages import (
    GenerateRequest,
    RequestRecord,
    StepFrame,
    TerminalFrame,
    Trace,
    VectorFrame,
)
from scheduler.contract.states import Priority
from scheduler.contract.telemetry import Mark
from scheduler.dispatch import QueueFull
from scheduler.gateway.errors import redis_within
from scheduler.gateway.exchange_part import Part
from scheduler.gateway.gateway import Gateway
from scheduler.gateway.identity import ANONYMOUS, Identity
from scheduler.gateway.request_ids import create_request_id
from scheduler.gateway.request_schema import Call
from scheduler.gateway.request_span import RequestSpan, create_span_id
from scheduler.gateway.traces import build_trace

DEFAULT_WAKE_RETRY_AFTER_S: Final = 30
#: How often a request is queued anew because the server lost it, before its client is told.
MAX_GENERATIONS: Final = 5
RECOVERY_RETRY_S: Final = 0.5
RECOVERIES: Final = {
    job_queue.REQUEUED: "queued again",
    job_queue.STILL_HELD: "still there",
    job_queue.ENDED: "ended",
    job_queue.EXPIRED: "expired",
    job_queue.GIVEN_UP: "given up",
}
EXPIRED: Final = ErrorInfo(
    ErrorCode.OVERLOADED,
    f"the request waited longer than {keys.REQUEST_TTL_S} s and was not run; try again",
    retry_after_s=DEFAULT_WAKE_RETRY_AFTER_S,
)
LOST: Final = ErrorInfo(
    ErrorCode.BACKEND_UNAVAILABLE,
    "the queue's server lost the request and it could not be queued again; send it again",
    retry_after_s=1,
)
TRACE_WAIT_S: Final = 0.25


#: Called on the event loop for each step: which request, and what the step added.
OnStep = Callable[[Part, StepFrame], None]
#: Likewise for each frame of a vector.
OnVector = Callable[[Part, VectorFrame], None]


class Exchange:
    """One call's requests. Owner of their hub streams: :meth:`close` gives them back, and cancels what still runs."""

    def __init__(
        self,
        gateway: Gateway,
        call: Call,
        request_id: str,
        accepted_mono_ns: int,
        identity: Identity = ANONYMOUS,
        *,
        is_unhurried: bool = False,
        span: RequestSpan | None = None,
    ) -> None:
        self.call = call
        self._span = span
        self.is_unhurried = is_unhurried  # nobody waits at the other end: the caller sets the limits
        self.identity = identity
        self.request_id = request_id
        self.created_at_s = int(time.time())
        self.error: ErrorInfo | None = None
        self.done = asyncio.Event()
        self.started_mono_s = self.last_frame_mono_s = time.monotonic()
        self.has_frames = False
        self._is_recorded = False
        self._gateway = gateway
        self._on_step: OnStep | None = None
        self._on_vector: OnVector | None = None
        self._unfinished = len(call.prompts)
        self._weight = gateway.admission.tenant_policy(identity.tenant).weight
        self.parts = [self._build_part(i, accepted_mono_ns) for i in range(len(call.prompts))]
        self._log = structlog.get_logger()

    def _build_part(self, i: int, accepted_mono_ns: int) -> Part:
        call, span = self.call, self._span
        span_id = create_span_id() if span is not None and span.is_recorded else ""
        request = GenerateRequest(
            request_id=self.request_id if i == 0 else create_request_id(),
            model=call.card.name,
            gateway_id=self._gateway.gateway_id,
            prompt=call.prompts[i],
            sampling=call.sampling,
            num_choices=call.num_choices,
            priority=call.priority,
            add_special=call.add_special,
            parse_special=call.parse_special,
            text_only=call.text_only,
            user=call.user,
            tenant=self.identity.tenant,
            embedding=call.embedding,
            accepted_at_s=time.time(),
            marks={Mark.ACCEPTED: accepted_mono_ns},
            clock_id=CLOCK_ID,
            trace_context=None if span is None else span.make_context(span_id),
        )
        return Part(request, i, span_id)

    async def start(self, on_step: OnStep | None = None, on_vector: OnVector | None = None) -> None:
        """Subscribe, then enqueue, every request.

        Raises:
            GlowplugError: the queue is full (429), or Redis does not answer (503). Nothing stays enqueued: close().
        """
        self._on_step, self._on_vector = on_step, on_vector
        gateway = self._gateway
        for part in self.parts:
            request = part.request
            request_id, status = request.request_id, gateway.directory.status_of(request.model)
            limit = gateway.admission.queue_limit(
                request.model, request.priority, 0 if status is None else status.workers
            )
            gateway.hub.open(request_id, self._make_callback(part), on_lost=self._make_recovery(part))
            part.may_be_queued = True
            try:
                async with redis_within(gateway.settings.redis_limit_s, "queueing the request"):
                    await gateway.dispatcher.enqueue(
                        request, limit.max_queued, weight=self._weight, record=self._build_record(part)
                    )
            except QueueFull as full:
                part.may_be_queued = False
                raise limit.refuse(request.model, full.depth) from full
            gateway.hub.expect(request_id)
            part.marks[Mark.ENQUEUED] = time.monotonic_ns()

    @property
    def _is_resumable(self) -> bool:
        return self.call.stream and self.call.endpoint.is_resumable

    def _build_record(self, part: Part) -> RequestRecord | None:
        """What another gateway needs to go on with this call; None where the client could not come back for it."""
        call = self.call
        if part.index > 0 or not self._is_resumable:
            return None
        return RequestRecord(
            request_id=self.request_id,
            tenant=part.request.tenant,
            model=call.card.name,
            snapshot_id=call.card.snapshot_id,
            endpoint=call.endpoint.value,
            gateway_id=part.request.gateway_id,
            part_ids=tuple(part.request.request_id for part in self.parts),
            num_choices=call.num_choices,
            include_usage=call.include_usage,
            created_at_s=self.created_at_s,
            echoes=tuple(map(str, call.prompts)) if call.echo else (),
            tool_style="" if call.tools is None else call.tools.style.value,
            tool_names=() if call.tools is None else tuple(sorted(call.tools.names)),
        )

    # --- a server that forgot -------------------------------------------------------------------------------------

    def _make_recovery(self, part: Part) -> Callable[[], None]:
        def on_lost() -> None:
            self._gateway.run_in_background(self._recover(part), name=f"recover:{part.request.request_id}")

        return on_lost

    async def _recover(self, part: Part) -> None:
        """The queue's server lost the request (a restart without its data): queue it again, under the same id.

        Its next run reads the tokens that the client has from the log, where the hub has put them back.
        """
        while part.terminal is None and self.error is None:
            request = msgspec.structs.replace(part.request, generation=part.request.generation + 1)
            try:
                if request.generation > MAX_GENERATIONS:
                    found = job_queue.GIVEN_UP
                else:
                    found = await self._gateway.dispatcher.recover(
                        request, weight=self._weight, record=self._build_record(part)
                    )
            except (RedisError, OSError) as error:
                self._log.warning("recovery_delayed", request_id=request.request_id, error=str(error))
                await asyncio.sleep(RECOVERY_RETRY_S)
                continue
            part.request = request
            self._gateway.metrics.on_recovery()
            self._log.warning("request_recovered", request_id=request.request_id, found=RECOVERIES[found])
            if found in (job_queue.EXPIRED, job_queue.GIVEN_UP):
                await self._end_lost(part, found)
            self._gateway.hub.expect(request.request_id)
            return

    async def _end_lost(self, part: Part, found: int) -> None:
        """Nobody will run this request: say so, in its log too, where other listeners wait."""
        error = EXPIRED if found == job_queue.EXPIRED else LOST
        try:
            await self._gateway.dispatcher.fail_request(part.request, error)
        except (RedisError, OSError) as trouble:
            self._log.warning("lost_request_not_ended", request_id=part.request.request_id, error=str(trouble))
        self.fail(error)

    async def record(self) -> Trace:
        """Keep the traces of all requests and count them; the first one's is returned.

        Requires: done, without error. Waits for Redis at most a quarter of a second, so that a client that asks for the
        trace right after its answer finds it.
        """
        self._is_recorded = True
        now_mono_ns = time.monotonic_ns()
        traces = self._build_traces(now_mono_ns)
        for part, trace in zip(self.parts, traces, strict=True):
            usage = (part.terminal or TerminalFrame()).usage
            self._gateway.metrics.on_trace(
                trace, prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens
            )
            self._note_service_time(part, now_mono_ns)
        self._gateway.directory.on_wake_measured(traces[0])
        saved = self._gateway.run_in_background(self._save(traces), name=f"trace:{self.request_id}")
        await asyncio.wait({saved}, timeout=TRACE_WAIT_S)
        return traces[0]

    def _build_traces(self, now_mono_ns: int, error: ErrorCode | None = None) -> list[Trace]:
        """The traces of all requests, kept here, and their spans where they are recorded."""
        gateway, span, traces = self._gateway, self._span, []
        for part in self.parts:
            trace = build_trace(part.request, part.terminal or TerminalFrame(), part.marks, now_mono_ns, error)
            if span is not None:
                trace = msgspec.structs.replace(trace, trace_id=span.trace_id)
            gateway.tracing.end_part_soon(span, part, trace, self.call, now_mono_ns)
            gateway.traces.remember(trace)
            traces.append(trace)
        return traces

    def _note_service_time(self, part: Part, now_mono_ns: int) -> None:
        """How long a worker was busy with it; batch lines, which give way, do not count.

        Clocks of two hosts do not compare, so each stretch is on one of them.
        """
        worker = {} if part.terminal is None else part.terminal.marks
        if part.request.priority is Priority.BATCH:
            return
        if Mark.CLAIMED in worker and Mark.SAMPLED in worker and Mark.RECEIVED in part.marks:
            busy_ns = worker[Mark.SAMPLED] - worker[Mark.CLAIMED] + now_mono_ns - part.marks[Mark.RECEIVED]
            self._gateway.admission.on_served(part.request.model, busy_ns / 1e9)

    async def _save(self, traces: list[Trace]) -> None:
        try:
            for trace in reversed(traces):  # so that the call's own id is the newest
                await self._gateway.traces.save(trace)
        except (RedisError, OSError) as error:
            self._log.warning("trace_not_saved", request_id=self.request_id, error=str(error))

    def close(self) -> None:
        """Close the hub streams and cancel, in the background, every request that has not ended. Idempotent.

        A stream that this gateway cuts because it stops is not cancelled: its client may go on at another one.
        """
        is_handed_on = self._gateway.draining and self._is_resumable and self.error is None
        for part in self.parts:
            self._gateway.hub.close(part.request.request_id)
            if part.terminal is None:
                part.terminal = TerminalFrame()
                if part.may_be_queued and not is_handed_on:
                    self._gateway.cancel_in_background(part.request)
        if not self._is_recorded and not is_handed_on:
            self._is_recorded = True
            self._record_failure()

    def _record_failure(self) -> None:
        """A trace of what did not end well, for whoever asks what became of it."""
        code = ErrorCode.CANCELLED if self.error is None else self.error.code
        traces = self._build_traces(time.monotonic_ns(), code)
        self._gateway.run_in_background(self._save(traces), name=f"trace:{self.request_id}")

    async def find_overdue(self, *, streamed: bool) -> ErrorInfo | None:
        """The error to end with if this exchange has waited longer than the settings allow, else None.

        A request that waits behind others on a hot worker is no failed cold start: only the longer limit counts.
        """
        if self.is_unhurried:
            return None
        settings, now_mono_s, model = self._gateway.settings, time.monotonic(), self.call.card.name
        waited_s = now_mono_s - self.started_mono_s
        is_waking = not self.has_frames and waited_s >= settings.cold_start_limit_s
        if is_waking and not await self._is_hot_now():
            cause = self._gateway.directory.describe_cold(model)
            message = f'model "{model}" gave no token within {settings.cold_start_limit_s:g} s of being woken'
            message += f" ({cause}); try again" if cause else "; try again"
            return ErrorInfo(ErrorCode.WAKE_TIMEOUT, message, retry_after_s=DEFAULT_WAKE_RETRY_AFTER_S)
        if waited_s >= settings.stream_limit_s:
            message = f"the request ran longer than {settings.stream_limit_s:g} s; ask for fewer tokens"
            return ErrorInfo(ErrorCode.OVERLOADED, message, retry_after_s=DEFAULT_WAKE_RETRY_AFTER_S)
        silent_s = now_mono_s - self.last_frame_mono_s
        if (silent_s if streamed else waited_s) >= settings.request_limit_s:
            kind = "gave no token" if streamed else "did not finish"
            return ErrorInfo(
                ErrorCode.OVERLOADED,
                f'the request to "{model}" {kind} within {settings.request_limit_s:g} s; '
                "stream it, ask for fewer tokens, or try again",
                retry_after_s=DEFAULT_WAKE_RETRY_AFTER_S,
            )
        return None

    async def _is_hot_now(self) -> bool:
        directory = self._gateway.directory
        try:
            await directory.ensure_fresh()
        except GlowplugError as error:  # Redis is away: the last report stands
            self._log.warning("models_not_read", error=error.info.message)
        return directory.is_hot(self.call.card.name)

    async def wait_done(self, limit_s: float) -> bool:
        """Wait until every request has ended, at most ``limit_s``; whether they have."""
        try:
            async with asyncio.timeout(limit_s):
                await self.done.wait()
        except TimeoutError:
            return False
        return True

    def fail(self, error: ErrorInfo) -> None:
        """End the exchange with ``error``; the first error stays."""
        if self.error is None:
            self.error = error
        self.done.set()

    def _name_field(self, error: ErrorInfo) -> ErrorInfo:
        """The worker knows neither the field in which the prompt came nor what asked for a grammar."""
        if error.param == "response_format" and self.call.tools is not None:
            return msgspec.structs.replace(error, param="tools")
        if error.code is not ErrorCode.CONTEXT_LENGTH_EXCEEDED or error.param is not None:
            return error
        return msgspec.structs.replace(error, param=self.call.endpoint.prompt_field)

    # --- frames -------------------------------------------------------------------------------------------------

    def _make_callback(self, part: Part) -> Callable[[Frame], None]:
        def on_frame(frame: Frame) -> None:
            try:
                self._on_frame(part, frame)
            except Exception:  # one request's bug must not stop the frames of all others
                self._log.exception("frame_handling_failed", request_id=part.request.request_id)
                self.fail(ErrorInfo(ErrorCode.INTERNAL, "the gateway failed to deliver a token; see its log"))

        return on_frame

    def _on_frame(self, part: Part, frame: Frame) -> None:
        self.last_frame_mono_s = time.monotonic()
        if part.terminal is not None:
            return
        if not part.has_frames:
            part.has_frames = True
            part.marks[Mark.RECEIVED] = time.monotonic_ns()
        if isinstance(frame, StepFrame):
            self.has_frames = True
            part.num_streamed_tokens += len(frame.events)
            if self._on_step is not None and self.error is None:
                self._on_step(part, frame)
        elif isinstance(frame, VectorFrame):
            self.has_frames = True
            if self._on_vector is not None and self.error is None:
                self._on_vector(part, frame)
        else:
            self._on_terminal(part, frame)

    def _on_terminal(self, part: Part, frame: TerminalFrame) -> None:
        part.terminal = frame
        self._unfinished -= 1
        if frame.error is not None:
            self.fail(self._name_field(frame.error))
        elif self._unfinished == 0:
            self.done.set()


def as_exception(error: ErrorInfo) -> GlowplugError:
    """``error`` to be raised, so that the middleware answers with it."""
    return GlowplugError(error.code, error.message, param=error.param, retry_after_s=error.retry_after_s)
