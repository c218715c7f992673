"""Starting and watching the processes under test: our server, the peer, and what they use of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from loadtest.streaming_client import get_json, get_text

T = TypeVar("T")
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STOP_TIMEOUT_S = 60.0
START_LIMIT_S = 60.0  # a loaded machine takes its time
_OF_NO_MODEL = ("gp:zygote", "gp:spare")


def glowplug_command() -> list[str]:
    """The installed ``glowplug`` beside the running interpreter; where none is, the checkout's."""
    installed = Path(sys.executable).parent / "glowplug"
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "scheduler.command"]


def wait_until(probe: Callable[[], T | None], *, within_s: float, what: str, every_s: float = 0.02) -> T:
    """Poll ``probe`` until it gives something true.

    Raises:
        TimeoutError: not within ``within_s`` seconds; says ``what`` was awaited.
    """
    deadline_s = time.monotonic() + within_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: not within {within_s:g} s")
        time.sleep(every_s)


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A ``glowplug serve`` of our own on a state folder; stopped by SIGTERM."""

    def __init__(self, state_dir: Path, *options: str, log: Path | None = None) -> None:
        self.state_dir = state_dir
        self.started_s = time.perf_counter()
        command = [*glowplug_command(), "serve", "--state-dir", str(state_dir), "--port", "0", *options]
        self._log = log.open("wb") if log else None
        env = {k: v for k, v in os.environ.items() if k != "REDIS_URL"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,  # a terminal there would turn SIGHUP from a reload into a stop
            stdout=subprocess.DEVNULL,
            stderr=self._log or None,
            env=env,
            start_new_session=True,
        )
        self._url = ""

    @property
    def url(self) -> str:
        """Base URL; waits for the server to say where it listens."""
        if not self._url:
            self._url = wait_until(self._read_url, within_s=START_LIMIT_S, what="glowplug serve", every_s=0.005)
        return self._url

    def _read_url(self) -> str | None:
        if self.process.poll() is not None:
            raise RuntimeError(f"glowplug serve ended with status {self.process.returncode}")
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads((self.state_dir / "run" / "serve.json").read_text())
            if found["pid"] == self.process.pid:
                return f"http://{found['host']}:{found['port']}"
        return None

    def wait_ready(self) -> None:
        """Until /readyz answers 200."""
        wait_until(lambda: self._is_ready(), within_s=START_LIMIT_S, what="/readyz")

    def _is_ready(self) -> bool:
        try:
            return get_text(self.url, "/readyz")[0] == 200
        except OSError:
            return False

    def model_status(self, model: str) -> dict[str, Any]:
        """The model's row of ``ps``; empty if it is not listed yet."""
        rows: list[dict[str, Any]] = get_json(self.url, "/admin/status")["models"]
        return next((row for row in rows if row["name"] == model), {})

    def wait_listed(self, model: str) -> None:
        """Until the model shows up in GET /v1/models."""
        wait_until(
            lambda: model in [row["id"] for row in get_json(self.url, "/v1/models")["data"]],
            within_s=START_LIMIT_S,
            what=f"{model} listed",
        )

    def wait_asleep(self, model: str, *, within_s: float = 60.0) -> None:
        """Until the model has no worker process."""
        wait_until(
            lambda: self.model_status(model).get("workers") == 0 and not self.worker_pids(),
            within_s=within_s,
            what=f"{model} at zero",
        )

    def worker_pids(self) -> list[int]:
        """Processes of ours that are workers of a model: they call themselves ``gp:MODEL``."""
        names = {pid: command_name(pid) for pid in descendants(self.process.pid)}
        return [pid for pid, name in names.items() if name.startswith("gp:") and name not in _OF_NO_MODEL]

    def stop(self) -> int:
        """SIGTERM and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOP_TIMEOUT_S)
        if self._log:
            self._log.close()
        return status

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def descendants(pid: int) -> list[int]:
    """All live processes below ``pid``."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def command_name(pid: int) -> str:
    """The process's short name; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S


def memory_bytes(pid: int, field: str = "Pss") -> int:
    """A field of smaps_rollup (Pss, Private_Dirty, ...), in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def peer_server(
    binary: Path, model: Path, port: int, *, threads: int = 2, slots: int = 1, context_tokens: int = 2048
) -> Iterator[subprocess.Popen[bytes]]:
    """llama.cpp's server on ``model``, started now and killed at the end. Its shared libraries lie beside it.

    ``context_tokens`` are shared by ``slots`` sequences.
    """
    command = [
        *[str(binary), "-m", str(model), "--port", str(port), "--host", "127.0.0.1", "-t", str(threads)],
        *["-c", str(context_tokens), "-np", str(slots), "--no-warmup", "--no-webui"],
    ]
    env = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def peer_is_up(url: str) -> bool:
    """Whether the peer's health check says it can answer."""
    try:
        return get_text(url, "/health")[0] == 200
    except OSError:
        return False
