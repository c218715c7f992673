"""Where the greedy text of a run that was killed parts from the undisturbed one, and how clear the choice was there.

A run that goes on after a crash computes the keys and values of the tokens so far in one prefill, where the first run
made them one decode at a time: the same sums in another order. For each prompt the request is run again with its first
1, 2, 3 ... tokens given; of every run that parts, the position and the margin (nats between the two best tokens of the
undisturbed run there) are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, Final

import msgspec

from worker.benchmarks.engine_model import (
    EngineDriver,
    Timeline,
    add_options,
    describe_machine,
    make_request,
    open_model,
)
from worker.engine.types import EngineRequest
from worker.loaded_model import LoadedModel

PROMPTS: Final = (
    "What is the capital of France?",
    "What should I consider before I adopt a dog?",
    "Tell me a short story about a robot who learns to paint.",
    "Why is the sky blue?",
    "Write a short speech about space travel.",
)
TEMPLATE: Final = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def measure_prompt(driver: EngineDriver, name: str, token_ids: tuple[int, ...], num_tokens: int, every: int) -> Any:
    """One undisturbed run and one for each position at which it may have been killed."""

    def run(killed_after: int, emitted: tuple[int, ...]) -> Timeline:
        request = make_request(f"{name}-{killed_after}", token_ids, num_tokens)
        sampling = msgspec.structs.replace(request.sampling, num_top_logprobs=2)
        replay = (emitted,) if emitted else ()
        timeline = driver.submit(EngineRequest(request.request_id, token_ids, sampling, emitted=replay))
        driver.run_until_done()
        return timeline

    whole = run(0, ())
    margins = [_margin(tops) for tops in whole.top_logprobs]
    parted = []
    positions = range(1, num_tokens, every)
    for killed_after in positions:
        rest = run(killed_after, tuple(whole.token_ids[:killed_after])).token_ids
        pairs = zip(whole.token_ids[killed_after:], rest, strict=True)
        at = next((killed_after + i for i, (before, after) in enumerate(pairs) if before != after), None)
        if at is not None:
            parted.append({"killed_after": killed_after, "parts_at": at, "margin": round(margins[at], 4)})
    return {
        "runs": len(positions),
        "parted": parted,
        "largest_margin_parted": max((one["margin"] for one in parted), default=None),
        "smallest_margin": round(min(margins), 4),
        "positions_below_0.15": sum(margin < 0.15 for margin in margins),
    }


def _margin(tops: dict[int, float]) -> float:
    best, second = sorted(tops.values(), reverse=True)[:2]
    return best - second


def measure(model: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Every prompt on one engine; prefixes are not cached, or a rerun would find the first run's own keys."""
    driver = EngineDriver(
        model, options.backend, options.threads, kv_budget_bytes=1 << 28, max_running=1, prefix_caching=False
    )
    figures: dict[str, Any] = {}
    for number, prompt in enumerate(PROMPTS[: options.prompts]):
        text = TEMPLATE.format(prompt=prompt)
        token_ids = tuple(model.text.tokenize(text, add_special=False, parse_special=True))
        figures[prompt] = measure_prompt(driver, str(number), token_ids, options.tokens, options.every)
        print(prompt, figures[prompt], flush=True)
    driver.close()
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.replay", description=__doc__)
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: 64)")
    parser.add_argument("--every", type=int, default=1, help="kill after each how many-th token (default: 1)")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts")
    options = parser.parse_args(arguments)
    with open_model(options.source, options.weights) as model:
        figures = {
            "machine": describe_machine(),
            "backend": options.backend,
            "weights": options.weights,
            "prompts": measure(model, options),
        }
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
