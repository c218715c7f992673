"""Agent, zygote and workers as real processes on a machine with (emulated) GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.processes import Server, glowplug_command
from loadtest.streaming_client import get_json
from scheduler.contract import keys, reloading
from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import ParkWorker
from scheduler.contract.states import ParkPolicy, SlotState, Tier
from scheduler.contract.telemetry import Mark
from tests.checkpoint_fixtures import CHECKPOINTED, RUNNING
from tests.eventually import eventually, eventually_sync
from tests.gpu_host_fixtures import GPU, OTHER_GPU, EmulatedGpus, GpuHost
from tests.log_lines import read_log
from tests.worker_fixtures import MODEL, NODE, copy_state_dir, make_request, wait_gone


@pytest.fixture
async def host(redis_url: str, short_tmp_path: Path) -> AsyncIterator[GpuHost]:
    async with GpuHost(redis_url, copy_state_dir(short_tmp_path / "state")) as running:
        yield running


def mapped_libraries(pid: int) -> str:
    """All that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


def just_accepted() -> dict[str, int]:
    """Marks of a request that a gateway accepts now."""
    return {Mark.ACCEPTED: time.monotonic_ns()}


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
    host.gpus.driver.processes = [(1, worker.pid, 123456)]
    host.gpus.driver.write()

    async def told() -> bool:
        found = await host.node_report()
        return found is not None and found.gpus[1].worker_bytes == {"w1": 123456}

    await eventually(told, what="the worker's device memory in the report")
    agent, zygote = mapped_libraries(host.agent.pid), mapped_libraries(report.zygote_pid)
    assert "libnvidia-ml" in agent
    assert "libcuda" not in agent
    assert not any(name in zygote for name in ("libnvidia", "libcuda", "cublas"))


async def test_a_parked_worker_is_called_back_by_a_request(host: GpuHost) -> None:
    """Asked to, it leaves the device (T3) and keeps its process; the request that meets it says so, the next is hot.

    While the device is full of others' data it waits for room instead of dying of it.
    """
    worker = await host.spawn("w1", device=GPU)
    expected, terminal = await host.ask("r0", marks=just_accepted())
    assert (terminal.error, terminal.cold_tier) == (None, None)
    await host.order(ParkWorker("w1", host.fencing_token))
    await host.wait_change("w1", "parked")
    host.gpus.govern(capacity_bytes=1 << 16)
    await host.dispatcher.enqueue(make_request("r1", marks=just_accepted()))

    async def is_taken() -> bool:
        return bool(await host.redis.exists(keys.in_progress("r1")))

    await eventually(is_taken, what="r1 taken by the parked worker")
    host.gpus.govern()
    text, terminal = await host.wait_answer("r1")
    assert (text, terminal.error, terminal.cold_tier) == (expected, None, Tier.PARKED)
    _, terminal = await host.ask("r2", marks=just_accepted())
    assert (terminal.error, terminal.cold_tier) == (None, None)
    assert (await host.worker_report("w1")).pid == worker.pid


async def test_a_worker_is_released_and_fetched_back(host: GpuHost) -> None:
    """The driver takes the whole process off its GPU (T3r); a request fetches it, says so, and gets the same text. What
    the driver refuses is parked (T3) and serves as well. Neither agent nor zygote has the driver's library for it."""
    worker = await host.spawn("w1", device=GPU, park=ParkPolicy.RELEASE)
    assert worker.park is ParkPolicy.RELEASE
    expected, _ = await host.ask("r0")
    await host.order(ParkWorker("w1", host.fencing_token))
    await host.wait_change("w1", "released")
    assert host.gpus.checkpoint.state(worker.pid) == CHECKPOINTED
    text, terminal = await host.ask("r1", marks=just_accepted())
    assert (text, terminal.error, terminal.cold_tier) == (expected, None, Tier.RELEASED)
    assert host.gpus.checkpoint.state(worker.pid) == RUNNING
    host.gpus.checkpoint.order("refuse Checkpoint 801")
    await host.order(ParkWorker("w1", host.fencing_token))
    await host.wait_logged("release_refused")
    await eventually(lambda: is_in_state(host, "w1", SlotState.PARKED), what="parked instead")
    text, terminal = await host.ask("r2", marks=just_accepted())
    assert (text, terminal.error, terminal.cold_tier) == (expected, None, Tier.PARKED)
    report = await host.node_report()
    assert report is not None
    for pid in (host.agent.pid, report.zygote_pid):
        assert "libcuda" not in mapped_libraries(pid)


