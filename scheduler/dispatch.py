"""The control side of the queue: put requests in, take them out, end the ones nobody will run."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from scheduler.contract import codec, job_queue, keys, token_log
from scheduler.contract.connection import CONNECTION_ERRORS
from scheduler.contract.errors import ContractError, ErrorCode, ErrorInfo, GlowplugError
from scheduler.contract.messages import Demand, GenerateRequest, RequestRecord, TerminalFrame
from scheduler.contract.states import Priority

_log = structlog.get_logger()

#: Claims go by score, lowest first; the first score of each class. Within a class tenants share by weight.
FIRST_SCORE: Final = {Priority.INTERACTIVE: 0, Priority.BATCH: job_queue.BATCH_SCORE}
#: What a request costs its tenant's share, in tokens: prompt bytes by four, and at most this many for each choice.
FAIR_BYTES_PER_TOKEN: Final = 4
FAIR_MAX_COMPLETION_TOKENS: Final = 512
DEFAULT_MAX_QUEUED: Final = 1000
QUEUE_FULL_RETRY_AFTER_S: Final = 2
OVERLOADED_RETRY_AFTER_S: Final = 5
FAIL_BATCH: Final = 100
#: What the owner of a lease begins with that no worker holds.
CONTROL_OWNER: Final = "control:"
CONTROL_LEASE_MS: Final = 15_000


class QueueFull(GlowplugError):
    """A model has as many requests queued or running as it may: ``depth``. The request was not queued."""

    def __init__(self, model: str, depth: int, max_queued: int) -> None:
        super().__init__(
            ErrorCode.QUEUE_FULL,
            f"model {model!r} has {depth} requests queued or running, the limit is {max_queued}: "
            f"try again in {QUEUE_FULL_RETRY_AFTER_S} s",
            retry_after_s=QUEUE_FULL_RETRY_AFTER_S,
        )
        self.depth = depth


class Dispatcher:
    """Queue operations of gateways and of the scheduler. Stateless; any number may work at once."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._enqueue = redis.register_script(job_queue.ENQUEUE)
        self._cancel = redis.register_script(job_queue.CANCEL)
        self._claim = redis.register_script(job_queue.CLAIM)
        self._finish = redis.register_script(job_queue.FINISH)
        self._recover = redis.register_script(job_queue.RECOVER)

    async def enqueue(
        self,
        request: GenerateRequest,
        max_queued: int = DEFAULT_MAX_QUEUED,
        *,
        weight: float = 1.0,
        record: RequestRecord | None = None,
    ) -> int:
        """Queue a request, wake a claiming worker and tell the scheduler, in one round trip.

        ``weight`` is the share of ``request.tenant`` against other tenants' where several wait for one model.
        ``record`` lets a client that lost its gateway go on at another.

        Requires: the caller's gateway channel is subscribed. On success: returns how many requests of the model were
        queued or running before it. On failure: nothing was queued. Retrying the call after a lost reply is safe.

        Raises:
            QueueFull: ``max_queued`` requests are queued or running.
            GlowplugError: INVALID_REQUEST for an id that is queued, running or just finished; OVERLOADED when Redis is
                out of memory or unreachable.
        """
        try:
            outcome, depth = await self._enqueue(
                keys=_enqueue_keys(request), args=_enqueue_arguments(request, max_queued, weight, record)
            )
        except (*CONNECTION_ERRORS, OutOfMemoryError) as error:
            raise GlowplugError(
                ErrorCode.OVERLOADED,
                f"the request could not be queued ({type(error).__name__}): try again",
                retry_after_s=OVERLOADED_RETRY_AFTER_S,
            ) from error
        if outcome == job_queue.FULL:
            raise QueueFull(request.model, int(depth), max_queued)
        if outcome == job_queue.DUPLICATE:
            raise GlowplugError(
                ErrorCode.INVALID_REQUEST, f"request id {request.request_id!r} is already in use: send another one"
            )
        return int(depth)

    async def recover(
        self, request: GenerateRequest, *, weight: float = 1.0, record: RequestRecord | None = None
    ) -> int:
        """Queue an accepted request again whose job the server has lost; what :data:`job_queue.RECOVER` found.

        Requires: ``request.generation`` is higher than before, and the frames that its client has seen are in the log.

        Raises:
            RedisError: the server could not be reached, or refused the write.
        """
        found = await self._recover(
            keys=[
                *_enqueue_keys(request),
                keys.token_log(request.request_id),
                keys.cancelled(request.request_id),
            ],
            args=_enqueue_arguments(request, 0, weight, record),
        )
        return int(found)

    async def cancel(self, request_id: str, model: str, gateway_id: str = "") -> bool:
        """The client went away: end the request if it has not started, else tell the run. Idempotent.

        Returns whether it had not started. Either way a run that begins later ends at once. With ``gateway_id``:
        nothing happens when the client has gone on at another gateway.

        Raises:
            RedisError: the server could not be reached.
        """
        dropped = await self._cancel(
            keys=[
                keys.cancelled(request_id),
                keys.in_progress(request_id),
                keys.queue(model),
                keys.job(request_id),
                keys.retry(request_id),
                keys.listener(request_id),
            ],
            args=[request_id, keys.REQUEST_TTL_S, keys.control_channel(model), gateway_id],
        )
        if dropped == 1:  # no run will end its log
            error = ErrorInfo(ErrorCode.CANCELLED, "the client went away before the request ran")
            await token_log.end_log(self._redis, request_id, gateway_id, TerminalFrame(error=error))
        return bool(dropped == 1)

    async def queue_depth(self, model: str) -> int:
        """Requests of ``model`` that are queued or running."""
        return int(await self._redis.zcard(keys.queue(model)))

    async def queue_depths(self, models: Iterable[str]) -> dict[str, int]:
        """Requests queued or running for each of ``models``, in one round trip."""
        names = list(models)
        async with self._redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.zcard(keys.queue(name))
            depths = await pipeline.execute()
        return dict(zip(names, depths, strict=True))

    async def fail_queued(self, model: str, error: ErrorInfo) -> int:
        """End every request of ``model`` that is queued and not running with ``error``; returns how many.

        Each gets exactly one terminal frame. Workers cannot claim them meanwhile; if this process dies half way, the
        rest becomes claimable when the lease ends.

        Raises:
            RedisError: the server could not be reached.
        """
        owner = f"{CONTROL_OWNER}{secrets.token_hex(4)}"
        num_failed = 0
        while claimed := await self._claim(
            keys=[keys.queue(model)], args=["+inf", FAIL_BATCH, CONTROL_LEASE_MS, owner, 1_000_000, "0"]
        ):
            request_ids = [request_id.decode() for request_id in claimed[::3]]
            bodies = await self._redis.mget([keys.job(request_id) for request_id in request_ids])
            for request_id, body in zip(request_ids, bodies, strict=True):
                num_failed += await self._fail_claimed(request_id, model, body, error, owner)
        return num_failed

    async def fail_request(self, request: GenerateRequest, error: ErrorInfo) -> bool:
        """End one request with ``error``, running or not; no run can write to it any more. False: it had ended.

        Raises:
            RedisError: the server could not be reached.
        """
        return await token_log.end_log(self._redis, request.request_id, request.gateway_id, TerminalFrame(error=error))

    async def end_abandoned(self, request_id: str, model: str, error: ErrorInfo) -> None:
        """End a request of which only the place in the queue is left.

        Raises:
            RedisError: the server could not be reached.
        """
        listener = await self._redis.get(keys.listener(request_id))
        gateway_id = listener.decode().partition(keys.LISTENER_MARK)[0] if listener else ""
        await token_log.end_log(self._redis, request_id, gateway_id, TerminalFrame(error=error))
        await self._finish_as(f"{CONTROL_OWNER}{secrets.token_hex(4)}", request_id, model)

    async def end_lost_log(self, request_id: str, gateway_id: str, error: ErrorInfo) -> bool:
        """End the log of a request of which nothing else is left; False: it had ended.

        Raises:
            RedisError: the server could not be reached.
        """
        return await token_log.end_log(self._redis, request_id, gateway_id, TerminalFrame(error=error))

    async def _finish_as(self, owner: str, request_id: str, model: str) -> None:
        await self._finish(
            keys=[
                keys.in_progress(request_id),
                keys.result(request_id),
                keys.retry(request_id),
                keys.job(request_id),
                keys.queue(model),
                keys.bell(model),
            ],
            args=[owner, request_id, "1", keys.RESULT_TTL_S],
        )

    async def _fail_claimed(
        self, request_id: str, model: str, body: bytes | None, error: ErrorInfo, owner: str
    ) -> bool:
        ended = False
        try:
            if body is not None:
                ended = await self.fail_request(job_queue.decode_job(body), error)
        except ContractError as malformed:
            _log.error("job_body_refused", request_id=request_id, error=str(malformed))
        await self._finish_as(owner, request_id, model)
        return ended


