"""Agent, zygote and workers as real processes with a tiny real model: wakes, ends, deaths and refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scheduler.contract import keys
from scheduler.contract.errors import ErrorCode
from scheduler.contract.job_queue import MAX_CRASHES, release_worker
from scheduler.contract.messages import ForgetModel
from scheduler.contract.states import Tier
from scheduler.contract.telemetry import COLD_PHASES, Mark
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from tests.eventually import eventually
from tests.worker_fixtures import MODEL, NODE, Host, copy_state_dir, make_request, wait_gone


@pytest.fixture
async def host(redis_url: str, short_tmp_path: Path) -> AsyncIterator[Host]:
    async with Host(redis_url, copy_state_dir(short_tmp_path / "state")) as running:
        yield running


async def test_cold_request_is_streamed_then_the_model_goes_to_zero_and_wakes_again(host: Host) -> None:
    """No process, a request, a worker from disk (T1), zero again, a worker from sealed memory (T2), the same text."""
    card = await host.card()
    assert card is not None
    assert card.refused is None
    texts = []
    for worker_id, tier in (("w1", Tier.DISK), ("w2", Tier.HOST_RAM)):
        now = time.monotonic_ns()
        await host.dispatcher.enqueue(make_request(f"r-{worker_id}", marks={Mark.ACCEPTED: now, Mark.ENQUEUED: now}))
        await host.order_spawn(worker_id, marks={Mark.DEMAND_SEEN: now, Mark.SPAWN_ORDERED: now})
        text, terminal = await host.wait_answer(f"r-{worker_id}")
        texts.append(text)
        assert (terminal.error, terminal.cold_tier, terminal.worker_id) == (None, tier, worker_id)
        assert terminal.snapshot_id == card.snapshot_id
        assert terminal.usage.completion_tokens == 12
        expected = {phase.start for phase in COLD_PHASES} | {Mark.PUBLISHED}
        assert expected <= set(terminal.marks)
        pid = (await host.worker_report(worker_id)).pid
        await host.order_drain(worker_id)
        gone = await host.wait_change(worker_id, "cold", exited=True)
        assert gone.error is None
        await wait_gone(pid)
        assert not await host.redis.exists(keys.worker(worker_id))
        await host.wait_queue_empty()
    assert texts[0] == texts[1]
    report = await host.wait_registered()
    assert report.sealed_bytes.keys() <= {MODEL}


async def test_request_to_a_ready_worker_is_hot(host: Host) -> None:
    """A request accepted after the worker was ready names no cold tier and carries no mark of the wake."""
    await host.spawn("w1")
    _, terminal = await host.ask("r1", marks={Mark.ACCEPTED: time.monotonic_ns()})
    assert terminal.cold_tier is None
    assert Mark.FORKED not in terminal.marks
    assert terminal.marks[Mark.PUBLISHED] >= terminal.marks[Mark.SAMPLED]


async def test_killed_worker_is_continued_by_the_next_without_gap_or_repeat(host: Host) -> None:
    """kill -9 in mid-stream: the second run goes on where the log ends, and every choice's text is undisturbed."""
    long = {"max_tokens": 100, "num_choices": 8}
    first = await host.spawn("w1")
    undisturbed, _ = await host.ask("calm", **long)
    storm = await host.stop_in_mid_stream(first.pid, **long)
    logged = await host.frames(storm)
    os.kill(first.pid, signal.SIGKILL)
    lost = await host.wait_change("w1", "failed", exited=True)
    assert lost.error is not None
    assert "SIGKILL" in lost.error.message
    await host.spawn("w2")
    text, terminal = await host.wait_answer(storm)
    assert text == undisturbed
    assert terminal.worker_id == "w2"
    assert (await host.frames(storm))[: len(logged)] == logged
    assert terminal.usage.completion_tokens == 800


