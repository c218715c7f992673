"""The gateway's end of the token bus: one subscription, and exact, in-order delivery to any number of open streams.

Live messages are the fast path. Whatever they miss is read from the token log: on a jump in sequence numbers, after
each (re)subscribe, and for streams that have been silent for a while. A frame is delivered when its number is the
stream's next one, dropped when it is older; so each is delivered once, whichever way it came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.contract import codec, keys, token_log
from scheduler.contract.codec import Frame
from scheduler.contract.connection import CONNECTION_ERRORS
from scheduler.contract.errors import ContractError, ErrorCode, ErrorInfo
from scheduler.contract.messages import StageEvent, TerminalFrame
from scheduler.contract.subscription import Subscription
from scheduler.gateway.frame_tape import FrameTape

_log = structlog.get_logger()

OnFrame = Callable[[Frame], None]
OnStage = Callable[[StageEvent], None]
OnLost = Callable[[], None]

ANY_MODEL: Final = "*"  # no model's name: those have no asterisk
SILENCE_S: Final = 0.5  # after this long without a frame, a stream's log is read
MAX_SILENCE_S: Final = 4.0  # reads back off to this while nothing comes (a model that is still waking)
FILL_BATCH: Final = 500  # streams per pipeline


class HubStatistics(NamedTuple):
    """Counts since the start, and the present number of streams."""

    open_streams: int
    live: int  # frames delivered from messages
    filled: int  # frames delivered from logs
    duplicates: int
    gaps: int
    unknown: int  # frames of streams that are not open
    repaired: int  # logs given back what the server had lost
    reconnects: int
    callback_errors: int


@dataclass(slots=True, eq=False)
class _Stream:
    request_id: str
    on_frame: OnFrame
    on_lost: OnLost | None
    next_seq: int
    heard_s: float  # loop time of the last frame, or of the last look at the log
    silence_s: float
    delivered: FrameTape = field(default_factory=FrameTape)  # from first_seq on, for a server that lost them
    first_seq: int = 0
    filling: bool = False
    fill_again: bool = False  # more was announced while its log was being read
    is_queued: bool = False  # its job is in the queue: if it is there no more without a terminal frame, it was lost
    closed: bool = False


@dataclass(slots=True)
class _OtherChannel:
    """Another gateway's channel, while streams that began there are open here."""

    subscription: Subscription
    num_listeners: int = 0


