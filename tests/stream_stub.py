"""A process that stands in for all workers of a model: every request gets tokens at a steady rate, without a model.

``python -m tests.stream_stub STATE_DIR --rate 20 --tokens 1200`` starts the queue's server in STATE_DIR, publishes the
model ``stub`` and prints one JSON line with the server's URL; SIGTERM ends both, after a second line with its counts.
Each token's text is ``NUMBER:SAMPLED;``: its place in its stream and the monotonic nanosecond at which it was made.
Streams step in groups, as the batches of workers do, spread evenly over the time between two tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any, Final

import uvloop
from redis.asyncio import Redis

from scheduler.contract import codec, job_queue, keys
from scheduler.contract.connection import connect
from scheduler.contract.messages import (
    Demand,
    InboxMessage,
    ModelCard,
    ModelStatus,
    StatusReport,
    StepFrame,
    TerminalFrame,
    TokenEvent,
    Usage,
)
from scheduler.contract.states import FinishReason, Tier
from scheduler.contract.subscription import Subscription
from scheduler.contract.telemetry import configure_logging
from scheduler.embedded_redis import ensure_server, stop_server
from worker.publisher import Run, TokenPublisher

MODEL: Final = "stub"
TEMPLATE: Final = "{% for message in messages %}{{ message.content }}{% endfor %}"
GROUP_SIZE: Final = 64  # streams of one step, as in a worker's batch
MAX_LAG_S: Final = 5.0  # steps that are later than this are left out: the rate cannot be held


class StreamStub:
    """All streams of the model. Event loop only."""

    def __init__(self, redis: Redis, rate_per_s: float, num_tokens: int) -> None:
        self.steps_late_s: list[float] = []
        self.num_begun = self.num_cancelled = self.num_ended = self.num_tokens = self.num_skipped = 0
        self._redis: Any = redis
        self._rate_per_s = rate_per_s
        self._tokens_each = num_tokens
        self._publisher = TokenPublisher(redis)
        self._groups: list[dict[str, Run]] = []
        self._sent: dict[str, int] = {}
        self._control = Subscription(redis, [keys.control_channel(MODEL)], self._on_cancel, lambda: None)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Take every request that is announced; until cancelled."""
        await self._control.start()
        self._start(self._report())
        last_id = b"0-0"
        try:
            while True:
                found = await self._redis.xread({keys.INBOX: last_id}, count=500, block=1000)
                for entry_id, fields in found[0][1] if found else []:
                    last_id = entry_id
                    message = codec.decode(fields[keys.FIELD.encode()], InboxMessage)
                    if isinstance(message, Demand):
                        await self._take(message.request_id)
        finally:
            for task in self._tasks:
                task.cancel()
            await self._control.aclose()
            await self._publisher.aclose()

    def counts(self) -> dict[str, float]:
        """What was done, and how late the steps were."""
        late_s = sorted(self.steps_late_s) or [0.0]
        return {
            "begun": self.num_begun,
            "cancelled": self.num_cancelled,
            "ended": self.num_ended,
            "tokens": self.num_tokens,
            "skipped": self.num_skipped,
            "late_p50_ms": round(late_s[len(late_s) // 2] * 1e3, 2),
            "late_p99_ms": round(late_s[int(len(late_s) * 0.99)] * 1e3, 2),
            "backlog_bytes": self._publisher.statistics().backlog_bytes,
        }

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report(self) -> None:
        """The card, and a status that runs out after some seconds like a scheduler's."""
        card = ModelCard(
            MODEL, "5ca1ab1e", context_length=1 << 20, vocab_size=1000, max_token_bytes=64, chat_template=TEMPLATE
        )
        await self._redis.hset(keys.MODELS, MODEL, codec.encode(card))
        while True:
            row = ModelStatus(MODEL, Tier.HOT, 1, 0, 0, None, 300.0, 1 << 20, 1 << 20, "ready")
            await self._redis.set(keys.STATUS, codec.encode(StatusReport(time.time(), "stub", (row,), ())))
            await asyncio.sleep(1)

    async def _take(self, request_id: str) -> None:
        body = await self._redis.get(keys.job(request_id))
        if body is None:
            return
        await self._redis.set(keys.in_progress(request_id), MODEL, ex=keys.REQUEST_TTL_S)
        run = await self._publisher.begin(job_queue.decode_job(body), 1)
        self.num_begun += 1
        if not self._groups or len(self._groups[-1]) >= GROUP_SIZE:
            self._groups.append({})
            self._start(self._step_group(self._groups[-1], len(self._groups) - 1))
        self._groups[-1][request_id] = run
        self._sent[request_id] = 0

    async def _step_group(self, group: dict[str, Run], index: int) -> None:
        """Steps of one group at its own phase; those that cannot be made in time are left out and counted."""
        loop, every_s = asyncio.get_running_loop(), 1 / self._rate_per_s
        due_s = loop.time() + every_s * ((index * 0.618) % 1)
        while True:
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            late_s = loop.time() - due_s
            self.steps_late_s.append(late_s)
            if late_s > MAX_LAG_S:
                skipped = int(late_s / every_s)
                self.num_skipped += skipped * len(group)
                due_s += skipped * every_s
            self._step(group)
            due_s += every_s

    def _step(self, group: dict[str, Run]) -> None:
        sampled_mono_ns = time.monotonic_ns()
        frames: list[tuple[str, codec.Frame]] = []
        for request_id in list(group):
            number = self._sent[request_id]
            self._sent[request_id] = number + 1
            is_last = number + 1 >= self._tokens_each
            reason = FinishReason.LENGTH if is_last else None
            event = TokenEvent(0, 1, f"{number}:{sampled_mono_ns};", reason)
            frames.append((request_id, StepFrame((event,), sampled_mono_ns)))
            self.num_tokens += 1
            if is_last:
                frames.append((request_id, TerminalFrame(Usage(1, number + 1))))
                self._finish(group, request_id)
        self._publisher.publish(frames)

    def _finish(self, group: dict[str, Run], request_id: str) -> None:
        self.num_ended += 1
        run = group.pop(request_id)
        self._start(self._end(run))

    async def _end(self, run: Run) -> None:
        """Out of the queue, once the last frame is in the log."""
        await self._publisher.wait_logged(run)
        self._publisher.end(run)
        await self._redis.zrem(keys.queue(MODEL), run.request_id)
        await self._redis.delete(keys.job(run.request_id), keys.in_progress(run.request_id))

    def _on_cancel(self, channel: str, data: bytes) -> None:
        request_id = data.decode()
        for group in self._groups:
            if request_id in group:
                self.num_cancelled += 1
                self._publisher.end(group.pop(request_id))
        self._start(self._drop(request_id))

    async def _drop(self, request_id: str) -> None:
        await self._redis.zrem(keys.queue(MODEL), request_id)


async def _serve(url: str, rate_per_s: float, num_tokens: int) -> dict[str, float]:
    redis = connect(url)
    stub = StreamStub(redis, rate_per_s, num_tokens)
    running = asyncio.create_task(stub.run())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, running.cancel)
    await asyncio.gather(running, return_exceptions=True)
    await redis.aclose()
    return stub.counts()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.stream_stub", description=__doc__)
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("--rate", type=float, default=20.0, help="tokens a second of each stream")
    parser.add_argument("--tokens", type=int, default=1200, help="tokens of each stream")
    options = parser.parse_args()
    configure_logging(component="stub", level="error")
    server = ensure_server(options.state_dir / "redis", maxmemory="4gb")
    print(json.dumps({"redis_url": server.url, "redis_pid": server.pid}), flush=True)
    try:
        print(json.dumps(uvloop.run(_serve(server.url, options.rate, options.tokens))), flush=True)
    finally:
        stop_server(options.state_dir / "redis")


if __name__ == "__main__":
    main()
