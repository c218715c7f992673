"""Parts that are started beside a queue server that is not there, or with settings that name none."""

from __future__ import annotations

import os
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
    told = state_dir / "told"
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
