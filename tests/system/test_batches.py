"""A batch of a thousand lines through real processes that are killed in its middle: each line is answered once."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from openai.types import Batch

from tests.batch_fixtures import batch_line, decode_rows, encode_lines
from tests.checkpoint_files import DATA
from tests.eventually import eventually
from tests.fleet_fixtures import Fleet, started_fleet
from tests.model_fixtures import new_state
from worker.build.hf_source import open_hugging_face
from worker.build.snapshot_builder import build_snapshot

MODEL = "tiny"
NUM_LINES = 1000
END_WITHIN_S = 90.0


@pytest.fixture
async def fleet(short_tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet with a tiny model, so that the batch measures everything but its arithmetic."""
    built = new_state(short_tmp_path / "s")
    with open_hugging_face(DATA / "tiny_llama") as source:
        build_snapshot(source, MODEL, built.store, built.keyring)
    async with started_fleet(built.state_dir) as running:
        yield running


def client_of(fleet: Fleet, name: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{fleet.urls[name]}/v1", api_key="none", max_retries=5)


async def test_a_thousand_lines_across_kill_9_of_gateway_and_scheduler(fleet: Fleet) -> None:
    """The gateway that runs the batch dies, then the leading scheduler: nothing is lost, nothing comes twice."""
    client = client_of(fleet, "gateway-0")
    lines = [batch_line(i, model=MODEL, max_tokens=1) for i in range(NUM_LINES)]
    lines[500] = batch_line(500, model=MODEL, temperature=-1)
    uploaded = await client.files.create(file=("requests.jsonl", encode_lines(lines)), purpose="batch")
    batch = await client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    )

    async def answered(at_least: int) -> Batch | None:
        found = await client.batches.retrieve(batch.id)
        counts = found.request_counts
        return found if counts is not None and counts.completed + counts.failed >= at_least else None

    await eventually(lambda: answered(100), within_s=END_WITHIN_S, what="a hundred answers")
    runner = "gateway-0" if fleet.log_events("gateway-0", "batch_status") else "gateway-1"
    client = client_of(fleet, "gateway-1" if runner == "gateway-0" else "gateway-0")
    fleet.send(runner, signal.SIGKILL)
    await eventually(lambda: answered(300), within_s=END_WITHIN_S, what="answers by the other gateway")
    fleet.send(await fleet.leader(), signal.SIGKILL)
    fleet.mend()

    async def ended() -> Batch | None:
        found = await client.batches.retrieve(batch.id)
        return found if found.status in ("completed", "failed", "expired") else None

    done: Batch = await eventually(ended, within_s=END_WITHIN_S, what="the end of the batch")
    counts = done.request_counts
    assert done.status == "completed"
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, NUM_LINES - 1, 1)
    assert done.output_file_id is not None
    assert done.error_file_id is not None
    rows = decode_rows((await client.files.content(done.output_file_id)).content)
    assert [row["custom_id"] for row in rows] == [f"r{i}" for i in range(NUM_LINES) if i != 500]
    assert {row["response"]["body"]["usage"]["completion_tokens"] for row in rows} == {1}
    (refused,) = decode_rows((await client.files.content(done.error_file_id)).content)
    assert (refused["custom_id"], refused["error"]["line"]) == ("r500", 501)
