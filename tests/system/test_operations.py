"""Operators' verbs on a real server with a tiny real model: wake, prefetch, unload, pin, park, drain, reload."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.processes import Server, glowplug_command
from loadtest.streaming_client import chat_body, get_json, post_stream
from scheduler.contract.log_file import LOG_NAME
from tests.eventually import eventually_sync
from tests.worker_fixtures import MODEL, copy_state_dir

CHAT = "/v1/chat/completions"
CONFIG = "defaults: {idle_timeout_s: %s, kv_budget_bytes: 67108864}\n"


def verb(state_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``glowplug`` on the state folder."""
    env = {**os.environ, "GLOWPLUG_STATE_DIR": str(state_dir)}
    return subprocess.run([*glowplug_command(), *words], env=env, capture_output=True, text=True, timeout=60)


def row_of(server: Server) -> dict[str, Any]:
    """The model's row in the status report."""
    return dict(eventually_sync(lambda: server.model_status(MODEL), what="the model in the status report"))


def audited_acts(state_dir: Path) -> list[tuple[str, int]]:
    """Orders and their answers in the audit log, which is written behind the answers."""
    lines = [json.loads(line) for line in (state_dir / "log" / "audit.jsonl").read_text().splitlines()]
    return [(line["path"].rpartition(":")[2], line["status"]) for line in lines if line["event"] == "admin_request"]


@pytest.fixture
def state_dir(short_tmp_path: Path) -> Path:
    target = copy_state_dir(short_tmp_path / "state")
    (target / "glowplug.yaml").write_text(CONFIG % "600")
    return target


@pytest.fixture
def server(state_dir: Path) -> Iterator[Server]:
    with Server(state_dir) as running:
        running.wait_ready()
        running.wait_listed(MODEL)
        yield running
        assert running.stop() == 0


def test_prefetch_wake_unload_and_park(server: Server, state_dir: Path) -> None:
    """prefetch: T2 without a process; wake: a worker without a request; unload: back to T1; park says why not."""
    done = verb(state_dir, "prefetch", MODEL, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["tier"], row["workers"], row["sealed_bytes"] > 0) == ("T2", 0, True)
    assert server.worker_pids() == []
    done = verb(state_dir, "wake", MODEL)
    assert (done.returncode, "T4, ready" in done.stdout) == (0, True), done.stderr
    assert len(server.worker_pids()) == 1
    assert row_of(server)["in_flight"] == 0
    parked = verb(state_dir, "park", MODEL)
    assert parked.returncode == 1
    assert "backend numkong has no parked state" in parked.stderr
    done = verb(state_dir, "unload", MODEL, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["tier"], row["workers"], row["sealed_bytes"]) == ("T1", 0, 0)
    answer = post_stream(server.url, chat_body(MODEL, max_tokens=2))
    assert not answer.error
    assert get_json(server.url, f"/admin/traces/{answer.request_id}")["cold_tier"] == "T1"
    expected = [("prefetch", 202), ("wake", 202), ("park", 409), ("unload", 202)]
    eventually_sync(lambda: audited_acts(state_dir) == expected, what=f"lines of {expected}")
    unknown = verb(state_dir, "wake", "nobody")
    assert (unknown.returncode, "glowplug ps" in unknown.stderr) == (1, True)


def test_a_pinned_model_never_sleeps_and_stays_pinned_when_the_server_is_started_again(
    server: Server, state_dir: Path
) -> None:
    """pin wakes; with an idle timeout of nothing the worker stays; after a restart there is a worker; unpin lets go."""
    assert verb(state_dir, "pin", MODEL).returncode == 0
    eventually_sync(lambda: row_of(server)["tier"] == "T4", what="a worker of a pinned model")
    (state_dir / "glowplug.yaml").write_text(CONFIG % "0.1")
    assert verb(state_dir, "config", "reload").returncode == 0
    eventually_sync(lambda: row_of(server)["idle_timeout_s"] == 0.1, what="the new idle timeout")
    row = row_of(server)
    assert (row["pinned"], row["workers"], row["idle_for_s"]) == (True, 1, None)
    refused = verb(state_dir, "unload", MODEL)
    assert (refused.returncode, "unpin it first" in refused.stderr) == (1, True)
    assert server.stop() == 0
    with Server(state_dir) as again:
        again.wait_ready()
        eventually_sync(lambda: row_of(again)["tier"] == "T4", what="a worker, without any request")
        assert verb(state_dir, "unpin", MODEL).returncode == 0
        eventually_sync(lambda: row_of(again)["workers"] == 0, what="sleep")
        assert again.stop() == 0


def test_a_drained_node_takes_no_worker_and_works_again_when_undrained(server: Server, state_dir: Path) -> None:
    """drain: the worker ends and none comes; undrain: the order that waited is carried out."""
    assert verb(state_dir, "wake", MODEL).returncode == 0
    node = get_json(server.url, "/admin/status")["nodes"][0]["node_id"]
    done = verb(state_dir, "drain", node)
    assert done.returncode == 0, done.stderr
    eventually_sync(lambda: server.worker_pids() == [], what="the worker's end")
    eventually_sync(lambda: get_json(server.url, "/admin/status")["drained_nodes"] == [node], what="the drained node")
    assert verb(state_dir, "wake", MODEL, "--wait-s", "0").returncode == 0
    assert server.worker_pids() == []
    assert verb(state_dir, "undrain", node).returncode == 0
    eventually_sync(lambda: row_of(server)["tier"] == "T4", what="the worker that was asked for")
    assert verb(state_dir, "drain", "nowhere").returncode == 1


def test_a_reload_keeps_streams_and_a_wrong_file_changes_nothing(server: Server, state_dir: Path) -> None:
    """A stream runs through a reload; an error names the line and leaves the policies; SIGHUP reloads as well."""
    body = json.dumps(chat_body(MODEL, max_tokens=64, ignore_eos=True)).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(server.url + CHAT, body, headers), timeout=60) as stream:
        lines = [next(stream)]
        reload_wrong_and_right(state_dir)
        lines += list(stream)
    assert lines[-2:] == [b"data: [DONE]\n", b"\n"]
    assert not any(b'"error"' in line for line in lines)
    eventually_sync(lambda: row_of(server)["idle_timeout_s"] == 77, what="the new idle timeout")
    (state_dir / "glowplug.yaml").write_text(CONFIG % "78")
    os.kill(server.process.pid, signal.SIGHUP)
    eventually_sync(lambda: row_of(server)["idle_timeout_s"] == 78, what="the newer idle timeout")
    (state_dir / "glowplug.yaml").write_text("nonsense: 1\n")
    os.kill(server.process.pid, signal.SIGHUP)
    log = state_dir / "log" / LOG_NAME
    eventually_sync(lambda: log.read_text().count("config_not_reloaded") >= 2, what="both refusals in the log")
    assert row_of(server)["idle_timeout_s"] == 78


def reload_wrong_and_right(state_dir: Path) -> None:
    """First a file that is wrong, then one that is right."""
    (state_dir / "glowplug.yaml").write_text("defaults:\n  idle_timeout: 3\n")
    refused = verb(state_dir, "config", "reload")
    assert refused.returncode == 1
    assert "glowplug.yaml:2: defaults.idle_timeout: unknown field (did you mean idle_timeout_s?)" in refused.stderr
    (state_dir / "glowplug.yaml").write_text(CONFIG % "77")
    assert verb(state_dir, "config", "reload").returncode == 0
