"""The agent's books of spares, with the test in the place of the zygote and of the spares themselves."""

from __future__ import annotations

import os
import socket
from asyncio import gather, to_thread
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.contract.states import Tier
from tests.eventually import eventually
from worker import spare_workers
from worker.agent_settings import read_agent_settings
from worker.spare_workers import SpareWorkers
from worker.spawn_order import ForkSpare, SpareReady, SpareRefused, SpawnedFds, SpawnOrder, TakeOrder
from worker.zygote_channel import PacketReader, encode_packet
from worker.zygote_client import SpawnFailed

ORDER = SpawnOrder("w1", "n", "m", "s", "redis://", b"x" * 2_000_000, "cuda", 1, 1, 1, 1.0, Tier.DISK, device="GPU-a")


class FakeZygote:
    """Keeps the other ends of the channels."""

    def __init__(self) -> None:
        self.spares: list[tuple[ForkSpare, socket.socket]] = []
        self.fails = False

    async def spawn_spare(self, spare: ForkSpare, channel_fd: int) -> int:
        if self.fails:
            raise SpawnFailed("no processes left")
        self.spares.append((spare, socket.socket(fileno=os.dup(channel_fd))))
        return 1000 + len(self.spares)

    def say(self, index: int, message: SpareReady | SpareRefused) -> None:
        self.spares[index][1].sendall(encode_packet(message))


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """A zygote, the spares of a node that wants one on each GPU, and how often it heard of a change. No pauses."""
    monkeypatch.setattr(spare_workers, "REPLACE_AFTER_S", 0.0)
    monkeypatch.setattr(spare_workers, "RETRY_AFTER_S", (0.0, 3600.0))
    settings = read_agent_settings(1 << 30, {"GLOWPLUG_BACKEND": "cuda", "GLOWPLUG_SPARE_WORKERS": "1"})
    zygote, changes = FakeZygote(), list[int]()
    spares = SpareWorkers(zygote, settings, lambda: changes.append(1))
    yield SimpleNamespace(zygote=zygote, spares=spares, changes=changes)
    spares.close()
    for _, channel in zygote.spares:
        channel.close()


async def forked(stage: Any, number: int) -> None:
    """Wait until so many were forked."""
    await eventually(lambda: len(stage.zygote.spares) == number, what=f"{number} spares forked")


async def test_one_warm_spare_for_each_device_and_no_more(stage: Any) -> None:
    """Asked again and again it starts what is missing, once; only a warm one is counted as such, and can be taken."""
    for _ in range(3):
        stage.spares.keep(["GPU-a", "GPU-b"])
    await forked(stage, 2)
    stage.spares.keep(["GPU-a", "GPU-b"])
    assert sorted(spare.device for spare, _ in stage.zygote.spares) == ["GPU-a", "GPU-b"]
    assert stage.spares.take_nowait("GPU-a") is None
    index = next(i for i, (spare, _) in enumerate(stage.zygote.spares) if spare.device == "GPU-a")
    stage.zygote.say(index, SpareReady(12.0))
    await eventually(lambda: stage.changes, what="told that a spare is warm")
    assert stage.spares.pids()["GPU-a"] == {1001 + index: True}
    assert list(stage.spares.pids()["GPU-b"].values()) == [False]
    assert stage.spares.take_nowait("GPU-c") is None


async def test_an_order_reaches_the_spare_with_its_files(stage: Any, tmp_path: Path) -> None:
    """Megabytes of manifest, over a channel that holds less, while the spare reads; then the place is filled again."""
    stage.spares.keep(["GPU-a"])
    await forked(stage, 1)
    stage.zygote.say(0, SpareReady(1.0))
    await eventually(lambda: stage.changes, what="a warm spare")
    spare = stage.spares.take_nowait("GPU-a")
    assert spare is not None
    assert stage.spares.pids() == {}
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("weights", "guest")]

    def receive() -> tuple[SpawnOrder, list[int]]:
        reader: PacketReader[TakeOrder] = PacketReader(TakeOrder)
        while reader.receive(stage.zygote.spares[0][1]):
            for message, fds in reader.messages():
                return message.order, list(fds)
        raise AssertionError("the channel was closed")

    (order, received), _ = await gather(to_thread(receive), stage.spares.hand_over(spare, ORDER, SpawnedFds(*files)))
    assert order == ORDER
    assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in files]
    for fd in (*files, *received):
        os.close(fd)
    stage.spares.keep(["GPU-a"])
    await forked(stage, 2)


async def test_a_spare_that_cannot_be_warmed_is_tried_again_with_pauses(stage: Any) -> None:
    """Refused, ended or never forked: the first is tried again at once here, the next after an hour."""
    stage.spares.keep(["GPU-a"])
    await forked(stage, 1)
    stage.zygote.say(0, SpareRefused("no room on the device"))
    await eventually(lambda: stage.spares.pids() == {}, what="the refused spare forgotten")
    stage.spares.keep(["GPU-a"])
    await forked(stage, 2)
    assert stage.spares.on_exit(stage.zygote.spares[1][0].spare_id)
    assert not stage.spares.on_exit("w1")
    stage.spares.keep(["GPU-a"])
    assert stage.spares.pids() == {}
    assert len(stage.zygote.spares) == 2


async def test_a_device_with_a_fault_loses_its_spare(stage: Any) -> None:
    """Its channel is closed, which ends it."""
    stage.spares.keep(["GPU-a"])
    await forked(stage, 1)
    stage.spares.keep([])
    assert stage.spares.pids() == {}
    assert stage.zygote.spares[0][1].recv(1) == b""


async def test_a_fork_that_fails_leaves_nothing_behind(stage: Any) -> None:
    """No entry, no open channel; a later call tries again."""
    stage.zygote.fails = True
    stage.spares.keep(["GPU-a"])
    await eventually(lambda: stage.spares._failures, what="the failed fork")
    assert stage.spares.pids() == {}
    stage.zygote.fails = False

    async def retried() -> bool:
        stage.spares.keep(["GPU-a"])
        return len(stage.zygote.spares) == 1

    await eventually(retried, what="a spare after the failed one")
