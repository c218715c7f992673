"""What the queue and token bus tests share: requests, frames, recorded streams, and a server that can be killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from scheduler.contract.connection import connect
from scheduler.contract.messages import GenerateRequest, SamplingParams, StepFrame, TerminalFrame, TokenEvent
from scheduler.embedded_redis import ensure_server, stop_server
from scheduler.gateway.hub import Hub
from worker.jobs import ClaimingWorker, JobHandler

MODEL = "tiny"
GATEWAY = "gateway-1"


def make_request(request_id: str, **changes: Any) -> GenerateRequest:
    """A small request of :data:`MODEL`."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "model": MODEL,
        "gateway_id": GATEWAY,
        "prompt": "a secret prompt",
        "sampling": SamplingParams(seed=1, max_tokens=8),
    }
    return GenerateRequest(**(fields | changes))


def make_step(number: int, text: str = "") -> StepFrame:
    """A frame that tells its own number."""
    return StepFrame((TokenEvent(0, number, text or f"t{number} "),), sampled_mono_ns=number)


class Recorder:
    """The callback of one stream: everything it was given."""

    def __init__(self) -> None:
        self.frames: list[StepFrame | TerminalFrame] = []

    def __call__(self, frame: StepFrame | TerminalFrame) -> None:
        self.frames.append(frame)

    @property
    def numbers(self) -> list[int]:
        """Token ids of the step frames, in the order of delivery."""
        return [frame.events[0].token_id for frame in self.frames if isinstance(frame, StepFrame)]

    @property
    def terminals(self) -> list[TerminalFrame]:
        return [frame for frame in self.frames if isinstance(frame, TerminalFrame)]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Redis]:
    """A client with the product's retry settings."""
    redis = connect(url)
    try:
        yield redis
    finally:
        await redis.aclose()


@asynccontextmanager
async def started_hub(redis: Redis, *, silence_s: float = 0.5) -> AsyncIterator[Hub]:
    """A hub of :data:`GATEWAY` that is subscribed."""
    hub = Hub(redis, GATEWAY, silence_s=silence_s)
    await hub.start()
    try:
        yield hub
    finally:
        await hub.aclose()


@asynccontextmanager
async def serving_worker(
    redis: Redis, handler: JobHandler, *, worker_id: str = "worker-1", room: int = 8, lease_s: float = 15.0
) -> AsyncIterator[ClaimingWorker]:
    """A worker of :data:`MODEL` that claims on this loop."""
    worker = ClaimingWorker(
        redis, model=MODEL, worker_id=worker_id, handler=handler, room=room, lease_s=lease_s, idle_poll_s=0.2
    )
    serving = asyncio.create_task(worker.serve())
    try:
        yield worker
    finally:
        await worker.aclose()
        await serving


class KillableServer:
    """A durable server of its own for one test, which may kill -9 and restart it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = ensure_server(folder, maxmemory="64mb")
        self.url = self._server.url

    @property
    def pid(self) -> int:
        return self._server.pid

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        os.kill(self._server.pid, signal.SIGKILL)
        os.waitpid(self._server.pid, 0)

    def restart(self) -> None:
        """Start it again over the same files."""
        self._server = ensure_server(self._folder, maxmemory="64mb")

    def stop(self) -> None:
        stop_server(self._folder)
