"""The driver's checkpoint calls, against a library that answers as the driver does; and their absence."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from worker.backends.cuda.checkpoint import DriverCheckpoint, ProcessState, find_checkpoint, probe_checkpoint
from worker.backends.cuda.device import DeviceError


class FakeDriver:
    """Records calls; ``refused`` maps a call's name to its error."""

    def __init__(self, **refused: int) -> None:
        self.calls: list[str] = []
        self._refused = refused

    def __getattr__(self, name: str) -> Any:
        short = name.removeprefix("cuCheckpointProcess")

        def call(pid: ctypes.c_int, argument: Any) -> int:
            assert pid.value == 42
            self.calls.append(short)
            if short == "GetState":
                argument._obj.value = 2
            if short == "Lock":
                assert argument._obj.timeoutMs > 0
                assert ctypes.sizeof(argument._obj) == 64
            return self._refused.get(short, 0)

        return call


def test_suspend_locks_first_and_resume_unlocks_last() -> None:
    """The order that the driver demands."""
    driver = FakeDriver()
    checkpoint = DriverCheckpoint(driver)
    checkpoint.suspend(42)
    assert checkpoint.read_state(42) is ProcessState.CHECKPOINTED
    checkpoint.resume(42)
    assert driver.calls == ["Lock", "Checkpoint", "GetState", "GetState", "Restore", "Unlock"]


def test_refused_checkpoint_lets_the_process_run_on() -> None:
    """A process that cannot be checkpointed (managed memory) is unlocked again, and the error says which call."""
    driver = FakeDriver(Checkpoint=801)
    with pytest.raises(DeviceError, match=r"cuCheckpointProcessCheckpoint of process 42: CUDA error 801"):
        DriverCheckpoint(driver).suspend(42)
    assert driver.calls == ["Lock", "Checkpoint", "Unlock"]


def test_machines_without_the_calls_have_no_checkpoint() -> None:
    """No library, or one without the calls: None, and no error; the probe says why."""
    assert "no driver" in str(probe_checkpoint("libno-such-driver.so.1"))
    assert "570" in str(probe_checkpoint("libc.so.6"))
    assert find_checkpoint("libno-such-driver.so.1") is None
    assert find_checkpoint("libc.so.6") is None