async def is_in_state(host: GpuHost, worker_id: str, state: SlotState) -> bool:
    """As the worker's own report says."""
    return (await host.worker_report(worker_id)).state is state


async def test_a_worker_that_dies_off_its_device_is_replaced(host: GpuHost) -> None:
    """Killed while released, or drained: its end is told like any other, and the next worker serves."""
    worker = await host.spawn("w1", device=GPU, park=ParkPolicy.RELEASE, park_after_s=0.05)
    await host.wait_change("w1", "released")
    os.kill(worker.pid, signal.SIGKILL)
    lost = await host.wait_change("w1", "failed", exited=True)
    assert lost.error is not None
    second = await host.spawn("w2", device=GPU, park=ParkPolicy.RELEASE, park_after_s=0.05)
    await host.wait_change("w2", "released")
    _, terminal = await host.ask("r1", marks=just_accepted())
    assert (terminal.error, terminal.worker_id, terminal.cold_tier) == (None, "w2", Tier.RELEASED)
    await eventually(lambda: host.gpus.checkpoint.state(second.pid) == CHECKPOINTED, what="released again")
    await host.order_drain("w2")
    assert (await host.wait_change("w2", "cold", exited=True)).error is None


async def test_a_worker_that_cannot_come_back_ends_and_its_request_goes_on(host: GpuHost) -> None:
    """The driver fails to fetch it: an error of the device, so another worker answers."""
    await host.spawn("w1", device=GPU, park=ParkPolicy.RELEASE)
    await host.order(ParkWorker("w1", host.fencing_token))
    await host.wait_change("w1", "released")
    host.gpus.checkpoint.order("refuse Restore 999")
    await host.dispatcher.enqueue(make_request("r1"))
    lost = await host.wait_change("w1", "failed", exited=True)
    assert lost.error is not None
    assert lost.had_requests
    host.gpus.checkpoint.order()
    await host.spawn("w2", device=OTHER_GPU)
    _, terminal = await host.wait_answer("r1")
    assert (terminal.error, terminal.worker_id) == (None, "w2")


async def test_an_idle_worker_is_parked_by_its_policy_and_drained_from_there(host: GpuHost) -> None:
    """After ``park_after_s`` without a request; a drain order ends it as any other."""
    worker = await host.spawn("w1", device=GPU, park_after_s=0.1)
    await host.wait_change("w1", "parked")
    await host.order_drain("w1")
    assert (await host.wait_change("w1", "cold", exited=True)).error is None
    await wait_gone(worker.pid)


async def test_a_sticky_error_ends_the_worker_and_its_request_goes_on_in_the_next(host: GpuHost) -> None:
    """The device is lost in the middle of a stream: another worker, on the other GPU, ends it without gap or repeat."""
    long = {"max_tokens": 100, "num_choices": 2}
    worker = await host.spawn("w1", device=GPU)
    undisturbed, _ = await host.ask("calm", **long)
    storm = await host.stop_in_mid_stream(worker.pid, **long)
    logged = await host.frames(storm)
    host.gpus.govern(lose=worker.pid)
    os.kill(worker.pid, signal.SIGCONT)
    lost = await host.wait_change("w1", "failed", exited=True)
    assert lost.error is not None
    assert lost.had_requests
    await host.spawn("w2", device=OTHER_GPU)
    text, terminal = await host.wait_answer(storm)
    assert (text, terminal.error, terminal.worker_id) == (undisturbed, None, "w2")
    assert (await host.frames(storm))[: len(logged)] == logged


async def test_a_model_that_does_not_fit_is_refused_and_the_agent_lives(host: GpuHost) -> None:
    """An allocation failure of a start: reported with its cause, the process gone, the next order served."""
    host.gpus.govern(capacity_bytes=1 << 20)
    await host.order_spawn("w1", device=GPU)
    failed = await host.wait_change("w1", "failed")
    assert failed.error is not None
    assert (failed.error.code, "device memory" in failed.error.message) == (ErrorCode.OUT_OF_MEMORY, True)
    await host.wait_change("w1", "cold", exited=True)
    host.gpus.govern()
    await host.spawn("w2", device=GPU)
    _, terminal = await host.ask("r1")
    assert (terminal.error, terminal.worker_id) == (None, "w2")


