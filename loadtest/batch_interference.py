"""``python -m loadtest batch-interference``: what a running batch costs interactive streams, and what they cost it.

Each round has three conditions, so that they meet the same machine: interactive streams alone, the batch alone, both
together with the same arrivals as alone; every second round takes the last two in the other order. Interactive load
comes in open loop (Poisson, seeded) at a share of capacity: of the streams that the server ends in a second when
``--capacity-streams`` of them always run, measured before the first round (which decides the load) and after the last.
Percentiles are of all rounds together. A batch of ``--lines`` lines that ends within a round is followed by the next.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtest.processes import Server
from loadtest.results import machine, quantile
from loadtest.streaming_client import StreamedAnswer, chat_body, get_json, post_stream

ENDED = ("completed", "failed", "expired", "cancelled")
LIMIT_S = 600.0


class BatchClient:
    """Files and batches of one server, by hand: the load generator imports nothing of ours."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _send(self, method: str, path: str, body: bytes, content_type: str) -> dict[str, Any]:
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": content_type})
            response = connection.getresponse()
            text = response.read()
            if response.status != 200:
                raise RuntimeError(f"{path}: {response.status} {text[:300]!r}")
            return dict(json.loads(text))
        finally:
            connection.close()

    def submit(self, lines: list[dict[str, Any]]) -> str:
        """Upload and begin; the batch id."""
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        body = (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="r.jsonl"\r\n\r\n' + data + b"\r\n--b--\r\n"
        )
        uploaded = self._send("POST", "/v1/files", body, "multipart/form-data; boundary=b")
        asked = {"input_file_id": uploaded["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return str(self._send("POST", "/v1/batches", json.dumps(asked).encode(), "application/json")["id"])

    def get(self, batch_id: str) -> dict[str, Any]:
        return dict(get_json(self.url, f"/v1/batches/{batch_id}"))

    def cancel(self, batch_id: str) -> None:
        """Cancel and wait for the end."""
        self._send("POST", f"/v1/batches/{batch_id}/cancel", b"{}", "application/json")
        self.wait(batch_id)

    def wait(self, batch_id: str, num_lines: int | None = None) -> dict[str, Any]:
        """Until it has ended, or has answered ``num_lines``."""
        deadline_s = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline_s:
            found = self.get(batch_id)
            if found["status"] in ENDED or (num_lines and found["request_counts"]["completed"] >= num_lines):
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{batch_id} did not end in {LIMIT_S:g} s")


class RunningBatch(threading.Thread):
    """Keeps one batch under way, the next when one has ended, and counts the lines that were answered."""

    def __init__(self, client: BatchClient, lines: list[dict[str, Any]]) -> None:
        super().__init__(daemon=True)
        self._client, self._lines = client, lines
        self._batch_id = client.submit(lines)
        self._num_before = 0  # lines of batches that have ended
        self._changes: list[tuple[float, int]] = []
        self._ending = threading.Event()
        client.wait(self._batch_id, 1)
        self.start()

    def run(self) -> None:
        while not self._ending.wait(0.1):
            found = self._client.get(self._batch_id)
            count = self._num_before + found["request_counts"]["completed"]
            if not self._changes or count != self._changes[-1][1]:
                self._changes.append((time.monotonic(), count))
            if found["status"] in ENDED:
                self._num_before = count
                self._batch_id = self._client.submit(self._lines)

    def lines_per_s(self, since_s: float) -> float:
        """From the first change of the count after ``since_s`` (monotonic) to the latest."""
        changes = [change for change in self._changes if change[0] >= since_s]
        if len(changes) < 2:
            return 0.0
        return (changes[-1][1] - changes[0][1]) / (changes[-1][0] - changes[0][0])

    def stop(self) -> None:
        """Cancel what runs and wait for its end."""
        self._ending.set()
        self.join()
        self._client.cancel(self._batch_id)


def batch_lines(model: str, count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Small chats, each another one."""
    return [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": [{"role": "user", "content": f"Say the number {i}."}],
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            },
        }
        for i in range(count)
    ]


def measure_capacity(server: Server, options: argparse.Namespace) -> float:
    """Streams ended in a second with ``--capacity-streams`` at once."""
    body = chat_body(options.model, max_tokens=options.tokens, ignore_eos=True)
    count = options.capacity_streams * 6
    with concurrent.futures.ThreadPoolExecutor(options.capacity_streams) as pool:
        began_s = time.monotonic()
        list(pool.map(lambda _: post_stream(server.url, body), range(count)))
        took_s = time.monotonic() - began_s
    return float(count / took_s)


def drive_interactive(server: Server, options: argparse.Namespace, rate: float, seed: int) -> list[StreamedAnswer]:
    """Streams in open loop for ``--round-s`` seconds."""
    chance = random.Random(seed)
    body = chat_body(options.model, max_tokens=options.tokens, ignore_eos=True)
    pending = []
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        end_s = time.monotonic() + options.round_s
        while (now_s := time.monotonic()) < end_s:
            pending.append(pool.submit(post_stream, server.url, body))
            time.sleep(min(chance.expovariate(rate), max(0.0, end_s - now_s)))
        return [one.result() for one in pending]


def summarise(answers: list[StreamedAnswer]) -> dict[str, float]:
    """First tokens and gaps in ms."""
    first = [answer.first_content_ms for answer in answers]
    gaps = [
        later - earlier
        for answer in answers
        for earlier, later in zip(answer.content_at_ms, answer.content_at_ms[1:], strict=False)
    ]
    return {
        "streams": len(answers),
        "ttft_p50_ms": statistics.median(first),
        "ttft_p99_ms": quantile(first, 0.99),
        "itl_p50_ms": statistics.median(gaps),
        "itl_p99_ms": quantile(gaps, 0.99),
    }


def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and what they come to."""
    client, lines = BatchClient(server.url), batch_lines(options.model, options.lines, options.batch_tokens)
    measure_capacity(server, options)  # the first wakes the model
    capacity = measure_capacity(server, options)
    rate = options.load * capacity
    print(f"capacity {capacity:.2f} streams/s, interactive load {rate:.2f}/s", flush=True)
    rounds = []
    for number in range(options.rounds):
        rounds.append(measure_round(server, options, client, lines, rate, number))
        done = rounds[-1]
        print(
            f"round {number}: batch {done['lines_alone']:.1f} lines/s, beside streams {done['lines_beside']:.1f}; "
            + ", ".join(f"{name} {ratio:.2f}" for name, ratio in compare(done["alone"], done["beside"]).items()),
            flush=True,
        )
    alone = [answer for done in rounds for answer in done["alone"]]
    beside = [answer for done in rounds for answer in done["beside"]]
    kept = [done["lines_beside"] / done["lines_alone"] for done in rounds]
    return {
        "machine": machine(),
        "model": options.model,
        "batch_lines": options.lines,
        "batch_tokens": options.batch_tokens,
        "stream_tokens": options.tokens,
        "round_s": options.round_s,
        "load_of_capacity": options.load,
        "capacity_streams": options.capacity_streams,
        "capacity_streams_per_s": [capacity, measure_capacity(server, options)],
        "interactive_alone": summarise(alone),
        "interactive_with_batch": summarise(beside),
        "ratios": compare(alone, beside),
        "ratios_of_rounds": [compare(done["alone"], done["beside"]) for done in rounds],
        "batch_alone_lines_per_s": [done["lines_alone"] for done in rounds],
        "batch_with_interactive_lines_per_s": [done["lines_beside"] for done in rounds],
        "batch_throughput_kept_of_rounds": kept,
        "batch_throughput_kept": statistics.median(kept),
    }


def measure_round(
    server: Server,
    options: argparse.Namespace,
    client: BatchClient,
    lines: list[dict[str, Any]],
    rate: float,
    number: int,
) -> dict[str, Any]:
    """The three conditions, the same arrivals in two of them."""
    alone = drive_interactive(server, options, rate, number)
    batch = RunningBatch(client, lines)
    lines_alone = lines_beside = 0.0
    beside: list[StreamedAnswer] = []
    for is_alone in (True, False) if number % 2 == 0 else (False, True):
        since_s = time.monotonic()
        if is_alone:
            time.sleep(options.round_s)
            lines_alone = batch.lines_per_s(since_s)
        else:
            beside = drive_interactive(server, options, rate, number)
            lines_beside = batch.lines_per_s(since_s)
    batch.stop()
    return {"alone": alone, "beside": beside, "lines_alone": lines_alone, "lines_beside": lines_beside}


def compare(alone: list[StreamedAnswer], beside: list[StreamedAnswer]) -> dict[str, float]:
    """Times with a batch over times without."""
    without, with_batch = summarise(alone), summarise(beside)
    return {name: with_batch[name] / without[name] for name in without if name.endswith("_ms")}


def run_batch_interference(arguments: list[str]) -> int:
    """Measure, print, write JSON; 0 when the promises hold, else 1."""
    parser = argparse.ArgumentParser(prog="python -m loadtest batch-interference", description=__doc__)
    parser.add_argument("--state-dir", type=Path, required=True, help="a state folder with the model; it is copied")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-s", type=float, default=10.0)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--load", type=float, default=0.2)
    parser.add_argument("--capacity-streams", type=int, default=8)
    parser.add_argument("--config", type=Path, help="glowplug.yaml of the server")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="gp-") as folder:
        state_dir = Path(folder) / "s"
        shutil.copytree(options.state_dir, state_dir, copy_function=link_blobs, ignore=shutil.ignore_patterns("run"))
        extra = ["--config", str(options.config)] if options.config else []
        with Server(state_dir, "--idle-timeout-s", "300", *extra, log=Path(folder) / "log") as server:
            server.wait_ready()
            server.wait_listed(options.model)
            found = measure(server, options)
    text = json.dumps(found, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    worst = max(found["ratios"]["ttft_p99_ms"], found["ratios"]["itl_p99_ms"])
    return 0 if worst <= 1.5 and found["batch_throughput_kept"] >= 0.8 else 1


def link_blobs(source: str, target: str) -> None:
    """Blobs are large and never change: hard links, where both folders are on one file system."""
    if "/blobs/" in source:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system
            pass
    shutil.copy2(source, target)
