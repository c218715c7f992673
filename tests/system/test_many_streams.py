"""The many-streams tool at a small size: real gateway, real queue, the stub in the workers' place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.streams import run_streams


def test_streams_come_in_order_and_those_who_leave_are_cancelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """80 streams, a tenth of which hangs up: nothing out of order, nothing refused, each leaver's request cancelled."""
    result = tmp_path / "figures.json"
    words = ["--streams", "80", "--rate", "10", "--seconds", "3", "--leave", "0.1", "--slow", "0.05"]
    assert run_streams([*words, "--json", str(result)]) == 0, capsys.readouterr().out
    figures = json.loads(result.read_text())
    assert (figures["opened"], figures["left"], figures["slow"]) == (80, 8, 4)
    assert figures["out_of_order"] == figures["failed"] == figures["cut"] == 0
    assert figures["open_at_end"] == 72
    assert figures["stub"]["cancelled"] >= 8
    assert figures["tokens_per_s"] > 0
