"""Agent, zygote and workers as real processes on a machine with (emulated) GPUs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.gpu_host_fixtures import GPU, OTHER_GPU, GpuHost
from tests.worker_fixtures import copy_state_dir


@pytest.fixture
async def host(redis_url: str, short_tmp_path: Path) -> AsyncIterator[GpuHost]:
    async with GpuHost(redis_url, copy_state_dir(short_tmp_path / "state")) as running:
        yield running


def mapped_libraries(pid: int) -> str:
    """All that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


async def test_a_node_reports_its_gpus_and_a_worker_sees_only_its_own(host: GpuHost) -> None:
    """Two GPUs in the heartbeat; the order's one is all that the worker's driver would find; whose memory is whose.

    The agent asks the driver's management library and opens no CUDA; the zygote does neither.
    """
    report = await host.wait_registered()
    assert [(gpu.index, gpu.uuid, gpu.fault) for gpu in report.gpus] == [(0, GPU, ""), (1, OTHER_GPU, "")]
    worker = await host.spawn("w1", device=OTHER_GPU)
    assert worker.device == OTHER_GPU
    assert f"emulated gpu 0 of {OTHER_GPU} in {worker.pid}" in host.log.read_text()
    _, terminal = await host.ask("r1")
    assert (terminal.error, terminal.usage.completion_tokens) == (None, 12)
    host.driver.processes = [(1, worker.pid, 123456)]
    host.driver.write()

    async def told() -> bool:
        found = await host.node_report()
        return found is not None and found.gpus[1].worker_bytes == {"w1": 123456}

    await eventually(told, what="the worker's device memory in the report")
    agent, zygote = mapped_libraries(host.agent.pid), mapped_libraries(report.zygote_pid)
    assert "libnvidia-ml" in agent
    assert "libcuda" not in agent
    assert not any(name in zygote for name in ("libnvidia", "libcuda", "cublas"))
