"""The tools that measure the engine: rates of streams, pairs with a peer, and the time outside the kernels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from engine_fixtures import EOS, FakeText
from llama_programs import TINY, random_plan

from loadtest.engine_compare import (
    EngineComparison,
    add_bandwidth,
    make_contests,
    parse_options,
    rate_while_all_run,
    run_pairs,
)
from loadtest.read_bandwidth import measure_read_bandwidth
from loadtest.results import Report
from loadtest.streaming_client import StreamedAnswer
from worker.backends import cpu_operations
from worker.benchmarks.decode_step import measure_steps, show
from worker.engine.prefixes import PrefixIndex
from worker.loaded_model import LoadedModel


def _stream(begin_ms: float, interval_ms: float, num_events: int, tokens_an_event: int = 1) -> StreamedAnswer:
    times = [begin_ms + interval_ms * i for i in range(num_events)]
    return StreamedAnswer(200, content_at_ms=times, completion_tokens=num_events * tokens_an_event)


def test_batch_rate_counts_only_while_all_streams_run() -> None:
    """Two streams of 100 tokens a second that overlap for half their time: 200 tokens a second."""
    answers = [_stream(0, 10, 100), _stream(500, 10, 100)]
    assert rate_while_all_run(answers) == pytest.approx(200, rel=0.03)


def test_batch_rate_counts_tokens_not_events() -> None:
    """A server that sends two tokens an event at half the pace has the same rate."""
    assert rate_while_all_run([_stream(0, 20, 100, tokens_an_event=2)]) == pytest.approx(100, rel=0.02)


def test_streams_that_never_overlap_are_no_batch() -> None:
    """One after the other: refused rather than reported as something."""
    with pytest.raises(RuntimeError, match="same time"):
        rate_while_all_run([_stream(0, 1, 10), _stream(100, 1, 10)])


def test_pairs_alternate_who_goes_first() -> None:
    """Four pairs: ours, theirs, theirs, ours, and each pair lists ours first."""
    order: list[str] = []

    def measure(name: str, value: float) -> float:
        order.append(name)
        return value

    pairs = run_pairs(lambda: measure("ours", 1.0), lambda: measure("theirs", 2.0), 3)
    assert pairs == [[1.0, 2.0]] * 3
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_peer_is_left_out_where_it_is_not_given() -> None:
    """Without a peer the contests are ours alone, and pairs have one figure."""
    contests = make_contests(parse_options([]))
    assert [contest.label for contest in contests] == ["bf16", "int8"]
    with EngineComparison(Report(), None, 1)._peer_side(contests[0], slots=1) as side:
        assert side is None
    assert run_pairs(lambda: 3.0, None, 2) == [[3.0], [3.0]]


def test_ratios_of_each_pair_and_bandwidth_are_written(tmp_path: Path) -> None:
    """The JSON holds every pair's ratio, and the share of the machine's bandwidth."""
    report = Report()
    report.add_ratio("decode", [10.0, 30.0], [10.0, 20.0], "peer")
    add_bandwidth(report, "bf16", 250_000_000, 60.0, 30.0)
    report.write(tmp_path / "figures.json")
    ratio, bandwidth = json.loads((tmp_path / "figures.json").read_text())
    assert ratio["ratios"] == [1.0, 1.5]
    assert bandwidth["share"] == 0.5


def test_read_bandwidth_is_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure above zero from a small buffer."""
    monkeypatch.setattr("loadtest.read_bandwidth.BUFFER_BYTES", 1 << 20)
    assert measure_read_bandwidth(2) > 0


def test_decode_step_benchmark_sees_the_kernels_and_restores_numpy() -> None:
    """On a tiny model: kernels were called in each step, and the backend's modules are as before afterwards."""
    loaded = LoadedModel("tiny", "snapshot", random_plan(TINY), FakeText(), (EOS,), PrefixIndex())
    figures = measure_steps(loaded, 2, 32, num_threads=1)
    assert figures.kernel_calls > 40  # two layers, four products each, and what lies between
    assert figures.step_ms <= figures.round_ms
    assert cpu_operations.np is np  # type: ignore[attr-defined]  # the module's own import
    assert "batch 2" in show(figures)
