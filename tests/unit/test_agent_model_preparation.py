"""What the agent has its zygote prepare: once a snapshot, forgotten with it, again after a zygote's death, bounded."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from worker import model_preparation
from worker.model_preparation import ModelPreparation
from worker.spawn_order import ForgetPrepared, ModelPrepared, PrepareFailed, PrepareModel, SpawnedFds


class Recorder:
    """A zygote that writes down what it is sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def prepare(self, message: PrepareModel, fds: SpawnedFds) -> None:
        for fd in fds.all:
            os.fstat(fd)
        self.sent.append(f"prepare {message.snapshot_id}")

    async def forget(self, message: ForgetPrepared) -> None:
        self.sent.append(f"forget {message.snapshot_id}")


class Harness:
    def __init__(self) -> None:
        self.zygote = Recorder()
        self.models = ModelPreparation(self.zygote)

    async def fork(self, snapshot_id: str) -> None:
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
        self.models.on_forked(PrepareModel(snapshot_id, b"manifest", "numpy", 1), SpawnedFds(*files))
        for fd in files:
            os.close(fd)  # the caller's, which it may close at once
        await self.settle()

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def die(self) -> None:
        self.models.on_zygote_died()
        self.models.on_zygote_ready()
        await self.settle()


def num_open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_snapshot_is_prepared_once_and_forgotten_when_it_is_dropped() -> None:
    """Two forks, one preparation; after the drop a fork prepares again, and no descriptor is left open at the end."""
    before = num_open_fds()
    harness = Harness()
    await harness.fork("a")
    await harness.fork("a")
    harness.models.on_dropped("a")
    harness.models.on_dropped("a")
    await harness.fork("a")
    assert harness.zygote.sent == ["prepare a", "forget a", "prepare a"]
    harness.models.close()
    harness.models.close()
    assert num_open_fds() == before


async def test_the_longest_unused_is_forgotten_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zygote's memory is bounded by a number of models, in order of use."""
    monkeypatch.setattr(model_preparation, "MAX_PREPARED", 2)
    harness = Harness()
    for snapshot_id in ("a", "b", "a", "c"):
        await harness.fork(snapshot_id)
    assert harness.zygote.sent == ["prepare a", "prepare b", "forget b", "prepare c"]
    harness.models.close()


async def test_a_new_zygote_prepares_all_again() -> None:
    """What the dead one had prepared is asked for again, without a fork."""
    harness = Harness()
    await harness.fork("a")
    harness.models.on_answer(ModelPrepared("a", 1.0))
    await harness.die()
    assert harness.zygote.sent == ["prepare a"] * 2
    harness.models.close()


async def test_what_two_zygotes_died_of_is_given_up() -> None:
    """A preparation that kills zygotes must not take every worker of the host down for ever."""
    harness = Harness()
    await harness.fork("a")
    await harness.die()
    await harness.die()
    await harness.fork("a")
    assert harness.zygote.sent == ["prepare a"] * 2
    harness.models.on_dropped("a")  # another sealing is another chance
    await harness.fork("a")
    assert harness.zygote.sent == ["prepare a"] * 3
    harness.models.close()


async def test_an_agent_without_descriptors_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only some of a snapshot's files can be copied, the copies are closed again."""
    copy, left = os.dup, iter(range(2))

    def scarce(fd: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return copy(fd)

    harness = Harness()
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    before = num_open_fds()
    monkeypatch.setattr(os, "dup", scarce)
    with pytest.raises(OSError, match="Too many open files"):
        harness.models.on_forked(PrepareModel("a", b"manifest", "numpy", 1), SpawnedFds(*files))
    assert num_open_fds() == before
    harness.models.close()
    for fd in files:
        os.close(fd)


async def test_a_failed_preparation_is_not_repeated() -> None:
    """The snapshot's workers restore by themselves from then on."""
    harness = Harness()
    await harness.fork("a")
    harness.models.on_answer(PrepareFailed("a", "no"))
    harness.models.on_answer(ModelPrepared("b", 1.0))  # of one that was dropped meanwhile
    await harness.fork("a")
    assert harness.zygote.sent == ["prepare a"]
    harness.models.close()
