"""Ask a model through Redis, with plain arq and msgspec: no HTTP, and nothing of glowplug is imported.

    export REDIS_URL=unix:///path/to/redis.sock
    python examples/enqueue_with_arq.py MODEL "The sea is salt because" "Twice two is"

Names, messages and keys: docs/queue.md. Whoever can write to Redis can use every model: keep it to yourself.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from typing import Any

import msgspec
from arq.connections import ArqRedis
from redis.asyncio import Redis

BATCH_SCORE = 10**12  # the first score of batch jobs; below: interactive ones
WAIT_S = 120.0


async def enqueue(redis: ArqRedis, model: str, prompt: str, *, max_tokens: int = 64) -> str:
    """Queue one completion behind the model's interactive requests, and wake the model; its id."""
    request_id = uuid.uuid4().hex
    request = {
        "request_id": request_id,
        "model": model,
        "gateway_id": f"script-{os.getpid()}",
        "prompt": prompt,
        "sampling": {"seed": 1, "max_tokens": max_tokens, "temperature": 0.0},
        "priority": "batch",
    }
    name = f"gp:q:{model}"
    # Before the job, so that no sweep sees a request that nobody waits for.
    await redis.set(f"gp:listener:{request_id}", request["gateway_id"], ex=4200)
    job = await redis.enqueue_job("generate", msgspec.msgpack.encode(request), _job_id=request_id, _queue_name=name)
    if job is None:
        raise RuntimeError(f"{request_id} is in use")
    await redis.zadd(name, {request_id: BATCH_SCORE}, xx=True)  # arq's own score is a time: see docs/queue.md
    await redis.xadd(f"{name}:bell", {"r": "1"}, maxlen=1)
    demand = {"type": "demand", "model": model, "request_id": request_id, "sent_mono_ns": time.monotonic_ns()}
    await redis.xadd("gp:inbox", {"m": msgspec.msgpack.encode(demand)}, maxlen=10_000)
    return request_id


async def read_answer(redis: Redis, request_id: str) -> tuple[str, dict[str, Any]]:
    """The text and the last frame, from the request's log.

    Raises:
        TimeoutError: no end within WAIT_S.
        RuntimeError: the request ended with an error.
    """
    text, position = "", 0
    async with asyncio.timeout(WAIT_S):
        while True:
            for frame in await redis.lrange(f"gp:log:{request_id}", position, -1):  # type: ignore[misc]
                position += 1
                kind, body = frame[:1], msgspec.msgpack.decode(frame[1:])
                if kind == b"t":
                    text += "".join(event[2] for event in body[0])  # events: choice, token id, text, ...
                elif kind == b"f":
                    if error := body.get("error"):
                        raise RuntimeError(f"{error['code']}: {error['message']}")
                    return text, body
            await asyncio.sleep(0.05)


async def main(model: str, prompts: list[str]) -> None:
    """Queue every prompt, then print the answers in order."""
    pool = Redis.from_url(os.environ["REDIS_URL"]).connection_pool
    redis = ArqRedis(pool, job_serializer=msgspec.msgpack.encode, job_deserializer=msgspec.msgpack.decode)
    request_ids = [await enqueue(redis, model, prompt) for prompt in prompts]
    for request_id in request_ids:
        text, end = await read_answer(redis, request_id)
        print(msgspec.json.encode({"id": request_id, "text": text, "usage": end.get("usage")}).decode())
    await pool.disconnect()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
