"""Embeddings over HTTP with real processes: an encoder wakes from zero, answers, and goes back to zero."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from loadtest.processes import Server, descendants
from loadtest.streaming_client import get_json
from tests.checkpoint_files import DATA
from tests.embedding_texts import TEXTS
from tests.encoder_fixtures import MINILM
from tests.eventually import eventually_sync
from tests.model_fixtures import BuiltState
from tests.worker_fixtures import is_running

LIMIT_S = 60.0


@pytest.fixture
def server(minilm_built: BuiltState, short_tmp_path: Path) -> Iterator[Server]:
    """A server over the encoder's snapshots; it must end with status 0 and leave nothing behind."""
    state_dir = short_tmp_path / "state"
    shutil.copytree(minilm_built.state_dir, state_dir, copy_function=_link_blobs)
    with Server(state_dir, "--idle-timeout-s", "0.5") as running:
        running.wait_ready()
        running.wait_listed(MINILM)
        yield running
        everything = descendants(running.process.pid)
        assert running.stop() == 0
    eventually_sync(lambda: not any(map(is_running, everything)), what="the end of every process")


def _link_blobs(source: str, target: str) -> None:
    if "/blobs/" in source:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
    """Status, decoded body, and what the answer says of a cold start."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=LIMIT_S)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    decoded = json.loads(response.read())
    connection.close()
    return response.status, decoded, response.headers.get("X-Cold-Start", "")


def vectors_of(answer: dict[str, Any]) -> npt.NDArray[np.float32]:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return np.array([entry["embedding"] for entry in answer["data"]], np.float32)


def test_an_encoder_wakes_answers_100_texts_and_goes_back_to_zero(server: Server) -> None:
    """Cold to vectors that equal another implementation's; base64, dimensions and refusals on the way; then asleep."""
    golden = np.load(DATA / "minilm_embeddings.npz")
    assert server.worker_pids() == []
    status, answer, cold = post(server, "/v1/embeddings", {"model": MINILM, "input": list(TEXTS)})
    assert status == 200, answer
    assert cold not in ("", "none")
    vectors = vectors_of(answer)
    assert np.sum(vectors * golden["vectors"], axis=1).min() >= 0.9999
    assert answer["usage"] == {
        "prompt_tokens": int(golden["num_tokens"].sum()),
        "total_tokens": int(golden["num_tokens"].sum()),
    }

    ids = golden["token_ids"][: int(golden["num_tokens"][0])].tolist()
    body = {"model": MINILM, "input": ids, "encoding_format": "base64", "dimensions": 64}
    status, answer, _ = post(server, "/v1/embeddings", body)
    assert status == 200, answer
    short = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    expected = vectors[0, :64] / np.linalg.norm(vectors[0, :64])
    assert short.shape == (64,)
    assert float(short @ expected) >= 0.9999

    status, answer, _ = post(server, "/v1/embeddings", {"model": MINILM, "input": ["fits", "word " * 300]})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "input[1]")
    assert "302 tokens" in answer["error"]["message"]
    assert "256 tokens" in answer["error"]["message"]
    status, answer, _ = post(
        server, "/v1/chat/completions", {"model": MINILM, "messages": [{"role": "user", "content": "Hi"}]}
    )
    assert status == 400
    assert "/v1/embeddings" in answer["error"]["message"]

    server.wait_asleep(MINILM)
    assert server.worker_pids() == []
    assert [m["task"] for m in get_json(server.url, "/v1/models")["data"]] == ["embed", "embed"]
    status, answer, cold = post(server, "/v1/embeddings", {"model": MINILM, "input": TEXTS[0]})
    assert status == 200, answer
    assert float(vectors_of(answer)[0] @ vectors[0]) >= 0.9999
