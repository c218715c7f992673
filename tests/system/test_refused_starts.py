"""Parts that are started beside a queue server that is not there, or with settings that name none."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.eventually import eventually_sync

ROOT = Path(__file__).parents[2]


@contextmanager
def started(state_dir: Path, *command: str, **env: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process of ours and the file with what it says; killed at the end if it still runs."""
    told = state_dir / f"told-{secrets.token_hex(4)}"
    variables = {**os.environ, "GLOWPLUG_STATE_DIR": str(state_dir), "GLOWPLUG_DEV": "1", "GLOWPLUG_PORT": "0", **env}
    with told.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=variables, stdout=file, stderr=file)
    try:
        yield process, told
    finally:
        process.kill()
        process.wait()


def test_an_agent_that_never_reached_its_queue_server_stops_when_it_is_told(short_tmp_path: Path) -> None:
    """SIGTERM while it still tries to register: it ends by itself, with 0."""
    url = f"unix://{short_tmp_path}/nobody.sock"
    with started(short_tmp_path, "worker", "agent", REDIS_URL=url, GLOWPLUG_DRAIN_GRACE_S="0.2") as (agent, told):
        eventually_sync(lambda: b"zygote_ready" in told.read_bytes(), what="the agent to run")
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(timeout=30) == 0
        assert b"agent_stopped" in told.read_bytes()


def test_a_second_agent_of_the_same_name_is_refused(short_tmp_path: Path) -> None:
    """Both would read the same orders, and start each worker twice. Another name may run beside it."""
    url = {"REDIS_URL": f"unix://{short_tmp_path}/nobody.sock", "GLOWPLUG_NODE_ID": "node/1"}
    with started(short_tmp_path, "worker", "agent", **url) as (_, told):
        eventually_sync(lambda: b"zygote_ready" in told.read_bytes(), what="the agent to run")
        with started(short_tmp_path, "worker", "agent", **url) as (second, told):
            assert second.wait(timeout=30) == 78
            assert 'a node agent runs as node "node/1"' in told.read_text()
        with started(short_tmp_path, "worker", "agent", **{**url, "GLOWPLUG_NODE_ID": "node-2"}) as (_, told):
            eventually_sync(lambda: b"zygote_ready" in told.read_bytes(), what="the agent of another name to run")


@pytest.mark.parametrize("command", [("scheduler", "gateway"), ("scheduler", "scheduler"), ("worker", "agent")])
def test_a_queue_server_that_cannot_be_named_so_is_a_refused_setting(
    short_tmp_path: Path, command: tuple[str, str]
) -> None:
    """Status 78 with one line that names the variable and keeps the password, and no traceback: no restart helps."""
    with started(short_tmp_path, *command, REDIS_URL="redis://:secret@127.0.0.1:99999") as (part, told):
        assert part.wait(timeout=30) == 78
        line = told.read_text().splitlines()[-1]
        assert line.startswith(f"glowplug {command[1]}: REDIS_URL begins with redis:// and cannot be used"), line
        assert "Traceback" not in told.read_text()
        assert "secret" not in told.read_text()
