"""``python -m worker.benchmarks.prefix_cache``: what keeping KV blocks is worth for prompts that begin alike.

Requests arrive one after the other, each a shared beginning (chosen with Zipf's frequencies, as system prompts and
documents are) and a question of its own. The same requests go to an engine with prefix caching and to one without, in
turns, within one run. The hit rate is the share of prompt tokens that were taken over instead of computed.

A prompt that is computed in two parts has logits that differ in their last bits (activations are rounded to bf16), so
that a first token between two that are nearly as good may differ. Its margin, the distance of their logits, is told.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from typing import Any, Final

from scheduler.contract.messages import SamplingParams
from worker.backends.protocol import KV_BLOCK_TOKENS
from worker.benchmarks.engine_model import EngineDriver, add_options, describe_machine, make_request, open_model
from worker.benchmarks.measurements import summarize
from worker.engine.types import EngineRequest
from worker.loaded_model import LoadedModel

MARGIN_CANDIDATES: Final = 20


def draw_prompts(options: argparse.Namespace, vocab_size: int) -> list[tuple[int, ...]]:
    """Prompts of ``--requests`` requests: token ids at random, which a model computes like any other."""
    draw = random.Random(options.seed)

    def make_tokens(num_tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocab_size) for _ in range(num_tokens))

    prefixes = [make_tokens(options.prefix_tokens) for _ in range(options.prefixes)]
    frequencies = [1 / (rank + 1) ** options.zipf for rank in range(options.prefixes)]
    chosen = draw.choices(prefixes, frequencies, k=options.requests)
    return [prefix + make_tokens(options.question_tokens) for prefix in chosen]


def measure(model: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Both engines over the same prompts; figures of each, and their ratio."""
    engines = {
        name: EngineDriver(
            model,
            options.backend,
            options.threads,
            kv_budget_bytes=options.kv_budget_mib << 20,
            prefix_caching=name == "with",
        )
        for name in ("without", "with")
    }
    prompts = draw_prompts(options, model.plan.vocab_size)
    ttft_ns: dict[str, list[int]] = {name: [] for name in engines}
    margins: list[float] = []  # of the first tokens that differ
    for number, prompt in enumerate(prompts):
        answers = []
        for name, driver in engines.items():
            timeline = driver.submit(make_request(f"r{number}", prompt, options.max_tokens))
            driver.run_until_done()
            driver.timelines.clear()
            ttft_ns[name].append(timeline.first_token_ns)
            answers.append(timeline.token_ids[0])
        if answers[0] != answers[1]:
            margins.append(_measure_margin(engines["without"], prompt, *answers))
    kept = engines["with"].engine.statistics()
    for driver in engines.values():
        driver.close()
    summaries = {name: summarize(values) for name, values in ttft_ns.items()}
    return {
        "num_requests": len(prompts),
        "num_prefixes": options.prefixes,
        "zipf_exponent": options.zipf,
        "prompt_tokens": len(prompts[0]),
        "hit_rate": round(kept.num_cached_tokens / kept.num_prompt_tokens, 4),
        "hit_rate_of_an_endless_cache": round(_count_repeated(prompts, options.prefix_tokens), 4),
        "kv_total_bytes": kept.kv_total_bytes,
        "kv_cached_bytes": kept.kv_cached_bytes,
        "ttft_p50_ms": {name: round(found.p50_us / 1e3, 2) for name, found in summaries.items()},
        "ttft_p99_ms": {name: round(found.p99_us / 1e3, 2) for name, found in summaries.items()},
        "ttft_mean_ms": {name: round(sum(values) / len(values) / 1e6, 2) for name, values in ttft_ns.items()},
        "ttft_mean_ratio": round(sum(ttft_ns["with"]) / sum(ttft_ns["without"]), 3),
        "num_equal_first_tokens": len(prompts) - len(margins),
        "largest_margin_of_differing": round(max(margins, default=0.0), 4),
    }


def _measure_margin(uncached: EngineDriver, prompt: tuple[int, ...], token: int, other: int) -> float:
    """How far apart two first tokens are in log-probability, where the whole prompt is computed at once."""
    sampling = SamplingParams(seed=1, max_tokens=1, temperature=0.0, num_top_logprobs=MARGIN_CANDIDATES)
    timeline = uncached.submit(EngineRequest("margin", prompt, sampling))
    uncached.run_until_done()
    uncached.timelines.clear()
    found = timeline.top_logprobs[0]
    return abs(found[token] - found.get(other, -math.inf))


def _count_repeated(prompts: list[tuple[int, ...]], prefix_tokens: int) -> float:
    """Share of prompt tokens in whole blocks of beginnings that came before."""
    seen: set[tuple[int, ...]] = set()
    num_repeated = 0
    for prompt in prompts:
        prefix = prompt[:prefix_tokens]
        if prefix in seen:
            num_repeated += prefix_tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
        seen.add(prefix)
    return num_repeated / sum(map(len, prompts))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.prefix_cache", description=__doc__)
    add_options(parser)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--prefixes", type=int, default=100)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the prefixes' frequencies (%(default)s)")
    parser.add_argument("--prefix-tokens", type=int, default=128)
    parser.add_argument("--question-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=1)
    parser.add_argument("--kv-budget-mib", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    with open_model(options.source, options.weights) as model:
        results = {"machine": describe_machine(), "weights": options.weights, **measure(model, options)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