class Hub:
    """One per gateway process, used on its event loop only. Start it before anything is enqueued.

    Callbacks run synchronously in the loop and must not block. One that raises is logged and its stream closed;
    others are not affected.
    """

    def __init__(self, redis: Redis, gateway_id: str, *, silence_s: float = SILENCE_S) -> None:
        self._redis = redis
        self._silence_s = silence_s
        self._max_silence_s = max(silence_s, MAX_SILENCE_S)
        self._channel = keys.gateway_channel(gateway_id)
        self._repair_tail = redis.register_script(token_log.REPAIR_TAIL)
        self._subscription = Subscription(redis, [self._channel, keys.EVENTS], self._on_message, self._on_subscribed)
        self._others: dict[str, _OtherChannel] = {}  # channels of other gateways, whose streams are resumed here
        self._streams: dict[str, _Stream] = {}
        self._further: dict[str, list[_Stream]] = {}  # resumed ones
        self._stage_watchers: dict[str, list[OnStage]] = {}
        self._fills: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._live = self._filled = self._duplicates = self._gaps = 0
        self._unknown = self._repaired = self._callback_errors = 0

    async def start(self) -> None:
        """Subscribe; returns when nothing published from now on can be missed."""
        await self._subscription.start()

    async def aclose(self) -> None:
        """Unsubscribe and forget all streams. Idempotent."""
        await self._subscription.aclose()
        await asyncio.gather(*(other.subscription.aclose() for other in self._others.values()))
        self._others.clear()
        for stream in self._all_streams():
            self._close(stream)
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        for task in self._fills:
            task.cancel()
        await asyncio.gather(*self._fills, return_exceptions=True)

    @property
    def cut_off_for_s(self) -> float:
        """How long the server has been away; 0 while it is there."""
        return self._subscription.lost_for_s

    def open(
        self,
        request_id: str,
        on_frame: OnFrame,
        *,
        start: int = 0,
        on_lost: OnLost | None = None,
    ) -> None:
        """Deliver the request's frames from number ``start`` on. Open before enqueueing, or frames may arrive late.

        The stream closes by itself after its terminal frame. ``on_lost`` is called when the request is neither in the
        queue nor ended, once after each :meth:`expect`.

        Raises:
            ValueError: the stream is open already.
        """
        if request_id in self._streams:
            raise ValueError(f"stream {request_id} is open already")
        loop = asyncio.get_running_loop()
        stream = _Stream(request_id, on_frame, on_lost, start, loop.time(), self._silence_s, first_seq=start)
        self._streams[request_id] = stream
        if start > 0:
            self._fill([stream])
        self._ensure_watch()

    def open_again(self, request_id: str, on_frame: OnFrame, on_lost: OnLost) -> Callable[[], None]:
        """A further stream of a request that was enqueued earlier, here or elsewhere, from its first frame on.

        The result closes it; it closes by itself after its terminal frame.
        """
        loop = asyncio.get_running_loop()
        stream = _Stream(request_id, on_frame, on_lost, 0, loop.time(), self._silence_s, is_queued=True)
        self._further.setdefault(request_id, []).append(stream)
        self._fill([stream])
        self._ensure_watch()
        return lambda: self._close(stream)

    def expect(self, request_id: str) -> None:
        """The request is in the queue from now on."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.is_queued = True

    def listen_to(self, gateway_id: str) -> Callable[[], None]:
        """Hear also what is published for another gateway, whose streams are resumed here; the result ends that.

        Workers need not be told: they go on publishing where the request began. Costs a connection while in use.
        """
        if keys.gateway_channel(gateway_id) == self._channel:
            return lambda: None
        other = self._others.get(gateway_id)
        if other is None:
            channel = keys.gateway_channel(gateway_id)
            subscription = Subscription(self._redis, [channel], self._on_message, self._on_subscribed)
            other = self._others[gateway_id] = _OtherChannel(subscription)
            self._run(subscription.start(), f"subscribe to {channel}")
        other.num_listeners += 1

        def stop_listening() -> None:
            other.num_listeners -= 1
            if other.num_listeners == 0 and self._others.get(gateway_id) is other:
                del self._others[gateway_id]
                self._run(other.subscription.aclose(), f"unsubscribe from {gateway_id}")

        return stop_listening

    def close(self, request_id: str) -> None:
        """Deliver nothing more of this request. Idempotent."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._close(stream)

    def _close(self, stream: _Stream) -> None:
        stream.closed = True
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
        further = self._further.get(stream.request_id, [])
        if stream in further:
            further.remove(stream)
        if not further:
            self._further.pop(stream.request_id, None)

    def watch_stages(self, model: str, on_stage: OnStage) -> Callable[[], None]:
        """Call ``on_stage`` for each stage event of ``model``; the result ends that. Events may be missed."""
        watchers = self._stage_watchers.setdefault(model, [])
        watchers.append(on_stage)

        def unwatch() -> None:
            if on_stage in watchers:
                watchers.remove(on_stage)
            if not watchers and self._stage_watchers.get(model) is watchers:
                del self._stage_watchers[model]

        return unwatch

    def watch_all_stages(self, on_stage: OnStage) -> Callable[[], None]:
        """As :meth:`watch_stages`, of every model."""
        return self.watch_stages(ANY_MODEL, on_stage)

    def statistics(self) -> HubStatistics:
        """Counts since the start, and the present number of streams."""
        return HubStatistics(
            open_streams=len(self._all_streams()),
            live=self._live,
            filled=self._filled,
            duplicates=self._duplicates,
            gaps=self._gaps,
            unknown=self._unknown,
            repaired=self._repaired,
            reconnects=self._subscription.num_reconnects,
            callback_errors=self._callback_errors,
        )

    # --- what comes in ----------------------------------------------------------------------------------------

    def _on_message(self, channel: str, data: bytes) -> None:
        try:
            if channel == keys.EVENTS:
                self._on_stage(codec.decode(data, StageEvent))
            else:
                self._on_items(token_log.decode_items(data))
        except ContractError as error:
            # A token message's frames are in the logs; silence will lead there.
            _log.error("message_refused", channel=channel, error=str(error))

    def _on_items(self, items: Iterable[token_log.TokenItem]) -> None:
        behind: list[_Stream] = []
        now_s = asyncio.get_running_loop().time()
        for request_id, seq, frame in items:
            stream = self._streams.get(request_id)
            if stream is not None:
                self._on_item(stream, seq, frame, now_s, behind)
            elif request_id not in self._further:
                self._unknown += 1
            if self._further:
                for further in tuple(self._further.get(request_id, ())):
                    self._on_item(further, seq, frame, now_s, behind)
        if behind:
            self._fill(behind)

    def _on_item(self, stream: _Stream, seq: int, frame: bytes, now_s: float, behind: list[_Stream]) -> None:
        if seq == stream.next_seq:
            self._live += 1
            self._deliver(stream, frame, now_s)
        elif seq < stream.next_seq:
            self._duplicates += 1
        else:
            self._gaps += 1
            behind.append(stream)

    def _on_stage(self, event: StageEvent) -> None:
        watchers = (*self._stage_watchers.get(event.model, ()), *self._stage_watchers.get(ANY_MODEL, ()))
        for on_stage in watchers:
            try:
                on_stage(event)
            except Exception:  # a watcher's fault must not stop the others' tokens
                self._callback_errors += 1
                _log.exception("stage_callback_failed", model=event.model)

    def _on_subscribed(self) -> None:
        self._fill(self._all_streams())

    def _all_streams(self) -> list[_Stream]:
        return [*self._streams.values(), *(stream for further in self._further.values() for stream in further)]

    def _ensure_watch(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(self._silence_s / 2, self._on_watch)

    def _on_watch(self) -> None:
        """Look after streams that have been silent; runs only while streams are open."""
        self._watch = None
        streams = self._all_streams()
        if not streams:
            return
        now_s = asyncio.get_running_loop().time()
        silent = [stream for stream in streams if now_s - stream.heard_s >= stream.silence_s]
        for stream in silent:
            stream.silence_s = min(2 * stream.silence_s, self._max_silence_s)
        self._fill(silent)
        self._ensure_watch()

    def _deliver(self, stream: _Stream, data: bytes, now_s: float) -> None:
        """Hand over frame ``stream.next_seq``."""
        stream.next_seq += 1
        stream.heard_s = now_s
        stream.silence_s = self._silence_s
        stream.delivered.append(data)
        frame: Frame
        try:
            frame = codec.decode_frame(data)
        except ContractError as error:
            _log.error("frame_refused", request_id=stream.request_id, seq=stream.next_seq - 1, error=str(error))
            frame = TerminalFrame(
                error=ErrorInfo(ErrorCode.INTERNAL, "the token log holds a frame that does not decode")
            )
        if isinstance(frame, TerminalFrame):
            self._close(stream)
        try:
            stream.on_frame(frame)
        except Exception:  # one client's sink must not stop the others' tokens
            self._callback_errors += 1
            _log.exception("frame_callback_failed", request_id=stream.request_id)
            if not stream.closed:
                self._close(stream)

    # --- gap fill ---------------------------------------------------------------------------------------------

    def _fill(self, streams: Iterable[_Stream]) -> None:
        wanted: list[_Stream] = []
        for stream in streams:
            if stream.filling:
                stream.fill_again = True
            elif not stream.closed:
                stream.filling = True
                wanted.append(stream)
        if wanted:
            self._run(self._read_logs(wanted), "gap fill")

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._fills.add(task)
        task.add_done_callback(self._fills.discard)

    async def _read_logs(self, streams: list[_Stream]) -> None:
        again: list[_Stream] = []
        try:
            for begin in range(0, len(streams), FILL_BATCH):
                await self._read_batch(streams[begin : begin + FILL_BATCH])
            again = [stream for stream in streams if stream.fill_again]
        except (*CONNECTION_ERRORS, RedisError) as error:
            _log.warning("gap_fill_failed", streams=len(streams), error=str(error))  # silence leads here again
        finally:
            for stream in streams:
                stream.filling = stream.fill_again = False
        self._fill(again)

    async def _read_batch(self, streams: list[_Stream]) -> None:
        starts = [stream.next_seq for stream in streams]
        were_queued = [stream.is_queued for stream in streams]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for stream, start in zip(streams, starts, strict=True):
                log = keys.token_log(stream.request_id)
                # The job first: one that ends in between is missed there and has its terminal frame here.
                pipeline.exists(keys.job(stream.request_id))
                pipeline.llen(log)
                pipeline.lrange(log, start, -1)
            replies = await pipeline.execute()
        now_s = asyncio.get_running_loop().time()
        rows = zip(streams, starts, were_queued, replies[::3], replies[1::3], replies[2::3], strict=True)
        for stream, start, was_queued, has_job, length, frames in rows:
            stream.heard_s = now_s
            for seq, data in enumerate(frames, start):
                # Live messages may have overtaken this reply: only the next one counts.
                if seq == stream.next_seq and not stream.closed:
                    self._filled += 1
                    self._deliver(stream, data, now_s)
            if length < start and not stream.closed:
                await self._repair(stream)
            if was_queued and not has_job and not stream.closed:
                stream.is_queued = False
                if stream.on_lost is not None:
                    stream.on_lost()

    async def _repair(self, stream: _Stream) -> None:
        """The server lost frames that the client has seen: give them back, so that a new run goes on from there."""
        self._repaired += 1
        _log.warning("token_log_given_back", request_id=stream.request_id, frames=len(stream.delivered))
        await self._repair_tail(
            keys=[keys.token_log(stream.request_id)], args=[stream.first_seq, keys.LOG_TTL_S, *stream.delivered]
        )
