"""A Python guest that post-processes what a model says, through HTTP and real worker processes."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.processes import Server
from snapshots.errors import MappingError
from snapshots.keyring import KeyRing
from snapshots.manifest import POST_PROCESSOR
from snapshots.store import SnapshotStore
from tests.python_guest_fixtures import compiled_python_component
from tests.worker_fixtures import CHECKPOINT, MODEL, copy_state_dir
from worker.build.errors import BuildError
from worker.build.further_sections import FurtherSections, read_further_sections
from worker.build.weights_reuse import build_over_weights
from worker.post_processor import PreparedPostProcessor
from worker.spawn_order import SpawnedFds

MASKED = "masked"
LENGTH = 8


@pytest.fixture
def server(short_tmp_path: Path) -> Iterator[Server]:
    """A server of the tiny model, and of one over its weights whose text goes through the example guest."""
    state_dir = copy_state_dir(short_tmp_path / "state")
    keyring = KeyRing.from_file(state_dir / "keys" / "snapshot.keys")
    store = SnapshotStore(state_dir / "store")
    further = FurtherSections(post_processor=compiled_python_component())
    build_over_weights(MODEL, MASKED, store, keyring, further=further)
    manifest = store.read_manifest(MASKED, keyring)
    assert POST_PROCESSOR in manifest.worker_roles
    with pytest.raises(MappingError):  # a worker that got no memory for it
        PreparedPostProcessor(manifest, SpawnedFds(0, 0))
    with Server(state_dir) as running:
        running.wait_ready()
        running.wait_listed(MASKED)
        yield running
        assert running.stop() == 0


def say(server: Server, letter: str, model: str = MASKED) -> tuple[int, Any]:
    """Status and answer of a completion that consists of one letter, again and again."""
    vocabulary = json.loads((CHECKPOINT / "tokenizer.json").read_text())["model"]["vocab"]
    body = {
        "model": model,
        "prompt": "say",
        "max_tokens": LENGTH,
        "temperature": 0,
        "logit_bias": {str(vocabulary[letter]): 100},
    }
    request = urllib.request.Request(  # our own server
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def test_text_is_rewritten_and_a_failing_hook_fails_its_request_alone(server: Server) -> None:
    """Masked where the model beside it says the digits; an exception and an endless loop are clear errors, and the
    same worker answers the next request rightly."""
    assert say(server, "7", MODEL) == (200, "7" * LENGTH)
    assert say(server, "7") == (200, "#" * LENGTH)
    workers = set(server.worker_pids())
    for letter, reason in (("9", "post-process"), ("8", "deadline of 1000 ms")):
        status, error = say(server, letter)
        assert status == 500, error
        assert error["code"] == "guest_failed"
        assert "post-processor" in error["message"]
        assert reason in error["message"]
        assert say(server, "a") == (200, "a" * LENGTH)
    assert workers <= set(server.worker_pids())


def test_only_components_become_post_processors(tmp_path: Path) -> None:
    """Anything else is refused by the build, and an encoder has no use for one."""
    (tmp_path / "text").write_text("no component")
    with pytest.raises(BuildError, match="is no post-processor"):
        read_further_sections((), tmp_path / "text")
    with pytest.raises(BuildError, match="writes no text"):
        FurtherSections(post_processor=b"code").validate_for(encodes=True)
