"""A process taken off its device by the helper and a driver that plays by the rules: as asked, refused, hung, dead."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from tests.checkpoint_fixtures import CHECKPOINTED, RUNNING, FakeCheckpointDriver
from tests.eventually import eventually
from worker import releaser, releaser_child
from worker.backends.cuda.checkpoint import DriverCheckpoint, probe_checkpoint
from worker.backends.protocol import BackendError, BackendFull, BackendLost
from worker.device_release import DriverRelease, connect_release
from worker.releaser_child import ReleaseProcess

ME = os.getpid()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCheckpointDriver:
    made = FakeCheckpointDriver(tmp_path / "driver")
    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
async def helper(driver: FakeCheckpointDriver, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ReleaseProcess]:
    monkeypatch.setattr(releaser_child, "RESTART_AFTER_S", 0.01)
    process = ReleaseProcess()
    running = asyncio.create_task(process.run())
    await eventually(lambda: process.address, what="the helper's address")
    yield process
    process.close()
    await running


async def test_a_process_leaves_its_device_and_comes_back(helper: ReleaseProcess, driver: FakeCheckpointDriver) -> None:
    """In the driver's order of calls; asking for it twice is no error."""
    release = DriverRelease(helper.address)
    await asyncio.to_thread(release.suspend)
    assert driver.state(ME) == CHECKPOINTED
    await asyncio.to_thread(release.resume)
    assert driver.state(ME) == RUNNING
    await asyncio.to_thread(release.resume)
    assert driver.calls() == ["Lock", "Checkpoint", "GetState", "Restore", "Unlock", "GetState"]


@pytest.mark.parametrize(("order", "status"), [("refuse Checkpoint 801", 801), ("refuse Lock 1", 1), ("busy", 600)])
async def test_a_refusal_leaves_the_process_as_it_was(
    helper: ReleaseProcess, driver: FakeCheckpointDriver, monkeypatch: pytest.MonkeyPatch, order: str, status: int
) -> None:
    """Also where the driver waits in vain for work that does not end: the process runs on."""
    driver.order(order)
    with pytest.raises(BackendError, match=f"CUDA error {status}") as caught:
        await asyncio.to_thread(DriverRelease(helper.address).suspend)
    assert not isinstance(caught.value, BackendFull | BackendLost)
    assert driver.state(ME) == RUNNING


async def test_a_full_device_is_told_from_one_that_fails(helper: ReleaseProcess, driver: FakeCheckpointDriver) -> None:
    """No room now: as it was, and a later try succeeds. Anything else: the worker must end."""
    release = DriverRelease(helper.address)
    await asyncio.to_thread(release.suspend)
    for order, expected in (("refuse Restore 2", BackendFull), ("refuse Restore 700", BackendLost)):
        driver.order(order)
        with pytest.raises(expected):
            await asyncio.to_thread(release.resume)
        assert driver.state(ME) == CHECKPOINTED
    driver.order()
    await asyncio.to_thread(release.resume)
    assert driver.state(ME) == RUNNING


async def test_a_driver_that_hangs_is_given_up(helper: ReleaseProcess, driver: FakeCheckpointDriver) -> None:
    """Nobody knows what became of the device: the worker ends. The helper serves others meanwhile."""
    driver.order("hang Checkpoint 1500")
    with pytest.raises(BackendLost, match=r"within 0\.2 s"):
        await asyncio.to_thread(DriverRelease(helper.address, suspend_limit_s=0.2).suspend)
    driver.order()
    child = await asyncio.to_thread(ask_in_a_child, helper.address)
    assert child == "suspended, resumed"
    await eventually(lambda: driver.state(ME) == CHECKPOINTED, what="the end of the call that hung")
    driver.order("hang Restore 1500")
    with pytest.raises(BackendLost, match=r"did not fetch this process within 0\.2 s"):
        await asyncio.to_thread(DriverRelease(helper.address, resume_limit_s=0.2).resume)
    await eventually(lambda: driver.state(ME) == RUNNING, what="the end of the other one")


