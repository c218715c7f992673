"""A short chaos run: the tool's own verdict on a real cluster under a seeded schedule of faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loadtest.chaos import run_chaos
from tests.model_fixtures import SMOLLM2, BuiltState


@pytest.mark.timeout(300)
def test_a_short_seed_loses_repeats_and_changes_nothing(
    smollm2_built: BuiltState, short_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds of kills and stops: each accepted request ends once, with the text that the model gives alone."""
    state_dir, result = short_tmp_path / "s", short_tmp_path / "verdict.json"
    shutil.copytree(smollm2_built.state_dir, state_dir)
    pace = ["--minutes", "0.3", "--fault-every-s", "2.5", "--seed", "7"]
    load = ["--clients", "4", "--prompts", "10", "--model", SMOLLM2]
    status = run_chaos([*pace, *load, "--state-dir", str(state_dir), "--json", str(result)])
    verdict = json.loads(result.read_text())
    assert status == 0, capsys.readouterr().out
    assert verdict["accepted"] >= 10
    assert sum(verdict["faults"].values()) >= 4
    assert verdict["outcomes"].get("completed", 0) >= 8
