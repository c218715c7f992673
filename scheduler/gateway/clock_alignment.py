"""Marks of a worker on another host, moved to this gateway's clock.

Monotonic clocks of two hosts have nothing in common, but causality bounds their distance: the worker claimed the
request after the gateway had accepted it, and the first token was sampled before its frame arrived. The marks are moved
as if that frame had taken no time, so they are late by at most the width of the bounds (what queue and bus took
together); no phase that begins and ends on one host changes. A worker that names no clock is taken to share the
gateway's.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from scheduler.contract.messages import TerminalFrame
from scheduler.contract.telemetry import Mark

#: What a worker surely did before its first frame arrived; it stamps PUBLISHED afterwards.
_BEFORE_FIRST_FRAME: Final = (Mark.CLAIMED, Mark.TOKENISED, Mark.PREFILLED, Mark.SAMPLED)


class AlignedMarks(NamedTuple):
    """Marks on the gateway's clock; ``error_ms`` None: they were on it already."""

    marks: dict[str, int]
    error_ms: float | None


def align_marks(
    terminal: TerminalFrame, gateway_marks: dict[str, int], clock_id: str, ended_mono_ns: int
) -> AlignedMarks:
    """The marks of ``terminal`` on the clock ``clock_id``, on which the gateway's are."""
    marks = terminal.marks
    before = [marks[mark] for mark in _BEFORE_FIRST_FRAME if mark in marks]
    if not terminal.clock_id or terminal.clock_id == clock_id or not before:
        return AlignedMarks(marks, None)
    arrived_mono_ns = gateway_marks.get(Mark.RECEIVED, ended_mono_ns)
    latest_ns = arrived_mono_ns - max(before)
    earliest_ns = gateway_marks.get(Mark.ACCEPTED, arrived_mono_ns) - min(before)
    if latest_ns < earliest_ns:  # the first frame was an earlier run's: only the end is certain
        latest_ns = max(earliest_ns, ended_mono_ns - max(before))
    moved = {name: mono_ns + latest_ns for name, mono_ns in marks.items()}
    return AlignedMarks(moved, (latest_ns - earliest_ns) / 1e6)
