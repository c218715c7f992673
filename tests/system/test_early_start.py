"""The first serve of a model that is not verified yet: its worker starts while its weights are being verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.processes import Server
from loadtest.streaming_client import chat_body, post_stream
from snapshots.keyring import KeyRing
from snapshots.manifest import WEIGHTS
from snapshots.store import SnapshotStore
from tests.eventually import eventually_sync
from tests.fleet_fixtures import copy_linked, flip_one_bit
from tests.log_lines import read_log

MODEL = "smollm2"
#: Slow enough that the worker always comes before the last weight, on a loaded machine too: 1.8 s for all of them.
PACE_BYTES_PER_S = "150e6"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWPLUG_FILL_LIMIT_BYTES_PER_S", PACE_BYTES_PER_S)


@pytest.fixture
def private_state_dir(smollm2_state_dir: Path, short_tmp_path: Path) -> Path:
    """A private copy, to be damaged."""
    return copy_linked(smollm2_state_dir, short_tmp_path / "state")


def read_events(log: Path) -> list[str]:
    return [line["event"] for line in read_log(log)]


@pytest.mark.usefixtures("slow")
def test_an_early_worker_gives_the_same_answer(smollm2_state_dir: Path, short_tmp_path: Path) -> None:
    """The first answer, computed behind the verification, is the second one's, computed after it."""
    log = short_tmp_path / "serve.log"
    with Server(smollm2_state_dir, log=log) as server:
        server.wait_ready()
        server.wait_listed(MODEL)
        body = {**chat_body(MODEL, max_tokens=12), "temperature": 0}
        first, second = post_stream(server.url, body), post_stream(server.url, body)
    assert not first.error
    assert first.text == second.text != ""
    events = read_events(log)
    assert events.index("worker_started") < events.index("weights_verified") < events.index("worker_exited")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("where", ["first", "last"])
def test_an_early_worker_of_wrong_weights_says_nothing(
    private_state_dir: Path, short_tmp_path: Path, where: str
) -> None:
    """One bit in the first or the last chunk: whatever the worker had computed by then, no token of it is seen."""
    keyring = KeyRing.from_file(private_state_dir / "keys" / "snapshot.keys")
    store = SnapshotStore(private_state_dir / "store")
    path = store.blob_path(store.read_manifest(MODEL, keyring).blobs[WEIGHTS])
    flip_one_bit(path, 0 if where == "first" else path.stat().st_size - 1)
    log = short_tmp_path / "serve.log"
    with Server(private_state_dir, log=log) as server:
        server.wait_ready()
        answer = post_stream(server.url, chat_body(MODEL, max_tokens=4))
        assert answer.error.startswith("blob weights, chunk ")
        assert answer.text == ""
        again = post_stream(server.url, {**chat_body(MODEL, max_tokens=4), "stream": False, "stream_options": None})
        assert json.loads(again.error)["error"]["code"] == "snapshot_corrupt"
        eventually_sync(lambda: server.worker_pids() == [], what="the end of the worker that began too early")
    assert "security" in read_events(log)
