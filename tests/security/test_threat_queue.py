"""Threats through the queue and the files behind it: floods, stale workers, what belongs to another tenant."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from scheduler.api_keys import Scope, change_keys, create_key, key_file_path
from scheduler.contract import codec, job_queue, keys
from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import GenerateRequest, StepFrame, TerminalFrame
from scheduler.contract.states import Tier
from scheduler.crash_streak import REFUSED_FROM
from scheduler.dispatch import Dispatcher
from tests.eventually import eventually
from tests.gateway_fixtures import MODEL as GATEWAY_MODEL
from tests.gateway_fixtures import GatewayHarness, chat_body, make_card, make_status, run_gateway, stay_silent
from tests.queue_fixtures import MODEL, connected, make_request, make_step, serving_worker
from worker.jobs import release_worker
from worker.publisher import Fenced, TokenPublisher

CHAT = "/v1/chat/completions"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connected(redis_url) as client:
        yield client


async def claim(redis: Redis, room: int, owner: str = "w") -> list[str]:
    """Claim up to ``room`` requests, as a worker does."""
    script = redis.register_script(job_queue.CLAIM)
    found = await script(keys=[keys.queue(MODEL)], args=["+inf", room, 10_000, owner, 10_000, "0"])
    return [request_id.decode() for request_id in found[::3]]


async def test_threat_flood_of_one_tenant(redis: Redis) -> None:
    """Who has sent a hundred stands behind them; who sends one is served next, in mid-flood too."""
    dispatcher = Dispatcher(redis)
    for i in range(100):
        await dispatcher.enqueue(make_request(f"a{i}", tenant="a"))
    assert await claim(redis, 10) == [f"a{i}" for i in range(10)]
    await dispatcher.enqueue(make_request("b0", tenant="b"))
    await dispatcher.enqueue(make_request("b1", tenant="b"))
    assert await claim(redis, 5) == ["b0", "a10", "b1", "a11", "a12"]


async def test_threat_flood_of_one_tenant_is_bounded(redis_url: str, tmp_path: Path) -> None:
    """A queue that would take too long, by the measured time of service, is a 503 with how long; batch jobs wait."""
    async with run_gateway(redis_url, tmp_path, stay_silent, max_wait_s=10.0) as gateway:
        await gateway.publish(make_card(), status=make_status(Tier.HOT, state="ready"))
        admission = gateway.server.gateway.admission
        admission.on_served(GATEWAY_MODEL, 640.0)  # 64 at once: one ends each 10 s, so one may wait
        redis: Any = gateway.redis
        await redis.zadd(keys.queue(GATEWAY_MODEL), {f"r{i}": i for i in range(65)})
        status, headers, body = await gateway.post(CHAT, chat_body())
        assert (status, body["error"]["code"]) == (503, "overloaded")
        assert "20 s of work" in body["error"]["message"]
        assert headers["Retry-After"] == "10"
        batch = asyncio.create_task(gateway.post(CHAT, chat_body(priority="batch")))
        await eventually(lambda: gateway.worker.seen)
        batch.cancel()


async def test_threat_stale_worker_writes(redis: Redis) -> None:
    """A worker taken for dead whose request runs elsewhere: every frame that it writes is refused, also the last."""
    stale, newer = TokenPublisher(redis), TokenPublisher(redis)
    old_run = await stale.begin(make_request("r1"), 1)
    stale.publish([("r1", make_step(0))])
    await stale.wait_logged(old_run)
    new_run = await newer.begin(make_request("r1"), 2)
    stale.publish([("r1", make_step(666)), ("r1", TerminalFrame(worker_id="stale"))])
    with pytest.raises(Fenced):
        await stale.wait_logged(old_run)
    with pytest.raises(Fenced):
        await stale.begin(make_request("r1"), 1)
    newer.publish([("r1", make_step(1)), ("r1", TerminalFrame(worker_id="newer"))])
    await newer.wait_logged(new_run)
    frames = [codec.decode_frame(raw) for raw in await redis.lrange(keys.token_log("r1"), 0, -1)]  # type: ignore[misc]
    numbers = [frame.events[0].token_id for frame in frames if isinstance(frame, StepFrame)]
    assert numbers == [0, 1]
    assert [frame.worker_id for frame in frames if isinstance(frame, TerminalFrame)] == ["newer"]
    for publisher in (stale, newer):
        await publisher.aclose()


async def test_threat_stale_worker_writes_no_end(redis: Redis) -> None:
    """A run whose lease was given to another worker can neither finish the request nor put it back."""
    dispatcher, go, ended = Dispatcher(redis), asyncio.Event(), []

    async def run(request: GenerateRequest, attempt: int) -> None:
        await go.wait()
        ended.append(request.request_id)

    async with serving_worker(redis, run, worker_id="stale") as worker:
        await dispatcher.enqueue(make_request("r1"))
        await eventually(lambda: worker.num_running == 1)
        worker.pause_claims()
        await release_worker(redis, MODEL, "stale")
        assert await claim(redis, 1, "newer") == ["r1"]
        go.set()
        await eventually(lambda: ended == ["r1"] and worker.num_running == 0)
    assert await redis.get(keys.in_progress("r1")) == b"newer"
    assert await redis.exists(keys.job("r1"))
    assert await dispatcher.queue_depth(MODEL) == 1


def add_key(state_dir: Path, tenant: str) -> dict[str, str]:
    """Headers with a new key of ``tenant``."""
    key, token = create_key(tenant, (Scope.INFER, Scope.BATCH))
    change_keys(key_file_path(state_dir), lambda known: (*known, key))
    return {"Authorization": f"Bearer {token}"}


async def call(gateway: GatewayHarness, method: str, path: str, **options: Any) -> tuple[int, Any]:
    async with gateway.client.request(method, gateway.url + path, **options) as response:
        text = await response.text()
        return response.status, json.loads(text) if text.startswith("{") else text


async def test_threat_other_tenants_files(redis_url: str, tmp_path: Path) -> None:
    """Files and batches of another tenant are answered, read, used and deleted like those that do not exist."""
    acme, other = add_key(tmp_path, "acme"), add_key(tmp_path, "other")
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": chat_body()}
    async with run_gateway(redis_url, tmp_path, stay_silent) as gateway:
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", json.dumps(line).encode(), filename="secret.jsonl")
        status, uploaded = await call(gateway, "POST", "/v1/files", data=form, headers=acme)
        assert status == 200, uploaded
        order = {"input_file_id": uploaded["id"], "endpoint": CHAT, "completion_window": "24h"}
        status, batch = await call(gateway, "POST", "/v1/batches", json=order, headers=acme)
        assert status == 200, batch
        missing_file, missing_batch = "file-" + "0" * 32, "batch_" + "0" * 32
        for method, path, real, missing in (
            ("GET", "/v1/files/{}", uploaded["id"], missing_file),
            ("GET", "/v1/files/{}/content", uploaded["id"], missing_file),
            ("DELETE", "/v1/files/{}", uploaded["id"], missing_file),
            ("GET", "/v1/batches/{}", batch["id"], missing_batch),
            ("POST", "/v1/batches/{}/cancel", batch["id"], missing_batch),
        ):
            found = await call(gateway, method, path.format(real), headers=other)
            absent = await call(gateway, method, path.format(missing), headers=other)
            assert found[0] == absent[0] == 404, path
            assert json.dumps(found[1]).replace(real, missing) == json.dumps(absent[1]), path
        status, refused = await call(gateway, "POST", "/v1/batches", json=order, headers=other)
        assert status in (400, 404), refused
        for path in ("/v1/files", "/v1/batches"):
            assert (await call(gateway, "GET", path, headers=other))[1]["data"] == []
            assert len((await call(gateway, "GET", path, headers=acme))[1]["data"]) == 1


async def test_threat_poison_request(redis: Redis) -> None:
    """A request under which workers die is parked with an error that says so; the next one runs, and neither closes
    the model: what one request can cause stays below the deaths at which a model is held back."""
    dispatcher, ran = Dispatcher(redis), []
    await dispatcher.enqueue(make_request("poison"))
    for death in range(job_queue.MAX_CRASHES):
        assert await claim(redis, 1, f"dying-{death}") == ["poison"]
        assert await release_worker(redis, MODEL, f"dying-{death}", crashed=True) == 1

    async def run(request: GenerateRequest, attempt: int) -> None:
        ran.append(request.request_id)

    async with serving_worker(redis, run, worker_id="last"):
        await dispatcher.enqueue(make_request("harmless"))
        await eventually(lambda: dispatcher_is_empty(dispatcher))
    assert ran == ["harmless"]
    (raw,) = await redis.lrange(keys.token_log("poison"), 0, -1)  # type: ignore[misc]
    frame = codec.decode_frame(raw)
    assert isinstance(frame, TerminalFrame)
    assert frame.error is not None
    assert frame.error.code is ErrorCode.WORKER_FAILED
    assert "do not send it again" in frame.error.message
    assert job_queue.MAX_CRASHES * 2 <= REFUSED_FROM


async def dispatcher_is_empty(dispatcher: Dispatcher) -> bool:
    return await dispatcher.queue_depth(MODEL) == 0