def compute_fair_cost(request: GenerateRequest) -> int:
    """What ``request`` counts in its tenant's share, in tokens: an estimate, since nobody has tokenised it yet."""
    if request.embedding is not None:
        return sum(estimate_tokens(one) for one in request.embedding.inputs)
    completion = min(request.sampling.max_tokens, FAIR_MAX_COMPLETION_TOKENS) * request.num_choices
    return estimate_tokens(request.prompt) + completion


def estimate_tokens(prompt: str | tuple[int, ...]) -> int:
    """About how many tokens a prompt has."""
    return 1 + (len(prompt) // FAIR_BYTES_PER_TOKEN if isinstance(prompt, str) else len(prompt))


def _enqueue_keys(request: GenerateRequest) -> list[str]:
    return [
        keys.job(request.request_id),
        keys.result(request.request_id),
        keys.queue(request.model),
        keys.bell(request.model),
        keys.INBOX,
        keys.fair(request.model),
        keys.listener(request.request_id),
        keys.record(request.request_id),
    ]


def _enqueue_arguments(
    request: GenerateRequest, max_queued: int, weight: float, record: RequestRecord | None
) -> list[Any]:
    now_ms = int(time.time() * 1000)
    demand = Demand(request.model, request.request_id, time.monotonic_ns())
    return [
        max_queued,
        keys.REQUEST_TTL_S * 1000,
        job_queue.encode_job(request, now_ms),
        FIRST_SCORE[request.priority],
        request.request_id,
        codec.encode(demand),
        keys.INBOX_MAX_ENTRIES,
        request.tenant,
        max(1, math.ceil(compute_fair_cost(request) / weight)),
        request.gateway_id,
        b"" if record is None else codec.encode(record),
    ]
