"""``python -m worker.benchmarks.long_prompt``: what a long prompt costs those that stream beside it.

Streams run in one batch; a long prompt joins and is prefilled. Their inter-token times meanwhile are compared with
those of the same tokens in a second pass without the prompt (streams get slower by themselves as they get longer),
several times in one run; and with those right before it joined. The prompt's own time to first token is compared with
that of the same prompt alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from worker.benchmarks.engine_model import (
    EngineDriver,
    Timeline,
    add_options,
    describe_machine,
    make_request,
    open_model,
)
from worker.benchmarks.measurements import summarize
from worker.loaded_model import LoadedModel

KV_BUDGET_BYTES: Final = 1 << 30
STREAM_PROMPT_TOKENS: Final = 32
FIRST_TOKENS: Final = 8  # of each stream, before anything is measured


def measure_pair(model: LoadedModel, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """One run: the prompt alone, streams with the prompt, the same streams without; in milliseconds."""
    draw = random.Random(seed)

    def make_prompt(num_tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, model.plan.vocab_size) for _ in range(num_tokens))

    prompt = make_prompt(options.prompt_tokens)
    stream_prompts = [make_prompt(STREAM_PROMPT_TOKENS) for _ in range(options.streams)]
    with _driving(model, options) as driver:
        alone = driver.submit(make_request("alone", prompt, 2))
        driver.run_until_done()
    with _driving(model, options) as driver:
        streams = _start_streams(driver, model, stream_prompts)
        begin_ns = max(stream.token_ns[-1] for stream in streams)
        for _ in range(options.rounds):
            driver.run_round()
        joined = driver.submit(make_request("joined", prompt, 2))
        while not joined.token_ns:
            driver.run_round()
    with _driving(model, options) as driver:
        undisturbed = _start_streams(driver, model, stream_prompts)
        while any(len(own.token_ns) < len(other.token_ns) for own, other in zip(undisturbed, streams, strict=True)):
            driver.run_round()
    end_ns = joined.token_ns[0] + 1
    before = summarize([gap for stream in streams for gap in stream.gaps_ns(begin_ns, joined.submitted_ns)])
    during = summarize([gap for stream in streams for gap in stream.gaps_ns(joined.submitted_ns, end_ns)])
    without = summarize(
        [
            own.token_ns[index] - own.token_ns[index - 1]
            for own, other in zip(undisturbed, streams, strict=True)
            for index, token_ns in enumerate(other.token_ns)
            if joined.submitted_ns <= token_ns < end_ns
        ]
    )
    return {
        "before_p99_ms": before.p99_us / 1e3,
        "without_p50_ms": without.p50_us / 1e3,
        "without_p99_ms": without.p99_us / 1e3,
        "during_p50_ms": during.p50_us / 1e3,
        "during_p99_ms": during.p99_us / 1e3,
        "during_max_ms": during.max_us / 1e3,
        "p99_ratio": during.p99_us / without.p99_us,
        "p99_ratio_to_before": during.p99_us / before.p99_us,
        "ttft_alone_ms": alone.first_token_ns / 1e6,
        "ttft_beside_ms": joined.first_token_ns / 1e6,
        "ttft_ratio": joined.first_token_ns / alone.first_token_ns,
    }


@contextmanager
def _driving(model: LoadedModel, options: argparse.Namespace) -> Iterator[EngineDriver]:
    driver = EngineDriver(model, options.backend, options.threads, kv_budget_bytes=KV_BUDGET_BYTES)
    try:
        yield driver
    finally:
        driver.close()


def _start_streams(driver: EngineDriver, model: LoadedModel, prompts: list[tuple[int, ...]]) -> list[Timeline]:
    """Streams that run on, each past its first tokens."""
    num_tokens = model.plan.context_length - STREAM_PROMPT_TOKENS
    streams = [driver.submit(make_request(f"stream-{i}", prompt, num_tokens)) for i, prompt in enumerate(prompts)]
    while min(len(stream.token_ns) for stream in streams) < FIRST_TOKENS:
        driver.run_round()
    return streams


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.long_prompt", description=__doc__)
    add_options(parser)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=100, help="steps of the streams before the prompt joins")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    with open_model(options.source, options.weights) as model:
        runs = [measure_pair(model, options, seed) for seed in range(options.runs)]
    medians = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "streams": options.streams,
        "prompt_tokens": options.prompt_tokens,
        "weights": options.weights,
        "runs": runs,
        "median": medians,
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print(json.dumps({"median_of": len(runs), **medians}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
