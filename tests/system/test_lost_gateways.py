"""A gateway that dies or drains while it streams: its clients go on at another one, or their requests are ended."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.fleet_fixtures import Answer, Fleet, copy_linked, started_fleet
from tests.model_fixtures import SMOLLM2

TOKENS = 120  # more than a loaded machine can miss between two looks


@pytest.fixture
async def fleet(smollm2_state_dir: Path, short_tmp_path: Path) -> AsyncIterator[Fleet]:
    async with started_fleet(copy_linked(smollm2_state_dir, short_tmp_path / "s")) as running:
        yield running


async def test_a_stream_goes_on_at_another_gateway_after_kill_9(fleet: Fleet) -> None:
    """Every event once and in order, the text of the log, and its usage; also after the end."""
    storm = Answer()
    asking = asyncio.create_task(fleet.ask(storm, model=SMOLLM2, max_tokens=TOKENS))
    await eventually(lambda: len(storm.ids) >= 8, what="a stream in its middle")
    fleet.send("gateway-0", signal.SIGKILL)
    await asking
    storm.check()
    assert storm.num_resumes >= 1
    await fleet.check(storm, TOKENS)
    whole = await fleet.ask(Answer(request_id=storm.request_id), "gateway-1")
    assert (whole.ids, whole.text) == (storm.ids, storm.text)
