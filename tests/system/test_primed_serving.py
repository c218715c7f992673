"""Primed prefixes through agent, zygote and worker processes: restored by a worker itself, and inherited prepared."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from scheduler.contract.messages import GenerateRequest
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from tests.eventually import eventually
from tests.worker_fixtures import MODEL, Host, copy_state_dir, make_request
from worker.build.priming import Priming
from worker.build.weights_reuse import build_over_weights

PRIMED = "primed"
TEXT = "It was a cold start, and nobody had asked for it"
PROMPT = TEXT + " before the sun came up"


@pytest.fixture
async def host(redis_url: str, short_tmp_path: Path) -> AsyncIterator[Host]:
    """A node with the tiny model, and a primed snapshot over its weights."""
    state_dir = copy_state_dir(short_tmp_path / "state")
    keyring = KeyRing.from_file(state_dir / "keys" / "snapshot.keys")
    store = SnapshotStore(state_dir / "store")
    build_over_weights(MODEL, PRIMED, store, keyring, priming=Priming(texts=(TEXT,), num_threads=1))
    async with Host(redis_url, state_dir) as running:
        yield running


def ask(request_id: str, model: str, max_tokens: int = 12, num_choices: int = 1) -> GenerateRequest:
    """A request whose prompt begins with the primed text."""
    request = make_request(request_id, max_tokens=max_tokens, num_choices=num_choices)
    sampling = msgspec.structs.replace(request.sampling, temperature=0.0)
    return msgspec.structs.replace(request, model=model, prompt=PROMPT, sampling=sampling)


async def serve(host: Host, worker_id: str, model: str) -> tuple[list[str], int]:
    """Texts and cached tokens of one request on a fresh worker, which is drained afterwards."""
    await host.order_spawn(worker_id, model=model)
    await host.dispatcher.enqueue(ask(f"r-{worker_id}", model))
    text, terminal = await host.wait_answer(f"r-{worker_id}")
    assert terminal.error is None
    await host.order_drain(worker_id)
    await host.wait_change(worker_id, "cold", exited=True)
    return text, terminal.usage.cached_tokens


async def test_primed_worker_answers_alike_whether_it_restored_or_inherited(host: Host) -> None:
    """The same text as the unprimed snapshot's, with cached tokens, from a first worker and from a prepared one."""
    expected, cached = await serve(host, "w1", MODEL)
    assert cached == 0
    text, first_cached = await serve(host, "w2", PRIMED)
    snapshot_id = (await host.wait_answer("r-w2"))[1].snapshot_id
    await eventually(
        lambda: any("model_prepared" in line and snapshot_id in line for line in host.log.read_text().splitlines()),
        what="the zygote's preparation",
    )
    prepared_text, prepared_cached = await serve(host, "w3", PRIMED)
    assert text == prepared_text == expected
    assert first_cached == prepared_cached >= 10


async def test_killed_primed_worker_is_continued_with_the_prefix(host: Host) -> None:
    """kill -9 in mid-stream: the next worker adopts the prefix, replays the log and goes on without gap or repeat."""
    await host.order_spawn("w1", model=PRIMED)
    await host.wait_change("w1", "ready")
    first = await host.worker_report("w1")
    await host.dispatcher.enqueue(ask("calm", PRIMED, 70, num_choices=8))
    undisturbed, _ = await host.wait_answer("calm")
    storm = await host.stop_in_mid_stream(first.pid, ask, model=PRIMED, max_tokens=70, num_choices=8)
    os.kill(first.pid, signal.SIGKILL)
    await host.wait_change("w1", "failed", exited=True)
    await host.order_spawn("w2", model=PRIMED)
    text, terminal = await host.wait_answer(storm)
    assert text == undisturbed
    assert terminal.worker_id == "w2"
    assert terminal.usage.cached_tokens >= 10
