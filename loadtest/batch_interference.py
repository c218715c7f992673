"""``python -m loadtest batch-interference``: what a running batch costs interactive streams, and what they cost it.

Rounds in turn, so that all conditions meet the same machine: interactive streams alone, the batch alone, both together.
Interactive load comes in open loop (Poisson, seeded) at a share of capacity: of the streams that the server ends in a
second when as many run as ``--capacity-streams``, measured first.
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


class Progress(threading.Thread):
    """Looks at a batch's counts, to know the rate while it runs."""

    def __init__(self, client: BatchClient, batch_id: str) -> None:
        super().__init__(daemon=True)
        self._client, self._batch_id = client, batch_id
        self.seen: list[tuple[float, int]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            count = self._client.get(self._batch_id)["request_counts"]["completed"]
            if not self.seen or count != self.seen[-1][1]:
                self.seen.append((time.monotonic(), count))
            self.ended.wait(0.1)

    def lines_per_s(self) -> float:
        """From the first change of the counts to the last."""
        self.ended.set()
        self.join()
        moved = [one for one in self.seen if one[1] > 0]
        if len(moved) < 2:
            return 0.0
        return (moved[-1][1] - moved[0][1]) / (moved[-1][0] - moved[0][0])


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
    count = options.capacity_streams * 3
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
    alone: list[StreamedAnswer] = []
    beside: list[StreamedAnswer] = []
    rates_alone, rates_beside = [], []
    for number in range(options.rounds):
        alone += drive_interactive(server, options, rate, number)
        batch_id = client.submit(lines)
        client.wait(batch_id, 1)
        progress = Progress(client, batch_id)
        progress.start()
        time.sleep(options.round_s)
        rates_alone.append(progress.lines_per_s())
        progress = Progress(client, batch_id)
        progress.start()
        beside += drive_interactive(server, options, rate, number)
        rates_beside.append(progress.lines_per_s())
        if client.get(batch_id)["status"] in ENDED:
            raise RuntimeError("the batch ended within the round: more --lines, or a shorter --round-s")
        client.cancel(batch_id)
        print(f"round {number}: batch {rates_alone[-1]:.1f} lines/s, beside streams {rates_beside[-1]:.1f}", flush=True)
    without, with_batch = summarise(alone), summarise(beside)
    ratios = {name: with_batch[name] / without[name] for name in without if name.endswith("_ms")}
    return {
        "machine": machine(),
        "model": options.model,
        "batch_lines": options.lines,
        "batch_tokens": options.batch_tokens,
        "stream_tokens": options.tokens,
        "load_of_capacity": options.load,
        "capacity_streams_per_s": capacity,
        "interactive_alone": without,
        "interactive_with_batch": with_batch,
        "ratios": ratios,
        "batch_alone_lines_per_s": rates_alone,
        "batch_with_interactive_lines_per_s": rates_beside,
        "batch_throughput_kept": statistics.median(
            both / one for both, one in zip(rates_beside, rates_alone, strict=True)
        ),
    }


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
