"""``glowplug serve``'s supervisor with real processes: small parts that say what happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from scheduler.embedded_redis import ensure_server, server_url, socket_path, stop_server
from tests.eventually import eventually_sync

#: A part: notes its start and its end in a common journal; the gateway also listens, and tells where.
PART = """
import http.server, json, os, signal, sys, threading
name, journal = sys.argv[1], sys.argv[2]

def note(event):
    with open(journal, "a") as file:
        file.write(json.dumps({"part": name, "event": event, "pid": os.getpid(), "redis": os.environ["REDIS_URL"],
                               "port": os.environ["GLOWPLUG_PORT"],
                               "has_key": "GLOWPLUG_SNAPSHOT_KEY" in os.environ}) + "\\n")

def main():
    note("start")
    if "refuse" in sys.argv:
        return 78
    if "crash" in sys.argv:
        return 1
    if name == "gateway":
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                is_unready = "unready" in sys.argv and not os.path.exists(journal + ".ready")
                self.send_response(404 if self.path != "/readyz" else 503 if is_unready else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"reasons": ["no node agent", "no scheduler"]}).encode())
            def log_message(self, *_):
                pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["GLOWPLUG_PORT"])), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = json.dumps({"host": "127.0.0.1", "port": server.server_address[1]}) + "\\n"
        os.write(int(os.environ["GLOWPLUG_READY_FD"]), line.encode())
        os.close(int(os.environ["GLOWPLUG_READY_FD"]))
    while True:
        number = signal.sigwait({signal.SIGTERM, signal.SIGINT})
        note(signal.Signals(number).name)
        if "deaf" not in sys.argv and ("stubborn" not in sys.argv or number == signal.SIGINT):
            break
    note("end")
    return 0

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
sys.exit(main())
"""

SERVE = """
import json, pathlib, sys
from scheduler import supervisor
from scheduler.supervisor import ServeOptions, run_serve
supervisor.TELL_AFTER_S = 0.1
state_dir, commands = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
sys.exit(run_serve(ServeOptions(state_dir=state_dir, port=0, dev=True, commands=commands)))
"""


class Serve:
    """A supervisor process under test."""

    def __init__(self, folder: Path, *, environment: dict[str, str] | None = None, **manners: str) -> None:
        self.state_dir = folder / "state"
        self.journal_path = folder / "journal"
        self._log = (folder / "log").open("ab")
        part = folder / "part.py"
        part.write_text(PART)
        commands = {
            name: [sys.executable, str(part), name, str(self.journal_path), manners.get(name, "")]
            for name in ("gateway", "agent", "scheduler")
        }
        inherited = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(self.state_dir), json.dumps(commands)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**inherited, **(environment or {})},
        )

    def wait_ready(self) -> dict[str, Any]:
        """The content of this process's serve.json once it is there, and every part has its signals in hand."""
        ready = dict(eventually_sync(self._read_ready, what="serve.json"))
        eventually_sync(lambda: len({part for part, _ in self.events("start")}) == 3, what="the start of every part")
        return ready

    def _read_ready(self) -> dict[str, Any] | None:
        assert self.process.poll() is None, "the supervisor ended"
        path = self.state_dir / "run" / "serve.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found if found and found["pid"] == self.process.pid else None

    @property
    def journal(self) -> list[dict[str, Any]]:
        if not self.journal_path.exists():
            return []
        return [json.loads(line) for line in self.journal_path.read_text().splitlines()]

    def events(self, *kinds: str) -> list[tuple[str, str]]:
        return [(entry["part"], entry["event"]) for entry in self.journal if entry["event"] in kinds]

    def pid_of(self, part: str) -> int:
        return int([entry["pid"] for entry in self.journal if entry["part"] == part][-1])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def close(self) -> None:
        """After a failed test: leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for entry in self.journal:
            if is_alive(entry["pid"]):
                os.kill(entry["pid"], signal.SIGKILL)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()
        if (self.state_dir / "redis").exists():
            stop_server(self.state_dir / "redis")


def is_alive(pid: int) -> bool:
    """Whether a process runs under this number (a zombie does not)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def serve(short_tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    started: list[Serve] = []

    def start(**options: Any) -> Serve:
        started.append(Serve(short_tmp_path, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_serves_then_leaves_nothing_behind(serve: Callable[..., Serve]) -> None:
    """Ready is written once the gateway answers; SIGTERM stops the parts in order, then Redis; nothing is left."""
    served = serve()
    ready = served.wait_ready()
    assert ready["pid"] == served.process.pid
    with urllib.request.urlopen(f"http://{ready['host']}:{ready['port']}/readyz", timeout=5) as response:
        assert response.status == 200
    with redis.Redis.from_url(ready["redis_url"]) as client:
        assert client.ping()
    assert {part for part, _ in served.events("start")} == {"gateway", "agent", "scheduler"}
    assert {entry["redis"] for entry in served.journal} == {server_url(served.state_dir / "redis")}
    assert served.stop(signal.SIGTERM) == 0
    assert served.events("end") == [("gateway", "end"), ("agent", "end"), ("scheduler", "end")]
    assert not any(is_alive(entry["pid"]) for entry in served.journal)
    assert not is_alive(ready["redis_pid"])
    assert not socket_path(served.state_dir / "redis").exists()
    assert {path.name for path in (served.state_dir / "run").iterdir()} == {"serve.lock"}


def test_only_the_agent_has_the_key(serve: Callable[..., Serve]) -> None:
    """A key that signs snapshots, given as a variable, is not in the gateway, which talks to the world."""
    running = serve(environment={"GLOWPLUG_SNAPSHOT_KEY": "k1:" + "ab" * 32})
    running.wait_ready()
    assert {entry["part"] for entry in running.journal if entry["has_key"]} == {"agent"}


def test_who_waits_is_told_for_what(serve: Callable[..., Serve], short_tmp_path: Path) -> None:
    """A server that is not ready after a while says once what is missing; then it becomes ready as any other."""
    running = serve(gateway="unready")
    log = short_tmp_path / "log"
    said = "glowplug serve: still starting: no node agent; no scheduler"
    eventually_sync(lambda: said in log.read_text(), what="the line that says what is missing")
    assert not (running.state_dir / "run" / "serve.json").exists()
    running.journal_path.with_name("journal.ready").touch()
    running.wait_ready()
    assert log.read_text().count("still starting") == 1


def test_interrupt_reaches_the_parts_once(serve: Callable[..., Serve]) -> None:
    """Ctrl-C is one orderly stop: the parts are in process groups of their own and get one SIGTERM each."""
    served = serve()
    served.wait_ready()
    assert served.stop(signal.SIGINT) == 0
    assert [event for _, event in served.events("SIGTERM", "SIGINT")] == ["SIGTERM"] * 3
    groups = {entry["pid"] for entry in served.journal}
    assert len(groups) == 3


def test_second_signal_hurries(serve: Callable[..., Serve]) -> None:
    """A part that takes its time over draining is told to end at once by a second signal."""
    served = serve(gateway="stubborn")
    served.wait_ready()
    served.process.send_signal(signal.SIGTERM)
    eventually_sync(lambda: ("gateway", "SIGTERM") in served.events("SIGTERM"))
    assert served.stop(signal.SIGINT) == 0
    assert ("gateway", "SIGINT") in served.events("SIGINT")
    assert served.events("end") == [("gateway", "end"), ("agent", "end"), ("scheduler", "end")]


def test_third_signal_kills(serve: Callable[..., Serve]) -> None:
    """A part that heeds nothing is killed, and whatever still runs with it."""
    served = serve(agent="deaf")
    served.wait_ready()
    for number, heard in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        served.process.send_signal(number)
        eventually_sync(lambda: ("agent", heard) in served.events(heard))  # noqa: B023  (called before the next turn)
    assert served.stop(signal.SIGTERM) == 0
    assert served.events("end")[:1] == [("gateway", "end")]
    assert not any(is_alive(entry["pid"]) for entry in served.journal)


@pytest.mark.parametrize("part", ["gateway", "agent", "scheduler"])
def test_part_that_dies_is_started_again(serve: Callable[..., Serve], part: str) -> None:
    """kill -9 of one part: it comes back (the gateway on the same port) and the others do not notice."""
    served = serve()
    ready = served.wait_ready()
    others = {entry["pid"] for entry in served.journal if entry["part"] != part}
    os.kill(served.pid_of(part), signal.SIGKILL)
    eventually_sync(lambda: len([entry for entry in served.journal if entry["part"] == part]) == 2)
    assert all(is_alive(pid) for pid in others)
    if part == "gateway":
        assert served.journal[-1]["port"] == str(ready["port"])
    assert served.stop() == 0


def test_redis_that_dies_is_started_again(serve: Callable[..., Serve]) -> None:
    """kill -9 of the embedded server: it is started again over its files, and still stopped at the end."""
    served = serve()
    ready = served.wait_ready()
    with redis.Redis.from_url(ready["redis_url"]) as client:
        client.set("kept", "yes")
    os.kill(ready["redis_pid"], signal.SIGKILL)
    pid = eventually_sync(lambda: _find_other_server(served.state_dir / "redis", ready["redis_pid"]))
    with redis.Redis.from_url(ready["redis_url"]) as client:
        assert client.get("kept") == b"yes"
    assert served.stop() == 0
    assert not is_alive(pid)


def test_part_that_keeps_dying_ends_the_whole(serve: Callable[..., Serve]) -> None:
    """After a handful of restarts the supervisor gives up, stops everything and fails."""
    served = serve(scheduler="crash")
    assert served.process.wait(timeout=30) == 1
    assert len(served.events("start")) == 5 + 2
    assert not any(is_alive(entry["pid"]) for entry in served.journal)


def test_refused_settings_end_the_whole_at_once(serve: Callable[..., Serve]) -> None:
    """A part that refuses its settings is not started again; its exit code is passed on."""
    served = serve(agent="refuse")
    assert served.process.wait(timeout=30) == 78
    assert served.events("start").count(("agent", "start")) == 1


def test_second_serve_on_one_folder_is_refused(serve: Callable[..., Serve], short_tmp_path: Path) -> None:
    """Two supervisors on one state folder would share a queue and a store: the second one says who is there."""
    first = serve()
    ready = first.wait_ready()
    second = serve()
    assert second.process.wait(timeout=30) == 1
    assert f"process {ready['pid']} already serves" in (short_tmp_path / "log").read_text()
    assert first.process.poll() is None
    assert first.stop() == 0


def test_killed_supervisor_is_cleaned_up_after(serve: Callable[..., Serve]) -> None:
    """kill -9 of the supervisor leaves parts and server running; the next one ends the parts, adopts the server."""
    first = serve()
    ready = first.wait_ready()
    orphans = [first.pid_of(part) for part in ("gateway", "agent", "scheduler")]
    first.process.kill()
    first.process.wait()
    assert all(is_alive(pid) for pid in orphans)
    second = serve()
    eventually_sync(lambda: len(second.events("start")) == 6)
    again = second.wait_ready()
    assert again["redis_pid"] == ready["redis_pid"]
    assert not any(is_alive(pid) for pid in orphans)
    assert second.stop() == 0
    assert not is_alive(ready["redis_pid"])


def test_given_server_is_used_and_left_alone(serve: Callable[..., Serve], redis_url: str) -> None:
    """With REDIS_URL no server is started, the parts get that URL, and it still answers afterwards."""
    served = serve(environment={"REDIS_URL": redis_url})
    ready = served.wait_ready()
    assert ready["redis_url"] == redis_url
    assert not (served.state_dir / "redis").exists()
    assert {entry["redis"] for entry in served.journal} == {redis_url}
    assert served.stop() == 0
    with redis.Redis.from_url(redis_url) as client:
        assert client.ping()


def _find_other_server(data_dir: Path, pid: int) -> int | None:
    if not socket_path(data_dir).exists() or is_alive(pid):
        return None
    pid_file = data_dir / "server.pid"
    found = pid_file.read_text() if pid_file.exists() else ""
    return int(found) if found and int(found) != pid and ensure_server(data_dir).pid == int(found) else None
