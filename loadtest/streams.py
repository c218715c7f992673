"""Many open streams on one gateway: latency from sampling to the client, CPU and memory of the gateway per stream.

``python -m loadtest streams --streams 5000 --rate 20 --seconds 60``: each of the streams gets ``--rate`` tokens a
second from a stub in the workers' place. ``--slow`` is the share of clients that stop reading, ``--leave`` the share
that hangs up in mid-stream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from loadtest.processes import cpu_seconds, free_port, memory_bytes, wait_until
from loadtest.results import machine, quantile
from loadtest.stream_clients import StreamClient, StreamCounts, open_stream
from loadtest.streaming_client import get_text

MODEL: Final = "stub"
OPEN_AT_ONCE: Final = 64
OPEN_LIMIT_S: Final = 60.0
READY_LIMIT_S: Final = 30.0
STOP_LIMIT_S: Final = 60.0
SETTLE_S: Final = 3.0  # from the last stream's opening to the first figure
#: A run holds its rate if this share of the tokens that were due arrived, and none of the probed ones took longer.
HELD_SHARE: Final = 0.98
HELD_P99_MS: Final = 1000.0
OPEN_METRIC: Final = "glowplug_requests_in_flight"
MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stage:
    """The processes of a run."""

    gateway_pid: int
    redis_pid: int
    stub: subprocess.Popen[str]
    port: int


@contextlib.contextmanager
def run_stage(state_dir: Path, rate_per_s: float, num_tokens: int) -> Iterator[Stage]:
    """The stub with its queue server, and one gateway; both ended at the end."""
    config = state_dir / "config.yaml"
    config.write_text("defaults: {max_queued: 1000000, max_running: 1000000, max_wait_s: 1000000}\n")
    port = free_port()
    words = ["--rate", str(rate_per_s), "--tokens", str(num_tokens)]
    stub = subprocess.Popen(
        [sys.executable, "-m", "tests.stream_stub", str(state_dir), *words], stdout=subprocess.PIPE, text=True
    )
    gateway: subprocess.Popen[bytes] | None = None
    try:
        assert stub.stdout is not None
        started = json.loads(stub.stdout.readline())
        settings = {"REDIS_URL": started["redis_url"], "GLOWPLUG_STATE_DIR": str(state_dir)}
        settings |= {"GLOWPLUG_CONFIG": str(config), "GLOWPLUG_HOST": "127.0.0.1", "GLOWPLUG_PORT": str(port)}
        with (state_dir / "gateway.log").open("wb") as log:
            command = [sys.executable, "-m", "scheduler", "gateway"]
            gateway = subprocess.Popen(command, env={**os.environ, **settings}, stderr=log, stdout=subprocess.DEVNULL)
        wait_until(lambda: _lists_model(port), within_s=READY_LIMIT_S, what="the gateway")
        yield Stage(gateway.pid, started["redis_pid"], stub, port)
    finally:
        # The gateway first: it says goodbye to the queue's server, which ends with the stub.
        for process in (gateway, stub):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(STOP_LIMIT_S)


def _lists_model(port: int) -> bool:
    try:
        return f'"{MODEL}"' in get_text(f"http://127.0.0.1:{port}", "/v1/models")[1]
    except OSError:
        return False


def gateway_metric(port: int, name: str) -> float:
    """The sum of a metric's samples."""
    lines = get_text(f"http://127.0.0.1:{port}", "/metrics")[1].splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


async def drive(stage: Stage, options: argparse.Namespace) -> dict[str, Any]:
    """Open all streams, measure for ``--seconds``, close them; the figures."""
    rng = random.Random(options.seed)
    counts = StreamCounts()
    idle_bytes = memory_bytes(stage.gateway_pid)
    gate = asyncio.Semaphore(OPEN_AT_ONCE)
    num_slow = int(options.streams * options.slow)

    async def open_one(index: int) -> StreamClient:
        async with gate:
            return await open_stream(counts, "127.0.0.1", stage.port, MODEL, index, is_slow=index < num_slow)

    began_s = time.monotonic()
    async with asyncio.timeout(OPEN_LIMIT_S):
        clients = await asyncio.gather(*(open_one(index) for index in range(options.streams)))
    open_s = time.monotonic() - began_s
    print(
        f"{counts.opened} streams open after {open_s:.1f} s, {counts.refused} refused: {counts.status_lines}",
        flush=True,
    )
    await asyncio.sleep(SETTLE_S)
    measured = await _measure(stage, options, counts, clients, rng)
    measured |= {"open_s": round(open_s, 1), "opened": counts.opened, "refused": counts.refused, "slow": num_slow}
    grown_bytes = measured["gateway_pss_first_bytes"] - idle_bytes
    measured["kib_per_stream_at_first"] = round(grown_bytes / 1024 / max(1, counts.opened), 1)
    measured["gateway_idle_mib"] = round(idle_bytes / MIB, 1)
    return measured


