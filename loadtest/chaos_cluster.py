"""What chaos strikes: ``glowplug serve``, a second gateway and a standby scheduler, and the process of each role."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from loadtest.processes import Server, command_name, descendants, free_port, glowplug_command, wait_until
from loadtest.streaming_client import get_text

READY_LIMIT_S: Final = 30.0


class Cluster:
    """A server of our own on ``state_dir`` with two gateways and two schedulers. Use as a context manager.

    ``serve`` restarts its own parts; the second gateway and the standby are restarted by :meth:`restart_fallen`.
    """

    def __init__(self, state_dir: Path, *options: str) -> None:
        self.state_dir = state_dir
        self._ports = (free_port(), free_port())
        log_dir = state_dir / "logs"
        log_dir.mkdir(parents=True, exist_ok=True)
        self._server = Server(state_dir, "--port", str(self._ports[0]), *options, log=log_dir / "serve.log")
        self._log_dir = log_dir
        self._second: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def urls(self) -> tuple[str, str]:
        """Base URLs of both gateways, whether they live at this moment or not."""
        return (f"http://127.0.0.1:{self._ports[0]}", f"http://127.0.0.1:{self._ports[1]}")

    @property
    def server(self) -> Server:
        return self._server

    def start(self, model: str) -> None:
        """Wait until both gateways answer and ``model`` is listed."""
        self._server.wait_ready()
        self._server.wait_listed(model)
        self.restart_fallen()
        wait_until(lambda: self._answers(self.urls[1]), within_s=READY_LIMIT_S, what="the second gateway")

    def restart_fallen(self) -> None:
        """Start the second gateway and the standby scheduler where they do not run."""
        commands = {"gateway": ("gateway", "--port", str(self._ports[1])), "scheduler": ("scheduler",)}
        for role, words in commands.items():
            known = self._second.get(role)
            if known is not None and known.poll() is None:
                continue
            command = [*glowplug_command(), *words, "--state-dir", str(self.state_dir)]
            env = {key: value for key, value in os.environ.items() if key != "REDIS_URL"}
            with (self._log_dir / f"second-{role}.log").open("ab") as log:
                self._second[role] = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL, env=env)

    def pids_of(self, role: str) -> list[int]:
        """Live processes of ``role``: worker, zygote, agent, gateway, scheduler or redis; all of ``serve``'s, and the
        second ones."""
        if role == "redis":
            return self._redis_pids()
        if role == "worker":
            return self._server.worker_pids()
        below = descendants(self._server.process.pid)
        if role == "zygote":
            return [pid for pid in below if command_name(pid) == "gp:zygote"]
        module = "worker" if role == "agent" else "scheduler"
        own = [pid for pid in below if _words(pid)[-2:] == [module, role]]
        second = self._second.get(role)
        return own + ([second.pid] if second is not None and second.poll() is None else [])

    def _redis_pids(self) -> list[int]:
        try:
            pid = int((self.state_dir / "redis" / "server.pid").read_text())
        except (OSError, ValueError):
            return []
        return [pid] if "valkey" in command_name(pid) or "redis" in command_name(pid) else []

    @staticmethod
    def _answers(url: str) -> bool:
        try:
            return get_text(url, "/readyz")[0] == 200
        except OSError:
            return False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._second.values():
            process.terminate()
        for process in self._second.values():
            try:
                process.wait(READY_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._server.stop()


def _words(pid: int) -> list[str]:
    """The command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return []