async def test_a_wake_takes_a_warm_spare_and_another_takes_its_place(redis_url: str, short_tmp_path: Path) -> None:
    """One on each GPU, told in the node's report with its memory; the worker is that process, on that GPU; a spare that
    is killed is replaced; with the agent all end."""
    async with GpuHost(redis_url, copy_state_dir(short_tmp_path / "state"), GLOWPLUG_SPARE_WORKERS="1") as host:

        async def spares() -> dict[str, int]:
            report = await host.node_report()
            return {gpu.uuid: gpu.spare_workers for gpu in report.gpus} if report is not None else {}

        async def all_warm() -> bool:
            return await spares() == {GPU: 1, OTHER_GPU: 1}

        await eventually(all_warm, what="a warm spare on each GPU")
        pids = {line["pid"] for line in logged(host, "spare_warm")}
        host.gpus.driver.processes = [(1, pid, 1000 + number) for number, pid in enumerate(sorted(pids))]
        host.gpus.driver.write()
        worker = await host.spawn("w1", device=OTHER_GPU)
        assert worker.pid in pids
        assert f"emulated gpu 0 of {OTHER_GPU} in {worker.pid}" in host.log.read_text()
        _, terminal = await host.ask("r1")
        assert (terminal.error, terminal.worker_id) == (None, "w1")

        async def memory_told() -> bool:
            report = await host.node_report()
            return report is not None and report.gpus[1].worker_bytes.keys() == {"w1"}

        await eventually(memory_told, what="the former spare's memory as its worker's")
        await eventually(all_warm, what="another spare in its place")
        (idle,) = pids - {worker.pid}
        os.kill(idle, signal.SIGKILL)
        await eventually(lambda: len(logged(host, "spare_warm")) == 4, what="the killed spare replaced")
        os.kill(worker.pid, signal.SIGKILL)
        lost = await host.wait_change("w1", "failed", exited=True)
        assert lost.error is not None
        assert "SIGKILL" in lost.error.message
        everyone = {line["pid"] for line in logged(host, "spare_warm")}
    await wait_gone(*everyone)


async def test_a_drained_node_keeps_no_spare(redis_url: str, short_tmp_path: Path) -> None:
    """Draining ends them and none is started; they are back after it."""
    async with GpuHost(redis_url, copy_state_dir(short_tmp_path / "state"), GLOWPLUG_SPARE_WORKERS="1") as host:
        redis: Any = host.redis

        async def has_spares(number: int) -> bool:
            report = await host.node_report()
            return report is not None and [gpu.spare_workers for gpu in report.gpus] == [number, number]

        await eventually(lambda: has_spares(1), what="a warm spare on each GPU")
        pids = [line["pid"] for line in logged(host, "spare_warm")]
        await redis.sadd(keys.DRAINED_NODES, NODE)
        await wait_gone(*pids)
        await eventually(lambda: has_spares(0), what="no spare in the report")
        assert len(logged(host, "spare_warm")) == 2
        await redis.srem(keys.DRAINED_NODES, NODE)
        await eventually(lambda: has_spares(1), what="spares again")


async def test_a_gpu_with_memory_errors_loses_its_spare_until_they_are_accepted(
    redis_url: str, short_tmp_path: Path
) -> None:
    """Out of use with a line in the log; a reload of the configuration takes it in again, and the spare is back."""
    async with GpuHost(redis_url, copy_state_dir(short_tmp_path / "state"), GLOWPLUG_SPARE_WORKERS="1") as host:

        async def spares_and_faults() -> list[tuple[int, bool]]:
            report = await host.node_report()
            return [(gpu.spare_workers, bool(gpu.fault)) for gpu in report.gpus] if report is not None else []

        async def are(*expected: tuple[int, bool]) -> bool:
            return await spares_and_faults() == list(expected)

        await eventually(lambda: are((1, False), (1, False)), what="a warm spare on each GPU")
        host.gpus.driver.gpus[0].uncorrected_ecc = 1
        host.gpus.driver.write()
        await eventually(lambda: are((0, True), (1, False)), what="the first GPU out of use")
        assert [line["uuid"] for line in logged(host, "gpu_out_of_use")] == [GPU]
        await reloading.order_reload(host.redis)
        await eventually(lambda: are((1, False), (1, False)), what="the first GPU in use again")
        assert [line["uuid"] for line in logged(host, "gpu_in_use_again")] == [GPU]


