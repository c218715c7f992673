"""``python -m worker.benchmarks.attention_cost``: what a token costs at the end of ever longer sequences.

A prompt of the greatest length is prefilled alone, in the engine's portions, and timed at each length on the way; at
each length some tokens are decoded as well. With ``--svg`` the figures are drawn, as ``docs/attention-cost.svg`` is.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from html import escape
from pathlib import Path
from typing import Any, Final

from worker.backends.choice import make_backend
from worker.backends.protocol import KV_BLOCK_TOKENS, BoundModel, SequenceInput
from worker.benchmarks.engine_model import add_options, describe_machine, open_model
from worker.engine.batch import PREFILL_TOKENS_PER_STEP
from worker.engine.kv_cache import count_blocks
from worker.loaded_model import LoadedModel

LENGTHS: Final = (128, 256, 512, 1024, 2048, 4096, 8192)
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 330, 56, 76, 44
STYLE: Final = """
text{font:13px sans-serif;fill:#1d2433}.soft{fill:#69728a}.title{font-weight:600;font-size:15px}
.decode{stroke:#e8590c;fill:none}.prefill{stroke:#1c7ed6;fill:none}.rule{stroke:#dfe3ec}.page{fill:#fff}
.dot-decode{fill:#e8590c}.dot-prefill{fill:#1c7ed6}
@media (prefers-color-scheme:dark){
text{fill:#e6e9f2}.soft{fill:#98a1b8}.decode{stroke:#ff8f4c}.prefill{stroke:#5db0ff}.rule{stroke:#333b4d}
.page{fill:#11151f}.dot-decode{fill:#ff8f4c}.dot-prefill{fill:#5db0ff}}
"""  # plain colours, no CSS variables: not every renderer knows them


def measure(model: LoadedModel, options: argparse.Namespace) -> list[dict[str, float]]:
    """For each length: milliseconds of a decode there, and of a prompt token in the portion that ends there."""
    lengths = [length for length in options.lengths if length <= model.plan.context_length]
    backend = make_backend(options.backend, options.threads)
    backend.warm()
    bound = backend.bind(model.plan)
    table = tuple(range(count_blocks(max(lengths))))
    bound.open_kv(len(table))
    draw = random.Random(1)
    prompt = [draw.randrange(3, model.plan.vocab_size) for _ in range(max(lengths))]
    rows: list[dict[str, float]] = []
    start, spent_ns = 0, 0
    try:
        for length in lengths:
            # All but the tokens that are decoded: the last decode is at the length itself.
            first_decoded = length - min(options.decodes, length // 2)
            while start < first_decoded:
                end = min(start + PREFILL_TOKENS_PER_STEP, first_decoded)
                took_ns = _run_step(bound, table, start, prompt[start:end])
                spent_ns += took_ns
                portion_ms = took_ns / 1e6 / (end - start)
                start = end
            decodes_ns = [_run_step(bound, table, at, prompt[at : at + 1]) for at in range(start, length)]
            rows.append(
                {
                    "num_tokens": length,
                    "decode_ms": round(statistics.median(decodes_ns) / 1e6, 3),
                    "prefill_ms_per_token": round(portion_ms, 4),
                    "prompt_so_far_ms": round(spent_ns / 1e6, 1),
                    "kv_bytes": count_blocks(length) * bound.kv_block_bytes,
                }
            )
            start = length
    finally:
        bound.close()
    return rows


def _run_step(bound: BoundModel, table: tuple[int, ...], start: int, token_ids: list[int]) -> int:
    """Nanoseconds of one step."""
    begin_ns = time.perf_counter_ns()
    bound.step((SequenceInput(table, start, tuple(token_ids)),))
    return time.perf_counter_ns() - begin_ns


def draw_svg(results: dict[str, Any]) -> str:
    """The figures as SVG text: milliseconds a token against length, both axes logarithmic to the base 2."""
    rows = results["lengths"]
    title = (
        f"Cost of a token against length: {results['model']}, {results['weights']}, {results['machine']['cores']} cores"
    )
    series = {"decode": [row["decode_ms"] for row in rows], "prefill": [row["prefill_ms_per_token"] for row in rows]}
    highest = max(max(values) for values in series.values())
    lowest = min(min(values) for values in series.values())
    floor, ceiling = _power_below(lowest), 2 * _power_below(highest)
    octaves = round(math.log2(ceiling / floor))

    def place(index: int, value: float) -> tuple[float, float]:
        x = LEFT + 24 + index * (WIDTH - LEFT - 72) / max(len(rows) - 1, 1)
        fraction = math.log2(value / floor) / octaves
        return x, HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>',
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        f'<text class="title" x="16" y="26">{escape(title)}</text>',
        '<text class="soft" x="16" y="48">milliseconds a token; orange: decode of one sequence, '
        f"blue: prefill in portions of {PREFILL_TOKENS_PER_STEP}</text>",
    ]
    for octave in range(octaves + 1):
        value = floor * 2**octave
        _, y = place(0, value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for index, row in enumerate(rows):
        x, _ = place(index, lowest)
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{row["num_tokens"]}</text>'
        )
    for name, values in series.items():
        points = [place(index, value) for index, value in enumerate(values)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{name}" stroke-width="2" points="{line}"/>')
        for (x, y), value in zip(points, values, strict=True):
            parts.append(f'<circle class="dot-{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
            parts.append(f'<text class="soft" x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{value:.3g}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _power_below(value: float) -> float:
    """The greatest power of two that is at most ``value``."""
    return 2.0 ** math.floor(math.log2(value))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.attention_cost", description=__doc__)
    add_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="in tokens, ascending")
    parser.add_argument("--decodes", type=int, default=16, help="tokens decoded at each length")
    parser.add_argument("--svg", type=Path, help="draw the figures here")
    options = parser.parse_args(arguments)
    with open_model(options.source, options.weights) as model:
        results: dict[str, Any] = {
            "machine": describe_machine(),
            "model": Path(options.source).name.partition(".")[0],
            "weights": options.weights,
            "block_tokens": KV_BLOCK_TOKENS,
            "lengths": measure(model, options),
        }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.svg:
        options.svg.write_text(draw_svg(results))
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