def ask_in_a_child(address: str) -> str:
    """Another process leaves its device and comes back."""
    code = (
        "from worker.device_release import DriverRelease\n"
        f"release = DriverRelease({address!r})\n"
        "release.suspend(); print('suspended', end=', '); release.resume(); print('resumed')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


async def test_a_helper_that_dies_is_replaced_and_finds_things_as_they_are(
    helper: ReleaseProcess, driver: FakeCheckpointDriver
) -> None:
    """A process that it had taken off the device comes back through the next one, at the same address."""
    release = DriverRelease(helper.address)
    await asyncio.to_thread(release.suspend)
    first = helper._process
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    await asyncio.to_thread(release.resume)
    assert driver.state(ME) == RUNNING
    assert helper._process is not first


async def test_a_helper_that_dies_at_work_is_undone(helper: ReleaseProcess, driver: FakeCheckpointDriver) -> None:
    """Between lock and checkpoint: the next helper unlocks the process, which counts as a refusal."""
    driver.order("hang Checkpoint 60000")
    suspending = asyncio.create_task(asyncio.to_thread(DriverRelease(helper.address).suspend))
    await eventually(lambda: "Checkpoint" in driver.calls(), what="the driver at work")
    driver.order()
    assert helper._process is not None
    os.kill(helper._process.pid, signal.SIGKILL)
    with pytest.raises(BackendError, match="undone"):
        await suspending
    assert driver.state(ME) == RUNNING


async def test_a_machine_whose_driver_cannot_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A line in the agent's log with reason and remedy, no helper left, and workers are told that there is none."""
    monkeypatch.setenv("GLOWPLUG_DRIVER_LIBRARY", "libno-such-driver.so.1")
    process = ReleaseProcess()
    with structlog.testing.capture_logs() as logs:
        await process.run()
    assert [(line["event"], "no driver" in line["reason"]) for line in logs] == [("gpu_release_unavailable", True)]
    assert "570" in logs[0]["remedy"]
    assert (process.address, connect_release(process.address)) == ("", None)
    process.close()


async def test_only_orders_that_it_knows_are_followed(helper: ReleaseProcess, driver: FakeCheckpointDriver) -> None:
    """Whatever else arrives is answered with an error, and a caller that says nothing holds up nobody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent, socket.socket(socket.AF_UNIX) as rude:
        silent.connect("\0" + helper.address)
        rude.connect("\0" + helper.address)
        rude.sendall(b"\xff suspend 1\n")
        answer = await asyncio.to_thread(rude.recv, 4096)
        assert b"expected suspend or resume" in answer
        await asyncio.to_thread(DriverRelease(helper.address).suspend)
    assert driver.calls() == ["Lock", "Checkpoint"]


async def test_after_the_agent_nobody_is_asked() -> None:
    """A worker whose agent has gone is refused at once, and one that is off its device ends."""
    release = DriverRelease("glowplug-release-gone")
    with pytest.raises(BackendError, match="nobody on this node"):
        await asyncio.to_thread(release.suspend)
    with pytest.raises(BackendLost):
        await asyncio.to_thread(release.resume)


def test_another_user_moves_nobody(driver: FakeCheckpointDriver) -> None:
    """An abstract socket has no owner: the helper looks at who calls."""
    checkpoint = probe_checkpoint(driver.env["GLOWPLUG_DRIVER_LIBRARY"])
    assert isinstance(checkpoint, DriverCheckpoint)
    answer = releaser._carry_out("suspend", ME, os.getuid() + 1, checkpoint)
    assert (answer.status != 0, "no order for user" in answer.error, driver.calls()) == (True, True, [])


def test_the_helper_ends_with_its_agent(driver: FakeCheckpointDriver) -> None:
    """Whatever ends the agent closes its end of the helper's standard input."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0glowplug-release-test-" + os.urandom(8).hex())
        listener.listen()
        command = [*releaser_child.RELEASER_COMMAND, str(listener.fileno())]
        process = subprocess.Popen(
            command, pass_fds=(listener.fileno(),), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b'{"reason":""}\n'
        process.stdin.close()
        assert process.wait(timeout=30) == 0
        process.stdout.close()
