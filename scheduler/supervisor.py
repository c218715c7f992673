"""``glowplug serve``: embedded Redis and three child processes, started together, kept running, drained in order.

A plain poll loop over file descriptors: signals (wake-up pipe), the end of each process (pidfd) and the gateway's
readiness (pipe). No event loop, and imports that cost time only after the children have been started: this is the
path of a cold start from nothing.

========== =============================================================================
state      what happens
========== =============================================================================
starting   children and Redis started at once; until the gateway accepts and is ready
serving    a process that ends is started again, with back-off; too often: stopping
stopping   gateway, then agent, then scheduler: SIGTERM, grace, SIGKILL; then Redis
========== =============================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from scheduler.child_process import Child, decide_restart_delay_s, read_start_ticks, stop_leftovers
from scheduler.contract.environment import EXIT_SETTINGS, SNAPSHOT_KEY
from scheduler.embedded_redis import EmbeddedRedisError, EmbeddedServer, ensure_server, server_url, stop_server
from scheduler.readiness_probe import find_what_is_missing, own_scheme
from scheduler.run_folder import RunFolder

READY_FD: Final = "GLOWPLUG_READY_FD"  # the gateway writes {"host", "port"} to it once it accepts
READY_POLL_S: Final = 0.01
SLOW_READY_POLL_S: Final = 0.25
SLOW_START_S: Final = 10.0
TELL_AFTER_S: Final = 4.0  # who waits wants to know for what
LEFTOVER_GRACE_S: Final = 3.0
AT_ONCE_GRACE_S: Final = 5.0

#: Time from SIGTERM to SIGKILL, longer than each part's own drain limit. In this order: the gateway stops accepting
#: and its streams end while workers and scheduler still serve them.
STOP_GRACE_S: Final = {"gateway": 40.0, "agent": 40.0, "scheduler": 10.0}
#: -P: a folder called "worker" where the user happens to stand is not ours.
COMMANDS: Final = {
    "gateway": (sys.executable, "-P", "-m", "scheduler", "gateway"),
    "agent": (sys.executable, "-P", "-m", "worker", "agent"),
    "scheduler": (sys.executable, "-P", "-m", "scheduler", "scheduler"),
}

RELOADED: Final = ("gateway", "scheduler")  # parts that read certificate and configuration again on SIGHUP

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1


class ServeError(RuntimeError):
    """``serve`` cannot start or go on; the message is for the person who typed it."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What ``glowplug serve`` was asked for."""

    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free port
    idle_timeout_s: float | None = None
    config_path: Path | None = None
    dev: bool = False
    commands: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: COMMANDS)


def run_serve(options: ServeOptions) -> int:
    """Serve until SIGINT or SIGTERM; exit code. A second signal ends at once.

    On success: no process and no socket of this state folder is left.
    """
    options = replace(options, state_dir=options.state_dir.absolute())
    try:
        with _serve_lock(options.state_dir):
            return _Supervisor(options, RunFolder(options.state_dir)).run()
    except (ServeError, EmbeddedRedisError) as error:
        print(f"glowplug serve: {error}", file=sys.stderr)
        return EXIT_FAILED


