"""One flipped bit in any file of a built snapshot: the request is refused as documented and no worker serves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loadtest.processes import Server, glowplug_command
from loadtest.streaming_client import chat_body, get_text, post_stream
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from tests.eventually import eventually_sync
from tests.fleet_fixtures import copy_linked, flip_one_bit
from tests.log_lines import read_log

MODEL = "smollm2"


@pytest.fixture
def state_dir(smollm2_state_dir: Path, short_tmp_path: Path) -> Path:
    """A private copy, of which one file is going to be another."""
    return copy_linked(smollm2_state_dir, short_tmp_path / "state")


def tampered_file(state_dir: Path, kind: str) -> Path:
    """The manifest, or the blob of that role."""
    store = SnapshotStore(state_dir / "store")
    if kind == "manifest":
        return next((state_dir / "store" / "manifests").glob("*.gpsnap"))
    manifest = store.read_manifest(MODEL, KeyRing.from_file(state_dir / "keys" / "snapshot.keys"))
    return store.blob_path(manifest.blobs[kind])


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("manifest", 403, "snapshot_signature_invalid"),
        ("weights", 500, "snapshot_corrupt"),
        ("guest_cwasm", 500, "snapshot_corrupt"),
        ("guest_wasm", 500, "snapshot_corrupt"),  # no worker uses it
    ],
)
def test_threat_changed_snapshot_served(state_dir: Path, kind: str, status: int, code: str) -> None:
    """The documented status and code, a critical security event in the log, a counter, and no worker process."""
    path = tampered_file(state_dir, kind)
    flip_one_bit(path, path.stat().st_size // 2)
    log = state_dir / "serve.log"
    with Server(state_dir, log=log) as server:
        server.wait_ready()
        body: dict[str, Any] = {**chat_body(MODEL, max_tokens=4), "stream": False, "stream_options": None}
        answer = post_stream(server.url, body)
        error = json.loads(answer.error)["error"]
        assert (answer.status, error["code"]) == (status, code)
        assert str(state_dir) not in error["message"]
        assert ("signature" if kind == "manifest" else kind) in error["message"]
        streamed = post_stream(server.url, chat_body(MODEL, max_tokens=4))
        assert streamed.error
        assert streamed.text == ""
        eventually_sync(lambda: server.worker_pids() == [], what="the end of a worker that began while it was verified")
        eventually_sync(
            lambda: "\nglowplug_security_events_total{" in get_text(server.url, "/metrics")[1], what="a counted event"
        )
    assert [event for event in read_log(log, "security") if event.get("level") == "critical"]
    verify = subprocess.run(
        [*glowplug_command(), "verify", MODEL, "--state-dir", str(state_dir)], capture_output=True, text=True
    )
    assert verify.returncode == 1, verify.stdout + verify.stderr
