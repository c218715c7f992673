"""``examples/enqueue_with_arq.py``: requests through Redis with plain arq wake a model and are answered."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from examples import enqueue_with_arq
from scheduler.contract import codec, job_queue, keys
from scheduler.contract.messages import Demand, GenerateRequest, InboxMessage, SamplingParams
from scheduler.contract.states import Priority
from tests.checkpoint_files import DATA
from tests.fleet_fixtures import Fleet, started_fleet
from tests.model_fixtures import new_state
from worker.build.hf_source import open_hugging_face
from worker.build.snapshot_builder import build_snapshot

MODEL = "tiny"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def fleet(short_tmp_path: Path) -> AsyncIterator[Fleet]:
    """A tiny model behind real processes."""
    built = new_state(short_tmp_path / "s")
    with open_hugging_face(DATA / "tiny_llama") as source:
        build_snapshot(source, MODEL, built.store, built.keyring)
    async with started_fleet(built.state_dir, gateways=1) as running:
        yield running


async def test_the_example_wakes_a_model_and_reads_its_answers(fleet: Fleet) -> None:
    """The script alone, as a user runs it: three prompts, three answers, in order, and an error for no such model."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "examples" / "enqueue_with_arq.py"), MODEL, "one", "two", "three"),
        env={**os.environ, "REDIS_URL": fleet.redis_process.url, "PYTHONPATH": ""},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 3
    assert all(answer["usage"]["prompt_tokens"] > 0 and answer["usage"]["completion_tokens"] > 0 for answer in answers)


def test_what_the_document_says_of_messages_is_so() -> None:
    """Function, keys and message fields of docs/queue.md are those of the code."""
    text = (ROOT / "docs" / "queue.md").read_text()
    assert f"`{keys.JOB_FUNCTION}`" in text
    for key in (keys.queue("MODEL"), keys.bell("MODEL"), keys.token_log("ID"), keys.listener("ID"), keys.INBOX):
        assert f"`{key}`" in text, key
    assert str(job_queue.BATCH_SCORE) in text
    documented = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    for struct in (GenerateRequest, SamplingParams):
        assert set(struct.__struct_fields__) <= documented, set(struct.__struct_fields__) - documented


def test_the_example_speaks_the_contract() -> None:
    """It imports nothing of ours, and its words decode as our messages."""
    source = Path(enqueue_with_arq.__file__).read_text()
    assert not re.search(r"^\s*(from|import) (scheduler|worker|guests|snapshots)", source, re.MULTILINE)
    assert "pickle" not in source
    assert enqueue_with_arq.BATCH_SCORE == job_queue.BATCH_SCORE
    sent = {"request_id": "r", "model": "m", "gateway_id": "g", "prompt": "p", "sampling": {"seed": 1, "max_tokens": 2}}
    request: GenerateRequest = codec.decode(msgspec.msgpack.encode({**sent, "priority": "batch"}), GenerateRequest)
    assert request.priority is Priority.BATCH
    demand = {"type": "demand", "model": "m", "request_id": "r", "sent_mono_ns": 1}
    assert codec.decode(msgspec.msgpack.encode(demand), InboxMessage) == Demand("m", "r", 1)