@contextlib.contextmanager
def _serve_lock(state_dir: Path) -> Iterator[None]:
    run_dir = state_dir / "run"
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(run_dir / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
            raise ServeError(
                f"process {holder} already serves {state_dir}: stop it first, or choose another --state-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class _Supervisor:
    """The loop and all it owns. One instance a process, in the main thread."""

    options: ServeOptions
    folder: RunFolder
    children: dict[str, Child] = field(default_factory=dict)
    redis_dir: Path | None = None  # None: REDIS_URL names a server that is not ours
    redis_url: str = ""
    redis: EmbeddedServer | None = None
    redis_pidfd: int = -1
    owns_redis: bool = False
    ready_pipe: int = -1
    ready_text: bytes = b""
    address: tuple[str, int] | None = None
    is_ready: bool = False
    has_told: bool = False  # what it waits for
    started_s: float = 0.0
    signals: list[signal.Signals] = field(default_factory=list)
    wakeup: tuple[int, int] = (-1, -1)
    exit_code: int = EXIT_OK
    log: Any = None

    def run(self) -> int:
        self.started_s = time.monotonic()
        leftovers = self.folder.read("children.json")
        previous = self.folder.read("serve.json")
        self.folder.remove("serve.json")
        stopped = stop_leftovers(leftovers, LEFTOVER_GRACE_S) if leftovers else []
        external_url = os.environ.get("REDIS_URL")
        if external_url:
            self.redis_url = external_url
        else:
            self.redis_dir = self.options.state_dir / "redis"
            self.redis_url = server_url(self.redis_dir)
        with self._signal_handling():
            try:
                for name in STOP_GRACE_S:
                    self._start(name)
                self._start_log()
                if stopped:
                    self.log.warning("leftover_processes_stopped", pids=stopped)
                self._start_redis(previous.get("redis_pid"))
                while not self.signals and self.exit_code == EXIT_OK:
                    self._turn()
            finally:
                self._stop_all()
        return self.exit_code

    # --- starting -------------------------------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        child = self.children.get(name)
        if child is None:
            child = self.children[name] = Child(name, self.options.commands[name])
        if name != "gateway":
            child.start(self._environment(name))
        else:
            read_end, write_end = os.pipe()
            try:
                child.start({**self._environment(name), READY_FD: str(write_end)}, pass_fds=(write_end,))
            finally:
                os.close(write_end)
            if self.ready_pipe >= 0:
                os.close(self.ready_pipe)
            os.set_blocking(read_end, False)
            self.ready_pipe, self.ready_text = read_end, b""
        self._record_children()

    def _environment(self, part: str) -> dict[str, str]:
        """What a part finds in its environment; of the key that signs snapshots, the agent alone hears."""
        options = self.options
        host, port = self.address or (options.host, options.port)  # a restarted gateway keeps its port
        environment = {name: value for name, value in os.environ.items() if part == "agent" or name != SNAPSHOT_KEY}
        environment.update(
            GLOWPLUG_STATE_DIR=str(options.state_dir),
            GLOWPLUG_HOST=host,
            GLOWPLUG_PORT=str(port),
            REDIS_URL=self.redis_url,
        )
        if options.idle_timeout_s is not None:
            environment["GLOWPLUG_IDLE_TIMEOUT_S"] = str(options.idle_timeout_s)
        if options.config_path is not None:
            environment["GLOWPLUG_CONFIG"] = str(options.config_path)
        if options.dev:
            environment["GLOWPLUG_DEV"] = "1"
        return environment

    def _start_log(self) -> None:
        # Imported while the children import: on a machine with two cores this costs the cold start nothing.
        import structlog

        from scheduler.contract.environment import read_process_settings
        from scheduler.contract.telemetry import configure_logging

        settings = read_process_settings()
        configure_logging(
            component="serve", level=settings.log_level, log_format=settings.log_format, log_dir=settings.log_dir
        )
        self.log = structlog.get_logger()

    def _start_redis(self, previous_pid: object = None) -> None:
        if self.redis_dir is None:
            return
        self.redis = ensure_server(self.redis_dir)
        # A server that a killed serve left behind is ours too: the lock says that nobody else serves this folder.
        self.owns_redis = self.owns_redis or self.redis.started or self.redis.pid == previous_pid
        with contextlib.suppress(ProcessLookupError):
            self.redis_pidfd = os.pidfd_open(self.redis.pid)

    # --- the loop -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Wait for the next thing to happen and deal with it."""
        ready = self._poll(self._wait_s())
        if self.ready_pipe in ready:
            self._read_ready_pipe()
        if self.redis_pidfd in ready:
            self.log.error("redis_ended", pid=self.redis.pid if self.redis else 0)
            os.close(self.redis_pidfd)
            self.redis_pidfd = -1
            self._start_redis()
        for child in self.children.values():
            if child.pidfd in ready:
                self._on_exit(child)
            if child.restart_at_s is not None and child.restart_at_s <= time.monotonic():
                self._start(child.name)
        if not self.is_ready:
            self._look_for_readiness()

    def _look_for_readiness(self) -> None:
        missing = "the gateway does not accept yet" if self.address is None else find_what_is_missing(self.address)
        if not missing:
            self._on_ready()
        elif not self.has_told and time.monotonic() - self.started_s > TELL_AFTER_S:
            self.has_told = True
            print(f"glowplug serve: still starting: {missing} (`glowplug logs` has more)", file=sys.stderr, flush=True)

    def _reload(self) -> None:
        """SIGHUP as service managers send it: the parts that can read their configuration again do so."""
        if self.is_ready:  # before, they have no handler yet, and read the newest file anyway
            for name in RELOADED:
                self.children[name].send(signal.SIGHUP)
            self.log.info("reload_sent", parts=RELOADED)

    def _wait_s(self) -> float | None:
        now_s = time.monotonic()
        waits = [child.restart_at_s - now_s for child in self.children.values() if child.restart_at_s is not None]
        if not self.is_ready:
            is_slow = self.address is None or now_s - self.started_s > SLOW_START_S
            waits.append(SLOW_READY_POLL_S if is_slow else READY_POLL_S)
        return max(0.0, min(waits)) if waits else None

    def _poll(self, wait_s: float | None) -> set[int]:
        """Descriptors that are readable, after at most ``wait_s``; takes in signals."""
        poller = select.poll()
        watched = [self.wakeup[0], self.ready_pipe, self.redis_pidfd, *(c.pidfd for c in self.children.values())]
        for descriptor in watched:
            if descriptor >= 0:
                poller.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poller.poll(None if wait_s is None else wait_s * 1000)}
        if self.wakeup[0] in ready:
            for number in os.read(self.wakeup[0], 64):
                if number == signal.SIGHUP and not _has_terminal():
                    self._reload()
                else:
                    self.signals.append(signal.Signals(number))
        return ready

    def _read_ready_pipe(self) -> None:
        data = os.read(self.ready_pipe, 4096)
        self.ready_text += data
        if data and b"\n" not in self.ready_text:
            return
        os.close(self.ready_pipe)
        self.ready_pipe = -1
        try:
            message = json.loads(self.ready_text)
            self.address = (str(message["host"]), int(message["port"]))
        except (ValueError, LookupError, TypeError):
            if self.ready_text:
                self.log.error("gateway_ready_line_refused", line=self.ready_text.decode(errors="replace"))

    def _on_ready(self) -> None:
        assert self.address is not None
        self.is_ready = True
        host, port = self.address
        scheme = own_scheme()
        self.folder.write(
            "serve.json",
            {
                "pid": os.getpid(),
                "scheme": scheme,
                "host": host,
                "port": port,
                "redis_url": self.redis_url,
                "redis_pid": self.redis.pid if self.redis is not None and self.owns_redis else None,
            },
        )
        started_ms = round((time.monotonic() - self.started_s) * 1000)
        shown = f"[{host}]" if ":" in host else host
        print(f"glowplug serves {scheme}://{shown}:{port} ({started_ms} ms)", flush=True)

    def _on_exit(self, child: Child) -> None:
        pid, code = child.pid, child.reap()
        now_s = time.monotonic()
        child.exits_s.append(now_s)
        delay_s = decide_restart_delay_s(child.exits_s, now_s, code)
        if delay_s is None:
            reason = "its settings were refused" if code == EXIT_SETTINGS else f"it ended {len(child.exits_s)} times"
            self.log.critical("giving_up", part=child.name, pid=pid, exit_code=code, reason=reason)
            self.exit_code = code if code == EXIT_SETTINGS else EXIT_FAILED
            return
        self.log.error("part_ended", part=child.name, pid=pid, exit_code=code, restart_in_s=delay_s)
        child.restart_at_s = now_s + delay_s

    # --- stopping -------------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        if self.log is None:
            self._start_log()
        self.log.info("stopping", signals=[number.name for number in self.signals])
        self.folder.remove("serve.json")
        for name, grace_s in STOP_GRACE_S.items():
            if name in self.children:
                self._stop(self.children[name], grace_s)
        self.folder.remove("children.json")
        for descriptor in (self.ready_pipe, self.redis_pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        if self.redis_dir is not None and self.owns_redis:
            stop_server(self.redis_dir)

    def _stop(self, child: Child, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after ``grace_s``. At once: a part drains no longer when it is signalled twice."""
        child.restart_at_s = None
        child.send(signal.SIGTERM)
        begin_s = time.monotonic()
        deadline_s = begin_s + grace_s
        hurried = False
        while child.is_running:
            if len(self.signals) > 1 and not hurried:
                hurried = True
                child.send(signal.SIGINT)  # another number: a second SIGTERM could merge with a first one still pending
                deadline_s = min(deadline_s, time.monotonic() + AT_ONCE_GRACE_S)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or len(self.signals) > 2:
                after_s = round(time.monotonic() - begin_s, 1)
                self.log.error("part_killed", part=child.name, pid=child.pid, after_s=after_s)
                child.send(signal.SIGKILL)
                child.reap()
                return
            ready = self._poll(left_s)
            for other in self.children.values():
                if other.pidfd in ready:
                    other.reap()

    # --- files and signals ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signal_handling(self) -> Iterator[None]:
        """Signals become bytes in a pipe, read by the loop; so none is lost and none interrupts anything."""
        self.wakeup = os.pipe()
        for descriptor in self.wakeup:
            os.set_blocking(descriptor, False)
        previous_fd = signal.set_wakeup_fd(self.wakeup[1], warn_on_full_buffer=False)
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup, a closed terminal is no reason to stop
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for descriptor in self.wakeup:
                os.close(descriptor)

    def _record_children(self) -> None:
        running = [child.pid for child in self.children.values() if child.is_running]
        self.folder.write("children.json", {str(pid): read_start_ticks(pid) for pid in running})


def _has_terminal() -> bool:
    """Whether a hang-up means that somebody closed the window, and not that a service manager asks for a reload."""
    return any(os.isatty(fd) for fd in (0, 1, 2))
