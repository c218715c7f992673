"""What a host does to its workers: stops them, kills them for memory, runs out of descriptors, spoils their files."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scheduler.contract import keys
from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import ForgetModel, TerminalFrame
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from tests.eventually import eventually
from tests.log_lines import read_log
from tests.worker_fixtures import CHECKPOINT, MODEL, Host, copy_state_dir, make_request
from worker.build.model_sources import open_located
from worker.build.quantize import WeightFormat
from worker.build.snapshot_builder import build_snapshot
from worker.stopped_workers import StoppedWorkers, read_state

LONG = {"max_tokens": 100, "num_choices": 8}


@pytest.fixture
async def host(redis_url: str, short_tmp_path: Path) -> AsyncIterator[Host]:
    async with Host(redis_url, copy_state_dir(short_tmp_path / "state")) as running:
        yield running


async def test_a_stopped_worker_is_ended_and_its_request_goes_on(redis_url: str, short_tmp_path: Path) -> None:
    """SIGSTOP in mid-stream: the agent sees it, ends the worker, and counts no crash against what it ran."""
    async with Host(redis_url, copy_state_dir(short_tmp_path / "state"), GLOWPLUG_STOPPED_LIMIT_S="0.4") as host:
        first = await host.spawn("w1")
        undisturbed, _ = await host.ask("calm", **LONG)
        storm = await host.stop_in_mid_stream(first.pid, **LONG)
        gone = await host.wait_change("w1", "failed", exited=True)
        assert gone.error is not None
        assert "stopped by a signal" in gone.error.message
        assert gone.had_requests
        assert not await host.redis.exists(keys.crashes(storm))
        await host.spawn("w2")
        text, terminal = await host.wait_answer(storm)
        assert (text, terminal.worker_id) == (undisturbed, "w2")


def test_only_what_stands_still_for_the_whole_limit_is_ended() -> None:
    """A process that is stopped and continued, or busy, is left alone; one that stays stopped is ended once."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        ended: list[str] = []
        watch = StoppedWorkers(lambda: {"w": child}, ended.append, limit_s=1.5)
        watch.look(0.0)
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        watch.look(1.0)
        watch.look(2.0)
        os.kill(child, signal.SIGCONT)
        os.waitpid(child, os.WCONTINUED)
        watch.look(3.0)
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        watch.look(4.0)
        assert ended == []
        for now_s in (5.6, 6.0, 7.0):
            watch.look(now_s)
        assert ended == ["w"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert read_state(child) == ""


async def test_a_second_sigterm_ends_a_workers_drain_at_once(host: Host) -> None:
    """The first one lets its requests finish; the second one hands them back, and the next worker goes on with them."""
    report = await host.spawn("w1")
    storm = [f"r{number}" for number in range(16)]
    for request_id in storm:
        await host.dispatcher.enqueue(make_request(request_id, **LONG))
    await host.wait_frames(storm[0], 1)
    os.kill(report.pid, signal.SIGTERM)

    async def is_draining() -> bool:
        return any(change.state.value == "draining" for change in await host.changes("w1"))

    await eventually(is_draining, what="drain")
    os.kill(report.pid, signal.SIGTERM)
    await host.wait_change("w1", "cold", exited=True)
    lines = read_log(host.log, "worker_drained")
    assert lines[0]["handed_back"] > 0
    await host.spawn("w2")
    for request_id in storm:
        _, terminal = await host.wait_answer(request_id)
        assert (terminal.error, terminal.usage.completion_tokens) == (None, 800)


#: Where a control group for memory may be made, and the file of its limit: version 2, then version 1.
MEMORY_GROUPS = ((Path("/sys/fs/cgroup"), "memory.max"), (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"))


@contextmanager
def small_cgroup(pid: int) -> Iterator[Path | None]:
    """``pid`` in a control group with hardly any memory; None where none can be made (no controller, no rights)."""
    made: list[Path] = []
    joined: Path | None = None
    for parent, limit_file in MEMORY_GROUPS:
        group = parent / f"glowplug-test-{os.getpid()}"
        if not (parent / "cgroup.procs").exists():
            continue  # no control group file system
        try:
            group.mkdir()
            made.append(group)
            (group / limit_file).write_text(str(64 << 10))  # fails where the controller is not on
            (group / "cgroup.procs").write_text(str(pid))
        except OSError:
            continue
        joined = group
        break
    try:
        yield joined
    finally:
        for group in made:
            group.rmdir()


def count_oom_kills(group: Path) -> int:
    """How many processes the kernel has killed in ``group`` for want of memory."""
    names = ("memory.events", "memory.oom_control")
    text = next((group / name).read_text() for name in names if (group / name).exists())
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("oom_kill ")))


async def test_a_worker_that_is_killed_for_memory_is_replaced(host: Host) -> None:
    """The kernel's OOM killer (where a control group can be made, else its signal): named, counted, continued."""
    first = await host.spawn("w1")
    undisturbed, _ = await host.ask("calm", **LONG)
    storm = await host.stop_in_mid_stream(first.pid, **LONG)
    await host.dispatcher.enqueue(make_request("more", **LONG))  # needs blocks that no request has used yet
    with small_cgroup(first.pid) as group:
        print(f"killed by {'its signal' if group is None else f'the kernel, in {group}'}")
        os.kill(first.pid, signal.SIGKILL if group is None else signal.SIGCONT)
        lost = await host.wait_change("w1", "failed", exited=True)
        assert group is None or count_oom_kills(group) == 1
    assert lost.error is not None
    assert "SIGKILL" in lost.error.message
    assert "memory" in lost.error.message
    # Before it needed more memory it may have ended one of them.
    unfinished = [r for r in (storm, "more") if not any(isinstance(f, TerminalFrame) for f in await host.frames(r))]
    assert b"1" in [await host.redis.get(keys.crashes(request_id)) for request_id in unfinished]
    await host.spawn("w2")
    for request_id in (storm, "more"):
        text, terminal = await host.wait_answer(request_id)
        assert (text, terminal.error) == (undisturbed, None)


async def test_an_agent_without_descriptors_refuses_clearly_and_serves_again(host: Host) -> None:
    """No descriptor left: the order ends with an error that says so, the agent lives, and later orders are served."""
    before = await host.wait_registered()
    await host.spawn("w0")
    await host.order_drain("w0")
    await host.wait_change("w0", "cold", exited=True)
    await host.order(ForgetModel(MODEL, host.fencing_token))
    await host.wait_logged("model_forgotten")
    _, hard = resource.prlimit(host.agent.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(host.agent.pid, resource.RLIMIT_NOFILE, (3, hard))  # below all that it has open
    await host.order_spawn("w1")
    refused = await host.wait_change("w1", "failed", exited=True)
    assert refused.error is not None
    assert refused.error.code is ErrorCode.WAKE_FAILED
    assert "open files" in refused.error.message
    assert "limit 3" in refused.error.message
    await host.wait_logged("no_descriptors")
    resource.prlimit(host.agent.pid, resource.RLIMIT_NOFILE, (hard, hard))
    await host.spawn("w2")
    _, terminal = await host.ask("r1")
    assert terminal.error is None
    assert (await host.wait_registered()).pid == before.pid


async def test_a_file_spoilt_at_run_time_takes_its_snapshot_out_of_service_only(host: Host) -> None:
    """Bytes flipped under a served model: it serves on from sealed memory; read again it is refused, the other not."""
    keyring = KeyRing.from_file(host.state_dir / "keys" / "snapshot.keys")
    store = SnapshotStore(host.state_dir / "store")
    with open_located(CHECKPOINT) as source:
        build_snapshot(source, "other", store, keyring, weight_format=WeightFormat.INT8)
    await eventually(lambda: host.card("other"), what="second model")
    await host.spawn("w1")
    undisturbed, _ = await host.ask("calm")
    path = store.blob_path(store.read_manifest(MODEL, keyring).weights)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert (await host.ask("spoilt"))[0] == undisturbed
    await host.order_drain("w1")
    await host.wait_change("w1", "cold", exited=True)
    await host.order(ForgetModel(MODEL, host.fencing_token))
    await host.wait_logged("model_forgotten")
    await host.order_spawn("w2")
    refused = await host.wait_change("w2", "failed", exited=True)
    assert refused.error is not None
    assert refused.error.code is ErrorCode.SNAPSHOT_CORRUPT
    events = read_log(host.log, "security")
    assert [event["level"] for event in events] == ["critical"]
    card = await host.card()
    assert card is not None
    assert card.refused is not None
    await host.order_spawn("other-1", "other")
    await host.wait_change("other-1", "ready")
    other = make_request("r-other")
    await host.dispatcher.enqueue(
        type(other)(other.request_id, "other", other.gateway_id, other.prompt, other.sampling)
    )
    _, terminal = await host.wait_answer("r-other")
    assert (terminal.error, terminal.worker_id) == (None, "other-1")
