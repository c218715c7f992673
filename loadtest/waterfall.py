"""A trace (``glowplug trace ID --json``) as an SVG waterfall for the README; light and dark by the reader's setting."""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

WIDTH, ROW, TOP, LABEL, RIGHT = 760, 24, 64, 96, 84
STYLE = """
text{font:13px sans-serif;fill:#1d2433}.soft{fill:#69728a}.title{font-weight:600;font-size:15px}
.bar{fill:#e8590c}.late{fill:#1c7ed6}.rule{stroke:#dfe3ec}.page{fill:#fff}
@media (prefers-color-scheme:dark){
text{fill:#e6e9f2}.soft{fill:#98a1b8}.bar{fill:#ff8f4c}.late{fill:#5db0ff}.rule{stroke:#333b4d}.page{fill:#11151f}}
"""  # plain colours, no CSS variables: not every renderer knows them
AFTER_READY = ("claim", "tokenise", "prefill", "first_token", "publish", "first_byte")


def draw_svg(trace: dict[str, Any]) -> str:
    """The SVG text. Orange: until the worker is ready; blue: the request's own work."""
    marks = trace["marks"]
    origin_ns = marks["accepted"]
    phases = [phase for phase in trace["phases"] if phase["start"] in marks and phase["end"] in marks]
    total_ms = max((marks[phase["end"]] - origin_ns) / 1e6 for phase in phases)
    scale = (WIDTH - LABEL - RIGHT) / total_ms
    height = TOP + ROW * len(phases) + 30
    title = f"Cold start from {trace['cold_tier']}" if trace["cold_tier"] else "Hot request"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}: {total_ms:.0f} ms to the first byte"><style>{STYLE}</style>',
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="title" x="16" y="26">{escape(title)}: {total_ms:.0f} ms from request to first byte</text>',
        f'<text class="soft" x="16" y="46">{escape(trace["model"])}, verification on, through HTTP</text>',
    ]
    step_ms = _step_ms(total_ms)
    for tick in range(int(total_ms / step_ms) + 1):
        x = LABEL + tick * step_ms * scale
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 24}"/>')
        parts.append(f'<text class="soft" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick * step_ms:g}</text>')
    for row, phase in enumerate(phases):
        parts += _bar(phase, row, marks, origin_ns, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(phase: dict[str, Any], row: int, marks: dict[str, int], origin_ns: int, scale: float) -> list[str]:
    start_ms = max(0, marks[phase["start"]] - origin_ns) / 1e6
    took_ms = max(0.0, (marks[phase["end"]] - origin_ns) / 1e6 - start_ms)
    x, y, width = LABEL + start_ms * scale, TOP + row * ROW, max(1.5, took_ms * scale)
    kind = "late" if phase["name"] in AFTER_READY else "bar"
    return [
        f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(phase["name"])}</text>',
        f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="16" rx="3"/>',
        f'<text class="soft" x="{x + width + 6:.1f}" y="{y + 13}">{took_ms:.1f} ms</text>',
    ]


def _step_ms(total_ms: float) -> float:
    return next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if total_ms / step <= 10), 5000)


def run_waterfall(arguments: list[str]) -> int:
    """``python -m loadtest waterfall TRACE.json OUT.svg``."""
    if len(arguments) != 2:
        print("usage: python -m loadtest waterfall TRACE.json OUT.svg", file=sys.stderr)
        return 2
    Path(arguments[1]).write_text(draw_svg(json.loads(Path(arguments[0]).read_text())))
    return 0
