"""The zygote with real processes: forks, exits, signals, and what happens when one side is killed."""

from __future__ import annotations

import ast
import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from scheduler.contract.states import Tier
from tests.eventually import eventually
from worker import zygote_client
from worker.spawn_order import PrepareFailed, PrepareModel, SpawnedFds, SpawnOrder, WorkerExited
from worker.zygote_client import SpawnFailed, ZygoteClient
from worker.zygote_process import ZygoteProcess

TOY_COMMAND = (sys.executable, str(Path(__file__).parents[1] / "toy_zygote.py"))


def order(worker_id: str, behaviour: str, manifest: bytes = b"") -> SpawnOrder:
    return SpawnOrder(
        worker_id=worker_id,
        node_id="node",
        model=behaviour,
        snapshot_id="",
        redis_url="unix:///nowhere",
        manifest=manifest,
        backend="none",
        num_threads=1,
        max_running=1,
        kv_budget_bytes=1,
        drain_grace_s=1.0,
        cold_tier=Tier.HOST_RAM,
    )


def memory_file(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def is_running(pid: int) -> bool:
    """Whether ``pid`` exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Harness:
    """A client with a toy zygote, what it reported, and two files for the workers."""

    def __init__(self, command: tuple[str, ...] = TOY_COMMAND) -> None:
        self.exits: dict[str, WorkerExited] = {}
        self.lost: list[str] = []
        self.fds = SpawnedFds(memory_file(b"weights"), memory_file(b"guest"))
        self.client = ZygoteClient(on_exit=self._on_exit, on_lost=self.lost.extend, command=command)

    def _on_exit(self, message: WorkerExited) -> None:
        self.exits[message.worker_id] = message

    async def spawn(self, worker_id: str, behaviour: str, manifest: bytes = b"") -> int:
        return await self.client.spawn(order(worker_id, behaviour, manifest), self.fds)

    async def wait_exit(self, worker_id: str) -> WorkerExited:
        await eventually(lambda: worker_id in self.exits, what=f"exit of {worker_id}")
        return self.exits[worker_id]


@asynccontextmanager
async def started(command: tuple[str, ...] = TOY_COMMAND) -> AsyncIterator[Harness]:
    harness = Harness(command)
    await harness.client.start()
    try:
        yield harness
    finally:
        await harness.client.aclose()
        os.close(harness.fds.weights_fd)
        os.close(harness.fds.guest_fd)


async def test_exit_codes_and_signals_of_workers_are_reported() -> None:
    """A worker's exit code, its crash and its death by signal all reach the agent, each once."""
    async with started() as zygote:
        pid = await zygote.spawn("a", "exit:7")
        report = await zygote.wait_exit("a")
        assert (report.pid, report.exit_code) == (pid, 7)
        await zygote.spawn("b", "raise")
        assert (await zygote.wait_exit("b")).exit_code == 70
        pid = await zygote.spawn("c", "stubborn")
        os.kill(pid, signal.SIGKILL)
        assert (await zygote.wait_exit("c")).exit_code == -signal.SIGKILL


async def test_descriptors_arrive_with_their_order() -> None:
    """The files that a worker reads are those that were sent with its order, also when orders are sent at once."""
    async with started() as zygote:
        large = b"x" * 3_000_000  # larger than the socket's buffer
        files = [SpawnedFds(memory_file(b"w%d" % i), memory_file(b"g%d" % i)) for i in range(8)]
        orders = [order(f"w{i}", "read", b"w%d,g%d" % (i, i)) for i in range(8)]
        spawns = [zygote.client.spawn(o, f) for o, f in zip(orders, files, strict=True)]
        await asyncio.gather(*spawns, zygote.spawn("large", "exit:3", large))
        assert [(await zygote.wait_exit(f"w{i}")).exit_code for i in range(8)] == [0] * 8
        assert (await zygote.wait_exit("large")).exit_code == 3
        for pair in files:
            os.close(pair.weights_fd)
            os.close(pair.guest_fd)


async def test_zygote_that_cannot_prepare_says_so_and_forks_on() -> None:
    """A preparation that is refused costs nothing but itself, and leaves no descriptor behind."""
    async with started() as zygote:
        answers: list[object] = []
        zygote.client.models.on_answer = answers.append  # type: ignore[method-assign]
        zygote.client.models.on_forked(PrepareModel("s", b"manifest", "none", 1), zygote.fds)
        await eventually(lambda: answers == [PrepareFailed("s", "not offered here")], what="a refusal")
        await zygote.spawn("a", "exit:5")
        assert (await zygote.wait_exit("a")).exit_code == 5
        assert len(os.listdir(f"/proc/{zygote.client.pid}/fd")) == 6


async def test_worker_has_only_its_own_descriptors(short_tmp_path: Path) -> None:
    """A child holds standard streams and its two files, nothing of the zygote, and its name tells its model."""
    async with started() as zygote:
        path = short_tmp_path / "seen"
        await zygote.spawn("a", f"inspect:{path}")
        await zygote.wait_exit("a")
        seen = ast.literal_eval(path.read_text())
        listing_fds = 1  # the listed folder
        assert set(seen["own"]) < set(seen["fds"])
        assert len([fd for fd in seen["fds"] if fd > 2]) == 2 + listing_fds
        assert seen["comm"] == f"gp:inspect:{path}"[:15]
        assert seen["ppid"] == zygote.client.pid
        assert len(os.listdir(f"/proc/{zygote.client.pid}/fd")) == 6  # streams, channel, wake-up pipe: nothing leaks


async def test_worker_has_no_descriptor_of_another_model(short_tmp_path: Path) -> None:
    """One that is forked while others are being prepared could read their weights, and would keep them in memory."""
    async with started((*TOY_COMMAND, "preparing")) as zygote:
        await zygote.client.prepare(PrepareModel("another", b"manifest", "numpy", 1), zygote.fds)
        path = short_tmp_path / "seen"
        await zygote.spawn("a", f"inspect:{path}")
        await zygote.wait_exit("a")
        seen = ast.literal_eval(path.read_text())
        listing_fds = 1  # the listed folder
        assert len([fd for fd in seen["fds"] if fd > 2]) == 2 + listing_fds
        assert len(os.listdir(f"/proc/{zygote.client.pid}/fd")) == 6 + 2  # it goes on with the preparation itself


async def test_workers_have_no_key(short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that the agent was given as a variable stays with the agent; all other settings reach its workers."""
    monkeypatch.setenv("GLOWPLUG_SNAPSHOT_KEY", "main:5ec2e75ec2e7")
    monkeypatch.setenv("GLOWPLUG_API_KEY", "gp_5ec2e75ec2e7")
    monkeypatch.setenv("GLOWPLUG_LOG_LEVEL", "warning")
    async with started() as zygote:
        path = short_tmp_path / "seen"
        await zygote.spawn("a", f"environment:{path}")
        await zygote.wait_exit("a")
        seen = path.read_text()
    assert "GLOWPLUG_LOG_LEVEL" in seen
    assert "5ec2e7" not in seen


async def test_signal_reaches_the_named_worker_only() -> None:
    """SIGTERM to one worker leaves its neighbour alone; a signal to one that ended does nothing."""
    async with started() as zygote:
        await zygote.spawn("a", "wait")
        pid = await zygote.spawn("b", "wait")
        await zygote.client.signal("a", signal.SIGTERM)
        assert (await zygote.wait_exit("a")).exit_code in (0, -signal.SIGTERM)
        await zygote.client.signal("a", signal.SIGKILL)
        assert is_running(pid)


async def test_killed_zygote_takes_its_workers_and_is_replaced() -> None:
    """After kill -9 of the zygote its workers are gone and reported lost, and a new zygote forks again."""
    async with started() as zygote:
        first = zygote.client.pid
        workers = {"a": await zygote.spawn("a", "stubborn"), "b": await zygote.spawn("b", "stubborn")}
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: zygote.lost == ["a", "b"], what="loss reported")
        await eventually(lambda: not any(is_running(pid) for pid in workers.values()), what="workers gone")
        await zygote.spawn("c", "exit:5")
        assert (await zygote.wait_exit("c")).exit_code == 5
        assert zygote.client.pid not in (0, first)


async def test_a_zygote_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that has no descriptor or process to spare for a while has a zygote again when it does."""
    start = zygote_client.start_zygote_process
    refusals = [errno.EMFILE, errno.EAGAIN]

    def start_if_possible(command: Sequence[str]) -> ZygoteProcess:
        if refusals:
            code = refusals.pop()
            raise OSError(code, os.strerror(code))
        return start(command)

    monkeypatch.setattr(zygote_client, "start_zygote_process", start_if_possible)
    async with started() as zygote:
        assert refusals == []
        refusals.append(errno.EMFILE)
        os.kill(zygote.client.pid, signal.SIGKILL)
        await eventually(lambda: refusals == [], what="another start")
        await zygote.spawn("a", "exit:5")
        assert (await zygote.wait_exit("a")).exit_code == 5


async def test_a_zygote_is_replaced_where_nothing_can_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor to wait with, one that is to end is killed: it holds the workers that were given up."""
    wait, refusals = os.pidfd_open, [errno.EMFILE]

    def wait_if_possible(pid: int) -> int:
        if refusals:
            raise OSError(refusals.pop(), "Too many open files")
        return wait(pid)

    monkeypatch.setattr(os, "pidfd_open", wait_if_possible)
    async with started() as zygote:
        os.kill(zygote.client.pid, signal.SIGKILL)
        await eventually(lambda: refusals == [] and zygote.client.is_ready, what="another zygote")
        await zygote.spawn("a", "exit:5")
        assert (await zygote.wait_exit("a")).exit_code == 5


async def test_closing_the_channel_ends_zygote_and_workers() -> None:
    """An agent that goes away leaves no process, not even a worker that ignores SIGTERM."""
    async with started() as zygote:
        pids = [zygote.client.pid, await zygote.spawn("a", "stubborn")]
    await eventually(lambda: not any(is_running(pid) for pid in pids), what="all gone")


async def test_agent_killed_hard_leaves_no_process(short_tmp_path: Path) -> None:
    """kill -9 of the agent ends its zygote and the workers: the kernel closes the channel."""
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.integration.test_zygote import Harness
async def agent():
    harness = Harness()
    await harness.client.start()
    pid = await harness.spawn("a", "stubborn")
    print(harness.client.pid, pid, file=sys.stderr, flush=True)
    await asyncio.Event().wait()
asyncio.run(agent())
"""
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=asyncio.subprocess.PIPE)
    assert agent.stderr is not None
    pids = [int(word) for word in (await asyncio.wait_for(agent.stderr.readline(), 30)).split()]
    assert all(is_running(pid) for pid in pids)
    agent.kill()
    await agent.wait()
    await eventually(lambda: not any(is_running(pid) for pid in pids), what="zygote and worker gone")


async def test_spawn_fails_clearly_without_a_zygote(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zygote that dies at once is retried with a back-off, and whoever waits for it is told."""
    monkeypatch.setattr("worker.zygote_client.SPAWN_TIMEOUT_S", 0.3)
    client = ZygoteClient(
        on_exit=lambda message: None, on_lost=lambda ids: None, command=(sys.executable, "-c", "raise SystemExit(3)")
    )
    with pytest.raises(SpawnFailed, match="no zygote was ready within"):
        await client.start()
    with pytest.raises(SpawnFailed, match="no zygote was ready within"):
        await client.spawn(order("a", "wait"), SpawnedFds(0, 0))
    await client.aclose()
