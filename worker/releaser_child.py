"""The agent's side of T3r: its listening socket, and the helper that serves it (:mod:`worker.releaser`)."""

from __future__ import annotations

import asyncio
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

import msgspec
import structlog

from worker.device_release import Probed

RELEASER_COMMAND: Final = (sys.executable, "-m", "worker", "releaser")
RESTART_AFTER_S: Final = 1.0
_BACKLOG: Final = 64


class ReleaseProcess:
    """Starts the helper, probes the driver with it, and starts it anew when it dies. Event loop only."""

    def __init__(self, command: Sequence[str] = RELEASER_COMMAND) -> None:
        self._command = command
        self._log = structlog.get_logger()
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self.address = ""  # for workers; empty where the driver is known not to be able

    async def run(self) -> None:
        """Keep a helper; ends where the driver cannot, which the log tells."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.address = f"glowplug-release-{secrets.token_hex(8)}"
        self._listener.bind("\0" + self.address)
        self._listener.listen(_BACKLOG)
        while not self._is_closed:
            reason = await self._start()
            if reason:
                remedy = "driver 570 or newer; until then models with `park: release` are parked (T3) instead"
                self._log.info("gpu_release_unavailable", reason=reason, remedy=remedy)
                self._stop_listening()
                return
            self._log.info("gpu_release_available", address=self.address)
            await asyncio.to_thread(self._wait_ended)
            if not self._is_closed:
                self._log.error("gpu_releaser_died", restarts_after_s=RESTART_AFTER_S)
                await asyncio.sleep(RESTART_AFTER_S)

    def close(self) -> None:
        """End the helper. Idempotent."""
        self._is_closed = True
        if self._process is not None:
            self._process.kill()
        self._stop_listening()

    async def _start(self) -> str:
        """Start a helper; why the driver cannot (empty: it can)."""
        if self._listener is None:
            return "closed"
        try:
            process = self._process = self._spawn(self._listener.fileno())
        except OSError as error:
            return f"the helper could not be started: {error}"
        if process.stdout is None:
            raise RuntimeError("started without a pipe")
        line = await asyncio.to_thread(process.stdout.readline)
        try:
            return msgspec.json.decode(line, type=Probed).reason
        except msgspec.DecodeError:
            return f"the helper ended before it said anything (exit code {await asyncio.to_thread(process.wait)})"

    def _spawn(self, listener_fd: int) -> subprocess.Popen[bytes]:
        """Not by asyncio's subprocess: uvloop's lets inheritable descriptors through. In a session of its own: Ctrl-C
        in a terminal is for the agent."""
        return subprocess.Popen(
            [*self._command, str(listener_fd)],
            pass_fds=(listener_fd,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def _wait_ended(self) -> None:
        if self._process is not None:
            self._process.wait()

    def _stop_listening(self) -> None:
        self.address = ""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