async def test_a_request_that_kills_workers_is_parked_and_harms_no_other(host: Host) -> None:
    """A worker is killed each time it takes the poison: that ends with an error that says so, all others whole."""
    await host.dispatcher.enqueue(make_request("poison", max_tokens=100, num_choices=8))
    others = [f"r{i}" for i in range(3)]
    for request_id in others:
        await host.dispatcher.enqueue(make_request(request_id, max_tokens=100, num_choices=4))
    lives = 0

    async def is_taken() -> bytes | None:
        lease: bytes | None = await host.redis.get(keys.in_progress("poison"))
        return lease

    async def crashes() -> int:
        return int(await host.redis.get(keys.crashes("poison")) or 0)

    while lives < MAX_CRASHES:
        lives += 1
        worker_id = f"w{lives}"
        await host.order_spawn(worker_id)
        await eventually(is_taken, what="poison taken")
        os.kill(host.logged_pid(worker_id), signal.SIGKILL)
        lost = await host.wait_change(worker_id, "failed", exited=True)
        assert lost.had_requests
        assert await crashes() == lives
    await host.spawn("last")
    _, parked = await host.wait_answer("poison")
    assert parked.error is not None
    assert f"{MAX_CRASHES} workers died while they ran this request" in parked.error.message
    texts = []
    for request_id in others:
        text, terminal = await host.wait_answer(request_id)
        assert (terminal.error, terminal.usage.completion_tokens) == (None, 400)
        texts.append(text)
    assert texts[0] == texts[1] == texts[2]


async def test_a_stopped_worker_that_wakes_again_can_write_nothing(host: Host) -> None:
    """SIGSTOP past its lease, another worker ends the request, SIGCONT: not a frame more, exactly one end."""
    stopped = await host.spawn("w1")
    undisturbed, _ = await host.ask("calm", max_tokens=100, num_choices=8)
    storm = await host.stop_in_mid_stream(stopped.pid, max_tokens=100, num_choices=8)
    await release_worker(host.redis, MODEL, "w1")  # what the scheduler does with a worker that reports no more
    await host.spawn("w2")
    text, terminal = await host.wait_answer(storm)
    frames = await host.frames(storm)
    os.kill(stopped.pid, signal.SIGCONT)
    _, after = await host.ask("after")
    await eventually(lambda: '"event": "run_fenced"' in host.log.read_text(), what="the woken worker fenced off")
    assert (text, terminal.worker_id, after.error) == (undisturbed, "w2", None)
    assert await host.frames(storm) == frames


async def test_drain_lets_what_runs_finish(host: Host) -> None:
    """A drained worker takes nothing new, ends its running request, and exits with no error."""
    await host.spawn("w1")
    await host.dispatcher.enqueue(make_request("r1", max_tokens=100, num_choices=4))
    await host.wait_frames("r1", 2)
    await host.order_drain("w1")
    _, terminal = await host.wait_answer("r1")
    assert terminal.error is None
    assert (await host.wait_change("w1", "cold", exited=True)).error is None
    states = [change.state.value for change in await host.changes("w1")]
    assert states == ["ready", "draining", "cold"]


async def test_worker_past_its_grace_is_killed_and_its_request_handed_on(host: Host) -> None:
    """When a worker does not end in its grace, it is killed without being called a failure; its job runs elsewhere."""
    report = await host.spawn("w1")
    os.kill(report.pid, signal.SIGSTOP)
    await host.dispatcher.enqueue(make_request("r1"))
    await host.order_drain("w1", grace_s=0.01)
    assert (await host.wait_change("w1", "cold", exited=True)).error is None
    await host.spawn("w2")
    _, terminal = await host.wait_answer("r1")
    assert (terminal.error, terminal.worker_id) == (None, "w2")


async def test_client_that_goes_away_ends_its_request(host: Host) -> None:
    """A cancelled request gets exactly one terminal frame, with error cancelled, and frees its sequence."""
    worker = await host.spawn("w1")
    left = await host.stop_in_mid_stream(worker.pid, max_tokens=100, num_choices=8)
    await host.dispatcher.cancel(left, MODEL)
    os.kill(worker.pid, signal.SIGCONT)
    _, terminal = await host.wait_answer(left)
    assert terminal.error is not None
    assert terminal.error.code is ErrorCode.CANCELLED
    assert len(await host.frames(left)) < 100
    _, after = await host.ask("r2")
    assert after.error is None
    await host.wait_queue_empty()


