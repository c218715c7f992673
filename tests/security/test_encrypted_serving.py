"""A real server with an encrypted model and policy ``always``: it serves; an old manifest that is put back is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.processes import Server
from loadtest.streaming_client import chat_body, post_stream
from snapshots.keyring import KeyRing
from snapshots.rollback import NewestSeen
from snapshots.store import SnapshotStore
from tests.eventually import eventually_sync
from worker.agent_settings import newest_record
from worker.build.model_sources import open_located
from worker.build.snapshot_builder import build_snapshot

CHECKPOINT = Path(__file__).parent.parent / "data" / "tiny_llama"
MODEL = "tiny"


def build(state_dir: Path, keyring: KeyRing, *, encrypt: bool) -> bytes:
    """Build the tiny model as ``glowplug build`` does; its manifest file."""
    store = SnapshotStore(state_dir / "store", newest=NewestSeen(newest_record(state_dir)))
    with open_located(CHECKPOINT) as source:
        build_snapshot(source, MODEL, store, keyring, encrypt=encrypt)
    return store.read_container(MODEL)


def ask(server: Server) -> tuple[int, Any]:
    """Status and body of one short completion."""
    answer = post_stream(server.url, {**chat_body(MODEL, max_tokens=4), "stream": False, "stream_options": None})
    return answer.status, json.loads(answer.error) if answer.status != 200 else answer.text


def test_threat_old_snapshot(short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cold start from ciphertext; then the manifest of the build before (plain, authentic) is refused with 403."""
    state_dir = short_tmp_path / "state"
    key_file = state_dir / "keys" / "snapshot.keys"
    KeyRing.generate_file(key_file)
    keyring = KeyRing.rotate(key_file, encryption=True)
    old = build(state_dir, keyring, encrypt=False)
    build(state_dir, keyring, encrypt=True)
    monkeypatch.setenv("GLOWPLUG_VERIFY", "always")
    with Server(state_dir, log=state_dir / "serve.log") as server:
        server.wait_ready()
        assert ask(server)[0] == 200
        (state_dir / "store" / "manifests" / f"{MODEL}.gpsnap").write_bytes(old)

        def is_refused() -> bool:
            status, body = ask(server)
            return status == 403 and "old manifest was put back" in body["error"]["message"]

        eventually_sync(is_refused, what="the old manifest is refused")
    log = (state_dir / "serve.log").read_text()
    assert "rolled_back" in log
