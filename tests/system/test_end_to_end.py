"""The whole path with real processes: cold to tokens to zero, a burst, a worker killed in mid-stream."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.processes import Server, descendants, wait_until
from loadtest.streaming_client import StreamedAnswer, chat_body, get_json, get_text, post_stream
from tests.eventually import eventually_sync
from tests.fleet_fixtures import copy_linked
from tests.worker_fixtures import is_running

MODEL = "smollm2"


@contextlib.contextmanager
def started(folder: Path, smollm2_state_dir: Path) -> Iterator[Server]:
    """A server with a short idle timeout; it must end with status 0 and leave nothing behind."""
    state_dir = copy_linked(smollm2_state_dir, folder / "state")
    with Server(state_dir, "--idle-timeout-s", "0.5") as running:
        running.wait_ready()
        running.wait_listed(MODEL)
        yield running
        everything = descendants(running.process.pid)
        assert running.stop() == 0
    eventually_sync(lambda: not any(map(is_running, everything)), what="the end of every process")
    assert list(state_dir.rglob("*.sock")) == []


@pytest.fixture
def fresh_server(smollm2_state_dir: Path, short_tmp_path: Path) -> Iterator[Server]:
    """One that has served nothing yet."""
    with started(short_tmp_path, smollm2_state_dir) as running:
        yield running


@pytest.fixture(scope="module")
def served(smollm2_state_dir: Path) -> Iterator[Server]:
    """One for all other tests here."""
    with tempfile.TemporaryDirectory(prefix="gp-") as folder, started(Path(folder), smollm2_state_dir) as running:
        yield running


@pytest.fixture
def server(served: Server) -> Server:
    """The shared one, its model asleep."""
    served.wait_asleep(MODEL)
    return served


def ask(server: Server, **fields: object) -> StreamedAnswer:
    return post_stream(server.url, chat_body(MODEL, **{"max_tokens": 24, **fields}))  # type: ignore[arg-type]


def test_a_cold_request_streams_then_the_model_goes_back_to_zero_and_wakes_again(fresh_server: Server) -> None:
    """No process before; tokens; no process after; the same again from sealed memory."""
    server = fresh_server
    assert server.worker_pids() == []
    assert get_json(server.url, "/v1/models")["data"][0]["id"] == MODEL
    first = ask(server)
    assert first.text.startswith("The capital of France is Paris")
    assert any("waking" in comment for comment in first.comments)
    assert get_json(server.url, f"/admin/traces/{first.request_id}")["cold_tier"] == "T1"
    server.wait_asleep(MODEL)
    for path in ("/v1/models", "/healthz", "/readyz", "/metrics", "/admin/status"):
        assert get_text(server.url, path)[0] == 200
    assert server.worker_pids() == []
    second = ask(server)
    assert second.text == first.text
    trace = get_json(server.url, f"/admin/traces/{second.request_id}")
    assert trace["cold_tier"] == "T2"
    expected = (
        "queue",
        "dispatch",
        "verify",
        "spawn",
        "device",
        "map",
        "restore",
        "tokenise",
        "prefill",
        "first_token",
    )
    assert set(expected) <= set(trace["phases_ms"])


def test_a_burst_of_100_cold_requests_wakes_one_worker_and_all_are_answered(server: Server) -> None:
    """Single-flight wake: every request is answered, with the same greedy text, by one worker."""
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: ask(server, max_tokens=4), range(100)))
    assert {answer.text for answer in answers} == {answers[0].text}
    assert [answer.error for answer in answers if answer.error] == []
    traces = [get_json(server.url, f"/admin/traces/{answer.request_id}") for answer in answers]
    assert len({trace["worker_id"] for trace in traces}) == 1


def test_a_worker_killed_in_mid_stream_is_replaced_without_gap_or_repeat(server: Server) -> None:
    """kill -9 while a sampled (seeded) answer streams: the text is the same as undisturbed."""
    fields = {"max_tokens": 80, "temperature": 0.8, "seed": 7, "ignore_eos": True}
    undisturbed = ask(server, **fields)
    assert undisturbed.completion_tokens == 80
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server, **fields)
        victim = wait_until(lambda: _busy_worker(server), within_s=30, what="a busy worker", every_s=0.002)
        os.kill(victim, signal.SIGKILL)
        disturbed = running.result(timeout=60)
    assert disturbed.error == ""
    assert disturbed.text == undisturbed.text
    assert disturbed.completion_tokens == 80


def _busy_worker(server: Server) -> int:
    """The worker's pid once it has generated some tokens of the running request; 0 before."""
    status = get_json(server.url, "/admin/status")
    busy = [worker for worker in status.get("workers", []) if worker["num_running"] > 0]
    return int(busy[0]["pid"]) if busy else 0


def test_a_client_that_goes_away_frees_its_sequence(server: Server) -> None:
    """A disconnected stream does not keep the model awake: it goes to zero long before its tokens would be done."""
    import http.client
    import json

    address = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=60)
    body = chat_body(MODEL, max_tokens=6000, ignore_eos=True)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    while b"content" not in response.readline():
        pass
    connection.close()
    response.close()
    server.wait_asleep(MODEL, within_s=30)


def test_a_second_server_on_the_same_state_folder_is_refused(server: Server) -> None:
    """Two servers would fight over one queue and one store."""
    second = Server(server.state_dir)
    assert second.process.wait(timeout=30) != 0
    assert get_text(server.url, "/healthz")[0] == 200