async def test_killed_zygote_is_replaced_and_its_workers_reported(host: Host) -> None:
    """kill -9 of the zygote: its worker dies and is reported, and the next order is served by a new zygote."""
    worker = await host.spawn("w1")
    before = await host.wait_registered()
    os.kill(before.zygote_pid, signal.SIGKILL)
    await wait_gone(worker.pid)
    lost = await host.wait_change("w1", "failed", exited=True)
    assert lost.error is not None
    assert "zygote" in lost.error.message
    await host.spawn("w2")
    _, terminal = await host.ask("r1")
    assert terminal.error is None


async def test_killed_agent_leaves_nothing_and_its_successor_cleans_up(host: Host) -> None:
    """kill -9 of the agent ends zygote and worker; the next agent reports the worker gone and serves."""
    worker = await host.spawn("w1")
    node = await host.wait_registered()
    host.agent.kill()
    host.agent.wait()
    await wait_gone(worker.pid, node.zygote_pid)
    host.start_agent()
    await host.wait_change("w1", "cold", exited=True)
    await host.wait_registered()
    await host.spawn("w2")
    _, terminal = await host.ask("r1")
    assert terminal.worker_id == "w2"


async def test_sigterm_drains_and_unregisters(host: Host) -> None:
    """SIGTERM to the agent: the running request ends well, no process stays, the node is gone, exit code 0."""
    worker = await host.spawn("w1")
    node = await host.wait_registered()
    await host.dispatcher.enqueue(make_request("r1", max_tokens=100, num_choices=4))
    await host.wait_frames("r1", 2)
    host.agent.send_signal(signal.SIGTERM)
    _, terminal = await host.wait_answer("r1")
    assert terminal.error is None
    await eventually(lambda: host.agent.poll() is not None, what="agent's end")
    assert host.agent.returncode == 0
    await wait_gone(worker.pid, node.zygote_pid)
    assert await host.node_report() is None


async def test_second_sigterm_ends_at_once(redis_url: str, short_tmp_path: Path) -> None:
    """An agent whose drain hangs (a stopped worker) ends on the second signal, and takes everything with it."""
    endless = {"GLOWPLUG_DRAIN_GRACE_S": "600", "GLOWPLUG_STOPPED_LIMIT_S": "600"}
    async with Host(redis_url, copy_state_dir(short_tmp_path / "state"), **endless) as host:
        worker = await host.spawn("w1")
        node = await host.wait_registered()
        os.kill(worker.pid, signal.SIGSTOP)
        host.agent.send_signal(signal.SIGTERM)
        await host.wait_logged("worker_drain_ordered")
        host.agent.send_signal(signal.SIGTERM)
        await eventually(lambda: host.agent.poll() is not None, what="agent's end")
        await wait_gone(worker.pid, node.zygote_pid)


async def test_forgotten_model_wakes_from_disk_again(host: Host) -> None:
    """The sealed bytes of a model go on order, but not under a running worker."""
    await host.spawn("w1")
    await host.order(ForgetModel(MODEL, host.fencing_token))
    await host.wait_logged("model_in_use")
    await host.order_drain("w1")
    await host.wait_change("w1", "cold", exited=True)
    await host.order(ForgetModel(MODEL, host.fencing_token))
    await host.wait_logged("model_forgotten")
    await host.dispatcher.enqueue(make_request("r1", marks={Mark.ACCEPTED: time.monotonic_ns()}))
    await host.order_spawn("w2")
    _, terminal = await host.wait_answer("r1")
    assert terminal.cold_tier is Tier.DISK


