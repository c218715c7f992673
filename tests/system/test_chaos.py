"""A short chaos run: the tool's own verdict on a real cluster under a seeded schedule of faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.chaos import run_chaos
from tests.fleet_fixtures import copy_linked
from tests.model_fixtures import SMOLLM2, BuiltState


@pytest.mark.timeout(300)
def test_a_short_seed_loses_repeats_and_changes_nothing(
    smollm2_built: BuiltState, short_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds of kills and stops: each accepted request ends once, with the text that the model gives alone."""
    state_dir, result = copy_linked(smollm2_built.state_dir, short_tmp_path / "s"), short_tmp_path / "verdict.json"
    pace = ["--minutes", "0.2", "--fault-every-s", "1.6", "--seed", "7"]
    load = ["--clients", "3", "--prompts", "6", "--model", SMOLLM2]
    status = run_chaos([*pace, *load, "--state-dir", str(state_dir), "--json", str(result)])
    verdict = json.loads(result.read_text())
    assert status == 0, capsys.readouterr().out
    assert verdict["accepted"] >= 5
    assert sum(verdict["faults"].values()) >= 4
    assert verdict["outcomes"].get("completed", 0) >= 4