def test_spares_on_a_cpu_are_refused_with_a_reason(redis_url: str, short_tmp_path: Path) -> None:
    """The setting is for GPUs; the message says why and what to do."""
    env = {**os.environ, "REDIS_URL": redis_url, "GLOWPLUG_SPARE_WORKERS": "1", "GLOWPLUG_BACKEND": "numkong"}
    state_dir = copy_state_dir(short_tmp_path / "state")
    command = [sys.executable, "-m", "worker", "agent"]
    done = subprocess.run(
        command, env={**env, "GLOWPLUG_STATE_DIR": str(state_dir)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 78
    assert "spares are for GPUs" in done.stderr
    assert "set it to 0" in done.stderr


def logged(host: GpuHost, event: str) -> list[dict[str, Any]]:
    """Lines of that event in the agent's log."""
    return read_log(host.log, event)


def glowplug(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    """A verb on the server."""
    env = {**os.environ, "GLOWPLUG_STATE_DIR": str(server.state_dir)}
    return subprocess.run([*glowplug_command(), *words], env=env, capture_output=True, text=True, timeout=60)


def cold_start_of_a_chat(server: Server) -> str:
    """What a request met, as its answer's header says."""
    body = {"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(response.headers["X-Cold-Start"])


def test_a_server_parks_and_wakes_a_model_on_a_gpu(short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`glowplug serve` whole: a wake goes to a GPU by the scheduler's choice; park gives its memory back and the next
    request says that it met a parked model; park refuses what is asleep, and `wake` brings a parked model back. A GPU
    that falls off the bus is told by `ps` and `doctor`, and the next wake goes to the other one."""
    state_dir = copy_state_dir(short_tmp_path / "state")
    (state_dir / "glowplug.yaml").write_text("defaults: {idle_timeout_s: 600, kv_budget_bytes: 67108864}\n")
    gpus = EmulatedGpus(state_dir)
    for name, value in gpus.env.items():
        monkeypatch.setenv(name, value)
    with Server(state_dir) as server:
        server.wait_ready()
        server.wait_listed(MODEL)
        asleep = glowplug(server, "park", MODEL)
        assert (asleep.returncode, "nothing to park" in asleep.stderr) == (1, True)
        assert cold_start_of_a_chat(server) == "disk"
        parked = glowplug(server, "park", MODEL)
        assert (parked.stdout, parked.stderr) == ("tiny: T3, parked\n", "")
        assert cold_start_of_a_chat(server) == "parked"
        assert cold_start_of_a_chat(server) == "hot"
        assert glowplug(server, "park", MODEL).returncode == 0
        assert glowplug(server, "wake", MODEL).stdout == "tiny: T4, ready\n"
        assert cold_start_of_a_chat(server) == "hot"
        workers = eventually_sync(lambda: get_json(server.url, "/admin/status")["workers"], what="the worker's report")
        assert [worker["device"] in (GPU, OTHER_GPU) for worker in workers] == [True]
        index = (GPU, OTHER_GPU).index(workers[0]["device"])
        gpus.driver.xids = [(index, 31), (index, 79)]
        gpus.driver.write()
        eventually_sync(lambda: "FAULT: Xid 79" in glowplug(server, "ps").stdout, what="the fault in `glowplug ps`")
        doctor = json.loads(glowplug(server, "doctor", "--json").stdout)
        assert [row["level"] for row in doctor["findings"] if row["check"].startswith(f"GPU {index} of")] == ["fail"]
        assert glowplug(server, "unload", MODEL).returncode == 0
        assert cold_start_of_a_chat(server) in ("snapshot", "disk")
        workers = eventually_sync(lambda: get_json(server.url, "/admin/status")["workers"], what="the new worker")
        assert workers[0]["device"] == (GPU, OTHER_GPU)[1 - index]
        assert server.stop() == 0
