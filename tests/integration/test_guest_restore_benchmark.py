"""The restore benchmark runs, checks its answers and reports every phase."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worker.benchmarks.guest_restore import FIRST_PHASES, PHASES, main
from worker.benchmarks.measurements import summarize


def test_percentiles_are_nearest_rank() -> None:
    """One to a hundred microseconds: the ranks are the numbers themselves, and all samples are in the histogram."""
    summary = summarize([number * 1000 for number in range(100, 0, -1)])
    assert (summary.min_us, summary.p50_us, summary.p95_us, summary.p99_us, summary.max_us) == (1, 50, 95, 99, 100)
    assert sum(summary.histogram.values()) == summary.num_samples == 100
    assert summary.histogram["<= 64 us"] == 32
    with pytest.raises(ValueError, match="nothing was measured"):
        summarize([])


def test_the_benchmark_measures_each_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small size and few samples: the table is printed, the JSON has every phase and the calls."""
    target = tmp_path / "figures.json"
    assert main(["--size", "1", "--samples", "5", "--first", "2", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())
    (row,) = figures["sizes"]
    assert set(row["restore"]) == {*PHASES, "total"}
    assert row["restore"]["total"]["num_samples"] == 5
    assert set(row["first_verification"]) == {*FIRST_PHASES, *PHASES, "total"}
    assert {figures["num_samples"] for figures in row["first_verification"].values()} == {2}
    assert set(figures["calls"]) == {"guest_call", "host_call_3", "host_call_5"}
    assert "| 1 MiB | 5 / 9 / 14 ms |" in capsys.readouterr().out