async def test_orders_of_a_deposed_leader_are_ignored(host: Host) -> None:
    """Once a higher fencing token was seen, orders with a lower one start nothing."""
    host.fencing_token = 5
    await host.spawn("w1")
    host.fencing_token = 4
    await host.order_spawn("w-old")
    await host.order_drain("w1")
    host.fencing_token = 5
    await host.spawn("w2")
    assert await host.changes("w-old") == []
    assert [change.state.value for change in await host.changes("w1")] == ["ready"]


async def test_corrupt_chunk_is_refused_until_the_file_is_repaired(host: Host) -> None:
    """A flipped bit in the weights: no process, a refused card, a security event; a good copy is served again."""
    store = host.state_dir / "store"
    keyring = KeyRing.from_file(host.state_dir / "keys" / "snapshot.keys")
    path = SnapshotStore(store).blob_path(SnapshotStore(store).read_manifest(MODEL, keyring).weights)
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    await host.order_spawn("w1")
    refused = await host.wait_change("w1", "failed", exited=True)
    assert refused.error is not None
    assert refused.error.code is ErrorCode.SNAPSHOT_CORRUPT
    card = await host.card()
    assert card is not None
    assert card.refused == refused.error
    await host.wait_security_counts(blob_corrupt=1)
    assert '"event": "security"' in host.log.read_text()
    assert "worker_started" not in host.log.read_text()
    path.write_bytes(good)

    async def is_accepted() -> bool:
        found = await host.card()
        return found is not None and found.refused is None

    await eventually(is_accepted, what="repaired model accepted")
    await host.spawn("w2")


async def test_bad_signature_is_refused_before_anything_is_sealed(host: Host) -> None:
    """A flipped bit in the manifest turns the card into a refusal by itself; an order starts nothing."""
    path = host.state_dir / "store" / "manifests" / f"{MODEL}.gpsnap"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    await host.order_spawn("w1")
    refused = await host.wait_change("w1", "failed", exited=True)
    assert refused.error is not None
    assert refused.error.code is ErrorCode.SNAPSHOT_SIGNATURE_INVALID
    await host.wait_security_counts(signature_invalid=1)
    report = await host.node_report()
    assert report is not None
    assert report.sealed_bytes == {}


async def test_model_that_does_not_fit_is_refused_but_not_its_card(redis_url: str, short_tmp_path: Path) -> None:
    """Lack of memory fails the wake with both numbers; the snapshot itself stays good."""
    state_dir = copy_state_dir(short_tmp_path / "state")
    async with Host(redis_url, state_dir, GLOWPLUG_SEALED_LIMIT_BYTES="1000") as host:
        await host.order_spawn("w1")
        refused = await host.wait_change("w1", "failed", exited=True)
        assert refused.error is not None
        assert refused.error.code is ErrorCode.OUT_OF_MEMORY
        assert "the limit is 1000" in refused.error.message
        card = await host.card()
        assert card is not None
        assert card.refused is None


async def test_models_come_and_go_with_their_files(host: Host) -> None:
    """Removing a snapshot takes its card away; an order for a model that is not there fails by name."""
    SnapshotStore(host.state_dir / "store").remove(MODEL)

    async def is_gone() -> bool:
        return await host.card() is None

    await eventually(is_gone, what="card gone")
    await host.order_spawn("w1")
    refused = await host.wait_change("w1", "failed", exited=True)
    assert refused.error is not None
    assert refused.error.code is ErrorCode.MODEL_NOT_FOUND


def test_agent_without_a_key_refuses_to_start_with_the_remedy(redis_url: str, short_tmp_path: Path) -> None:
    """No key: exit code 78 and one line that says how to make one; nothing is registered."""
    env = {**os.environ, "REDIS_URL": redis_url, "GLOWPLUG_STATE_DIR": str(short_tmp_path), "GLOWPLUG_NODE_ID": NODE}
    env.pop("GLOWPLUG_DEV", None)
    ended = subprocess.run([sys.executable, "-m", "worker", "agent"], env=env, capture_output=True, timeout=30)
    assert ended.returncode == 78
    assert b"glowplug keys new" in ended.stderr
