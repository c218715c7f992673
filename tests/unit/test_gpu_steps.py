"""gpu-check on a device machine: no step ends the others or outlasts its limit, and the record is always whole."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from loadtest import gpu_peers
from loadtest.gpu_check import list_steps, parse_options
from loadtest.gpu_http import Rounds, _read_direct, read_disk_rate
from loadtest.gpu_steps import GpuRun, Outcome, Step, read_documents
from loadtest.gpu_table import format_report


def test_failing_and_hanging_steps_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    """One fails, one hangs, one lacks something, one needs the failed one; the last still runs. All are in the JSON."""
    run = GpuRun(tmp_path / "out.json", "stand-in", 60.0)
    steps = [
        Step("bad", "fails", ("-c", "print('reason'); raise SystemExit(1)"), 10),
        Step("slow", "hangs", ("-c", "import time; time.sleep(60)"), 0.2),
        Step("no", "lacks", ("-c", "raise SystemExit(77)"), 10),
        Step("later", "needs bad", ("-c", "print(1)"), 10, after="bad"),
        Step("good", "works", ("-c", "print('{\"figure\": 1}')"), 10),
    ]
    states = [run.run(step).state for step in steps]
    assert states == ["FAILED", "FAILED", "lacking", "left out", "ok"]
    record = json.loads((tmp_path / "out.json").read_text())
    assert [step["key"] for step in record["steps"]] == [step.key for step in steps]
    assert record["good"] == {"figure": 1}
    assert "reason" in record["steps"][0]["output_tail"]
    assert "not done after" in record["steps"][1]["output_tail"]
    assert record["gpu"] == "stand-in"


def test_rounds_end_at_the_deadline_but_there_is_one() -> None:
    """A tier that begins late has a figure all the same; one in time has all of its rounds."""
    assert list(Rounds(10, time.monotonic() - 1)) == [0]
    assert list(Rounds(3, time.monotonic() + 60)) == [0, 1, 2]


def test_disk_rate_is_of_all_bytes_and_the_bar_of_t1_follows(tmp_path: Path) -> None:
    """A file of odd size is read to its end; the table says bytes over that rate and a second more."""
    path = tmp_path / "blob"
    path.write_bytes(bytes(5 * 4096 + 17))
    assert _read_direct(path, 0) == 5 * 4096 + 17
    assert read_disk_rate(path) > 0
    tier = {"tier": "T1", "median_ms": 1.0, "min_ms": 1.0, "max_ms": 1.0, "num_samples": 1, "tiers_seen": ["T1"]}
    figures = {"phase_medians_ms": {}, "weights_bytes": 4_000_000, "disk_bytes_per_s": 2_000_000}
    assert any("bar: 3000" in line for line in format_report({"http": tier | figures}))


def test_a_step_is_told_by_its_last_line_of_text() -> None:
    """Not by the bracket that ends its JSON."""
    assert Outcome(Step("one", "one", (), 1), "ok", 0.0, "3 models\n{\n}\n").last_line == "3 models"


def test_no_step_begins_after_the_deadline(tmp_path: Path) -> None:
    """What no time is left for is left out, and says so."""
    run = GpuRun(tmp_path / "out.json", "stand-in", 0.0)
    outcome = run.run(Step("one", "one", ("-c", "print(1)"), 10))
    assert (outcome.state, outcome.output) == ("left out", "no time is left")


def test_documents_are_found_between_other_text() -> None:
    """JSON objects of a step, whatever is printed around them."""
    assert read_documents('log {x\n{"a": {"b": 1}}\nmore {"c": 2} {') == [{"a": {"b": 1}}, {"c": 2}]


def test_report_tells_what_is_missing() -> None:
    """A run that was cut off at once still gives a report, part by part."""
    lines = format_report({})
    assert any("no figure" in line for line in lines)
    assert len(lines) >= 5


def test_steps_of_a_run_have_keys_of_their_own(tmp_path: Path) -> None:
    """Keys are where results go; --only picks by them."""
    keys = [step.key for step in list_steps(parse_options([]), tmp_path)]
    assert len(keys) == len(set(keys))
    assert [step.key for step in list_steps(parse_options(["--only", "open,peer"]), tmp_path)] == [
        "open",
        *(f"peer-{name}" for name in ("naive", "fastsafetensors", "runai", "compiled")),
    ]


@pytest.mark.parametrize("peer", sorted(gpu_peers.PEERS))
def test_a_peer_that_is_not_installed_is_left_out(
    peer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what is missing, with the status that the table shows as lacking; nothing of it is imported."""
    monkeypatch.setattr("sys.argv", ["gpu_peers", "/nonexistent", "--peer", peer])
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert gpu_peers.main() == gpu_peers.NOT_IMPORTABLE
    told = json.loads(capsys.readouterr().out)
    assert (told["peer"], told["not_importable"]) == (peer, list(gpu_peers.PEERS[peer][0]))
