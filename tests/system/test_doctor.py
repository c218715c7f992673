"""`glowplug doctor` on a healthy set-up and on broken ones: what is wrong, what to do, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loadtest.processes import Server, glowplug_command
from tests.worker_fixtures import copy_state_dir


def run_doctor(state_dir: Path, **env: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and the worst finding of each check."""
    environment = {
        **{k: v for k, v in os.environ.items() if k != "REDIS_URL"},
        "GLOWPLUG_STATE_DIR": str(state_dir),
        **env,
    }
    command = [*glowplug_command(), "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    order = {"ok": 0, "warn": 1, "fail": 2}
    findings: dict[str, dict[str, Any]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        known = findings.get(finding["check"])
        if known is None or order[finding["level"]] > order[known["level"]]:
            findings[finding["check"]] = finding
    for finding in findings.values():
        assert (finding["level"] == "ok") or finding["remedy"], finding
    return done.returncode, findings


@pytest.fixture
def state_dir(short_tmp_path: Path) -> Path:
    return copy_state_dir(short_tmp_path / "state")


def test_a_healthy_set_up_has_no_failure(state_dir: Path) -> None:
    """With a server running: every check is there, none fails, exit code 0; the text output says the same."""
    with Server(state_dir) as server:
        server.wait_ready()
        code, findings = run_doctor(state_dir)
        text = subprocess.run(
            [*glowplug_command(), "doctor", "--state-dir", str(state_dir)], capture_output=True, text=True, timeout=60
        )
        assert server.stop() == 0
    assert (code, [f for f in findings.values() if f["level"] == "fail"]) == (0, [])
    expected = {"kernel", "memfd sealing", "MADV_POPULATE", "open files", "memory", "NumKong", "clock", "GPU", "disk"}
    expected |= {"configuration", "signing keys", "API keys", "snapshots", "Redis", "Redis persistence", "server"}
    assert expected <= set(findings)
    assert findings["server"]["seen"].endswith("is ready")
    assert text.returncode == 0
    assert "memfd sealing" in text.stdout


def test_a_key_that_others_can_read_fails(state_dir: Path) -> None:
    """First broken set-up: the mode of the key file."""
    (state_dir / "keys" / "snapshot.keys").chmod(0o644)
    code, findings = run_doctor(state_dir)
    assert (code, findings["signing keys"]["level"]) == (1, "fail")
    assert "chmod 600" in findings["signing keys"]["remedy"]


def test_a_redis_that_does_not_answer_fails(state_dir: Path) -> None:
    """Second: REDIS_URL leads nowhere."""
    code, findings = run_doctor(state_dir, REDIS_URL=f"unix://{state_dir}/nowhere.sock")
    assert (code, findings["Redis"]["level"]) == (1, "fail")
    assert "REDIS_URL" in findings["Redis"]["remedy"]


def test_a_damaged_snapshot_a_wrong_file_and_a_server_that_died_fail(state_dir: Path) -> None:
    """Third: a manifest with a flipped bit, a misspelt setting with its line, a server that was killed."""
    manifest = next((state_dir / "store" / "manifests").iterdir())
    data = bytearray(manifest.read_bytes())
    data[len(data) // 2] ^= 1
    manifest.write_bytes(data)
    (state_dir / "glowplug.yaml").write_text("gateway:\n  prot: 1\n")
    (state_dir / "run").mkdir(exist_ok=True)
    (state_dir / "run" / "serve.json").write_text('{"host": "127.0.0.1", "port": 1}')
    code, findings = run_doctor(state_dir)
    assert code == 1
    assert {name for name, f in findings.items() if f["level"] == "fail"} == {"snapshots", "configuration", "server"}
    assert "glowplug.yaml:2: gateway.prot: unknown field (did you mean port?)" in findings["configuration"]["seen"]


def test_a_wrong_policy_is_named_with_its_line(state_dir: Path) -> None:
    """What only the scheduler reads is checked too, before it refuses to start."""
    (state_dir / "glowplug.yaml").write_text("defaults:\n  idle_timeout_s: soon\n")
    code, findings = run_doctor(state_dir)
    assert (code, findings["configuration"]["level"]) == (1, "fail")
    assert "glowplug.yaml:2: defaults.idle_timeout_s" in findings["configuration"]["seen"]


def test_nothing_there_yet_says_what_comes_first(tmp_path: Path) -> None:
    """A fresh machine: no key is the failure, and the remedy is the command."""
    code, findings = run_doctor(tmp_path / "fresh")
    assert (code, findings["signing keys"]["level"]) == (1, "fail")
    assert "glowplug keys new" in findings["signing keys"]["remedy"]
    assert not (tmp_path / "fresh").exists()