async def _measure(
    stage: Stage, options: argparse.Namespace, counts: StreamCounts, clients: list[StreamClient], rng: random.Random
) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    staying = [client for client in clients if not client.is_slow]
    for client in rng.sample(staying, int(options.streams * options.leave)):
        loop.call_later(rng.uniform(0.25, 0.75) * options.seconds, client.leave)
    began_s, cpu_before = time.monotonic(), _cpu_of(stage)
    tokens_before, bytes_before = counts.tokens, counts.num_bytes
    memory = [memory_bytes(stage.gateway_pid)]
    due = 0.0
    while (elapsed_s := time.monotonic() - began_s) < options.seconds:
        step_s = min(5.0, options.seconds - elapsed_s)
        readers = len(staying) - counts.left
        await asyncio.sleep(step_s)
        due += step_s * options.rate * (readers + len(staying) - counts.left) / 2
        memory.append(await asyncio.to_thread(memory_bytes, stage.gateway_pid))
    wall_s = time.monotonic() - began_s
    cpu = {name: (used - cpu_before[name]) / wall_s for name, used in _cpu_of(stage).items()}
    tokens = counts.tokens - tokens_before
    latencies_ms = [ms for at_s, ms in counts.latencies_ms if began_s <= at_s <= began_s + wall_s] or [0.0]
    cut_before = counts.cut
    for client in clients:
        client.read_on()
    await asyncio.sleep(1.0)
    slow_cut = counts.cut - cut_before
    open_streams = await asyncio.to_thread(gateway_metric, stage.port, OPEN_METRIC)
    for client in clients:
        client.close()
    p99_ms = quantile(latencies_ms, 0.99)
    return {
        "seconds": round(wall_s, 1),
        "tokens_per_s": round(tokens / wall_s),
        "tokens_due_per_s": round(due / wall_s),
        "held": tokens >= HELD_SHARE * due and p99_ms <= HELD_P99_MS,
        "latency_p50_ms": round(quantile(latencies_ms, 0.5), 2),
        "latency_p99_ms": round(p99_ms, 2),
        "latency_max_ms": round(max(latencies_ms), 2),
        "out_of_order": counts.out_of_order,
        "mib_per_s": round((counts.num_bytes - bytes_before) / wall_s / MIB, 2),
        "cpu_cores": {name: round(share, 3) for name, share in cpu.items()},
        "gateway_us_per_token": round(cpu["gateway"] * wall_s / max(1, tokens) * 1e6, 1),
        "gateway_cpu_per_stream": round(cpu["gateway"] / max(1, counts.opened), 6),
        "gateway_pss_first_bytes": memory[0],
        "gateway_pss_mib": [round(one / MIB, 1) for one in memory],
        "left": counts.left,
        "slow_cut": slow_cut,
        "cut": counts.cut - slow_cut,
        "failed": counts.failed,
        "ended": counts.ended,
        "open_at_end": open_streams,
    }


def _cpu_of(stage: Stage) -> dict[str, float]:
    pids = {"gateway": stage.gateway_pid, "redis": stage.redis_pid, "stub": stage.stub.pid, "clients": os.getpid()}
    return {name: cpu_seconds(pid) for name, pid in pids.items()}


def run_streams(arguments: list[str]) -> int:
    """Command line of ``python -m loadtest streams``; 1 when a token came out of order or a stream was refused."""
    parser = argparse.ArgumentParser(prog="python -m loadtest streams", description=__doc__)
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=20.0, help="tokens a second in each stream")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slow", type=float, default=0.0, help="share of clients that stop reading")
    parser.add_argument("--leave", type=float, default=0.0, help="share of clients that hang up in mid-stream")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    num_tokens = int(options.rate * (options.seconds + OPEN_LIMIT_S)) + 100
    with tempfile.TemporaryDirectory(prefix="gp-streams-") as folder:
        with run_stage(Path(folder), options.rate, num_tokens) as stage:
            figures = uvloop.run(drive(stage, options))
            stub = stage.stub
        assert stub.stdout is not None
        figures["stub"] = json.loads(stub.stdout.readline())
    figures |= {"streams": options.streams, "rate": options.rate, "machine": machine()}
    print(json.dumps(figures, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if figures["out_of_order"] or figures["refused"] else 0


if __name__ == "__main__":
    sys.exit(run_streams(sys.argv[1:]))
