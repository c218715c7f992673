"""Going on with a streamed call whose connection or gateway was lost, at any gateway.

The record written with the job says who may and what the events are made of; the token log has every frame since the
first. The events are made again from there, and those that the client names as seen are left out.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web
from redis.exceptions import RedisError

from scheduler.contract import codec, keys
from scheduler.contract.errors import ContractError
from scheduler.contract.messages import GenerateRequest, ModelCard, RequestRecord, SamplingParams, Trace
from scheduler.contract.states import Priority
from scheduler.gateway.errors import HttpError, redis_within
from scheduler.gateway.event_ids import HEADER, read_event_id
from scheduler.gateway.exchange import LOST, Exchange, OnStep, OnVector
from scheduler.gateway.exchange_part import Part
from scheduler.gateway.gateway import GATEWAY, Gateway
from scheduler.gateway.identity import IDENTITY
from scheduler.gateway.request_ids import is_request_id
from scheduler.gateway.request_log import FACTS
from scheduler.gateway.request_schema import Call, Endpoint
from scheduler.gateway.streaming import StreamedCall
from scheduler.gateway.tool_calls import ToolUse
from scheduler.gateway.tool_styles import ToolStyle

ENDPOINT: Final = "resume"

#: Deletes the listener's key if it is still the caller's. KEYS[1] listener. ARGV[1] gateway id.
_LEAVE: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class ResumedExchange(Exchange):
    """The requests of a call that began elsewhere. Closing it cancels nothing: the client may come back once more."""

    def __init__(self, gateway: Gateway, record: RequestRecord, resumed_mono_ns: int) -> None:
        self._record = record
        #: Not the gateway's id alone: the connection that the client lost may be this gateway's too, and its end must
        #: not cancel what is resumed here.
        self._listener = f"{gateway.gateway_id}{keys.LISTENER_MARK}{secrets.token_hex(4)}"
        self._closers: list[Callable[[], None]] = []
        super().__init__(gateway, _rebuild_call(record), record.request_id, resumed_mono_ns)
        self.created_at_s = record.created_at_s

    def _build_part(self, i: int, accepted_mono_ns: int) -> Part:
        record = self._record
        request = GenerateRequest(
            request_id=record.part_ids[i],
            model=record.model,
            gateway_id=record.gateway_id,
            prompt="",
            sampling=self.call.sampling,
            num_choices=record.num_choices,
            tenant=record.tenant,
            accepted_at_s=time.time(),
        )
        return Part(request, i)

    async def start(self, on_step: OnStep | None = None, on_vector: OnVector | None = None) -> None:
        """Listen where the call began, and read its logs from the start.

        Raises:
            GlowplugError: Redis does not answer (503).
        """
        self._on_step, self._on_vector = on_step, on_vector
        gateway = self._gateway
        pipeline = gateway.redis.pipeline(transaction=False)
        async with redis_within(gateway.settings.redis_limit_s, "resuming the request"), pipeline:
            for part_id in self._record.part_ids:
                pipeline.set(keys.listener(part_id), self._listener, ex=keys.RECORD_TTL_S, xx=True)
            await pipeline.execute()
        self._closers.append(gateway.hub.listen_to(self._record.gateway_id))
        for part in self.parts:
            part_id, callback = part.request.request_id, self._make_callback(part)
            self._closers.append(gateway.hub.open_again(part_id, callback, self._on_part_lost))

    def _on_part_lost(self) -> None:
        self.fail(LOST)  # only the gateway that took the request still has its prompt

    def close(self) -> None:
        """Stop listening. The sweeper ends what nobody listens to. Idempotent."""
        if not self._closers:
            return
        while self._closers:
            self._closers.pop()()
        self._gateway.run_in_background(self._leave(), name=f"leave:{self.request_id}")

    async def _leave(self) -> None:
        leave = self._gateway.redis.register_script(_LEAVE)
        try:
            for part in self.parts:
                await leave(keys=[keys.listener(part.request.request_id)], args=[self._listener])
        except (RedisError, OSError) as error:
            self._log.warning("listener_not_removed", request_id=self.request_id, error=str(error))

    async def record(self) -> Trace:
        """The trace that the first gateway kept, or one made here if that died before it could."""
        async with redis_within(self._gateway.settings.redis_limit_s, "reading a trace"):
            known = await self._gateway.traces.find(self.request_id)
        return known if known is not None else await super().record()


async def resume_stream(request: web.Request) -> web.StreamResponse:
    """``GET /v1/requests/{request_id}/stream``: a stream's rest after ``Last-Event-ID`` (or ``?after=``)."""
    given = request.headers.get(HEADER) or request.query.get("after") or ""
    request_id = request.match_info["request_id"].removeprefix("chatcmpl-").removeprefix("cmpl-")
    named, seen = read_event_id(given) if given else ("", ())
    if named and named != request_id:
        raise _not_found(request_id)
    return await _resume(request, request_id, seen)


async def resume_by_header(request: web.Request) -> web.StreamResponse | None:
    """A POST that a client sent again after it lost its stream: the rest of that one. None: it names no event."""
    given = request.headers.get(HEADER)
    if not given:
        return None
    request_id, seen = read_event_id(given)
    return await _resume(request, request_id, seen)


async def _resume(request: web.Request, request_id: str, seen: tuple[int, ...]) -> web.StreamResponse:
    gateway, facts = request.app[GATEWAY], request[FACTS]
    facts.endpoint = ENDPOINT
    record = await _find_record(gateway, request_id)
    if record is None or len(seen) not in (0, len(record.part_ids)):
        raise _not_found(request_id)
    if record.tenant != gateway.tenant_of(request) or not request[IDENTITY].may_see(record.model):
        raise _not_found(request_id)
    facts.model, facts.stream = record.model, True
    facts.request_id = record.request_id
    exchange = ResumedExchange(gateway, record, time.monotonic_ns())
    gateway.metrics.on_in_flight(record.model, +1)
    try:
        return await StreamedCall(request, gateway, exchange, seen).run()
    finally:
        exchange.close()
        facts.note_exchange(exchange.error)
        gateway.metrics.on_in_flight(record.model, -1)


async def _find_record(gateway: Gateway, request_id: str) -> RequestRecord | None:
    if not is_request_id(request_id):
        return None
    redis: Any = gateway.redis  # redis-py types each reply as sync-or-async
    async with redis_within(gateway.settings.redis_limit_s, "looking for the request"):
        data = await redis.get(keys.record(request_id))
    try:
        return None if data is None else codec.decode(data, RequestRecord)
    except ContractError:
        return None


def _not_found(request_id: str) -> HttpError:
    message = (
        f'no stream of request "{request_id[:64]}" can be resumed with this key: it never was one, or it ended more '
        f"than {keys.LOG_TTL_S // 60} minutes ago"
    )
    return HttpError(404, message, code="request_not_found")


def _rebuild_call(record: RequestRecord) -> Call:
    """As much of the call as its events are made of."""
    return Call(
        endpoint=Endpoint(record.endpoint),
        card=ModelCard(record.model, record.snapshot_id),
        prompts=record.echoes or ("",) * len(record.part_ids),
        sampling=SamplingParams(0, 0),
        num_choices=record.num_choices,
        stream=True,
        include_usage=record.include_usage,
        echo=bool(record.echoes),
        priority=Priority.INTERACTIVE,
        user=None,
        tools=ToolUse(ToolStyle(record.tool_style), frozenset(record.tool_names)) if record.tool_style else None,
    )
