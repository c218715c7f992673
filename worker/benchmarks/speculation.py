"""What prompt-lookup drafts gain: the same requests with and without, in turns, on texts that repeat and that do not.

    python -m worker.benchmarks.speculation [--pairs N] [--draft-tokens N] [--json FILE]

Decode only, from the first token to the last, one stream at a time, greedy. The tokens of both are compared: a wider
step may differ in the last bits of its logits, and so in a choice between two that are nearly equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any, Final

from worker.benchmarks.engine_model import EngineDriver, add_options, describe_machine, make_request, open_model
from worker.loaded_model import LoadedModel

ARTICLE: Final = (
    "The lighthouse of Port Ellery was built in 1823 by the engineer Anna Marwood. It stands on a granite cliff above "
    "the harbour, forty metres over the sea. For eighty years its lamp burned whale oil, then paraffin, and since 1931 "
    "it has been electric. The keeper's house beside it is a museum today, open from April to October."
)
CODE: Final = (
    "def read_config(path):\n    with open(path) as file:\n        text = file.read()\n    values = {}\n"
    "    for line in text.splitlines():\n        key, _, value = line.partition('=')\n"
    "        values[key.strip()] = value.strip()\n    return values\n"
)
PROMPTS: Final = {
    "copy": f"Repeat this text word for word:\n\n{ARTICLE}",
    "edit": f"Rewrite this text with every occurrence of 1823 replaced by 1825, and change nothing else:\n\n{ARTICLE}",
    "code": f"Add a docstring to this function and return the whole function:\n\n```python\n{CODE}```",
    "summary": f"Summarise this text in two sentences:\n\n{ARTICLE}",
    "chat": "What should I consider before I adopt a dog?",
    "story": "Tell me a short story about a robot who learns to paint.",
}
TEMPLATE: Final = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def measure(model: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Decode speeds of every prompt, median of the pairs' ratios."""
    drivers = {
        size: EngineDriver(
            model,
            options.backend,
            options.threads,
            kv_budget_bytes=1 << 28,
            max_draft_tokens=size,
            prefix_caching=False,
        )
        for size in (0, options.draft_tokens)
    }
    figures: dict[str, Any] = {}
    for name in options.prompt or PROMPTS:
        prompt = PROMPTS[name]
        text = TEMPLATE.format(prompt=prompt)
        token_ids = tuple(model.text.tokenize(text, add_special=False, parse_special=True))
        speeds: dict[int, list[float]] = {size: [] for size in drivers}
        found: dict[int, list[int]] = {}
        before = drivers[options.draft_tokens].engine.statistics()
        for pair in range(-1, options.pairs):  # the first one binds steps of new sizes, and does not count
            for size, driver in drivers.items():
                timeline = driver.submit(make_request(f"{name}-{pair}", token_ids, options.tokens))
                driver.run_until_done()
                found[size] = timeline.token_ids
                if pair >= 0:
                    gap_s = (timeline.token_ns[-1] - timeline.token_ns[0]) / 1e9
                    speeds[size].append((len(timeline.token_ids) - 1) / gap_s)
        after = drivers[options.draft_tokens].engine.statistics()
        plain, drafted = speeds[0], speeds[options.draft_tokens]
        figures[name] = {
            "plain_tokens_per_s": round(statistics.median(plain), 1),
            "drafted_tokens_per_s": round(statistics.median(drafted), 1),
            "ratio": round(statistics.median(b / a for a, b in zip(plain, drafted, strict=True)), 2),
            "kept_of_drafted": f"{after.num_kept_tokens - before.num_kept_tokens} of "
            f"{after.num_drafted_tokens - before.num_drafted_tokens}",
            "same_tokens": found[0] == found[options.draft_tokens],
        }
        print(name, figures[name], flush=True)
    for driver in drivers.values():
        driver.close()
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.speculation", description=__doc__)
    add_options(parser)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default: 128)")
    parser.add_argument("--draft-tokens", type=int, default=8, help="most tokens guessed ahead (default: 8)")
    parser.add_argument("--prompt", action="append", choices=list(PROMPTS), help="these only (default: all)")
    options = parser.parse_args(arguments)
    with open_model(options.source, options.weights) as model:
        figures = {
            "machine": describe_machine(),
            "weights": options.weights,
            "draft_tokens": options.draft_tokens,
            "pairs": options.pairs,
            "prompts": measure(model, options),
        }
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
