"""A model whose workers die of its requests: the next ones wait longer and longer, and it comes back when they live."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from scheduler.contract import keys
from tests.eventually import eventually
from tests.fleet_fixtures import Answer, copy_linked, started_fleet
from tests.model_fixtures import SMOLLM2

TOKENS = 80
DEATHS = 4


async def test_workers_that_die_in_a_row_are_started_with_a_back_off(
    smollm2_state_dir: Path, short_tmp_path: Path
) -> None:
    """Four workers die of one stream: two are replaced at once, then after a wait; the fifth lives, the stream is
    whole, and no worker was started but those five."""
    async with started_fleet(copy_linked(smollm2_state_dir, short_tmp_path / "s"), gateways=1) as fleet:
        answer = Answer()
        asking = asyncio.create_task(fleet.ask(answer, model=SMOLLM2, max_tokens=TOKENS))
        await eventually(lambda: answer.request_id, what="an accepted request")
        leader = await fleet.leader()
        seen: set[bytes] = set()

        async def is_taken() -> bytes | None:
            owner: bytes | None = await fleet.redis.get(keys.in_progress(answer.request_id))
            return None if owner in seen else owner

        for number in range(1, DEATHS + 1):
            seen.add(await eventually(is_taken, what=f"worker {number} that runs the request"))
            (pid,) = fleet.find_workers()
            os.kill(pid, signal.SIGKILL)
            await eventually(
                lambda number=number: len(fleet.log_events(leader, "worker_died_running")) == number,  # type: ignore[misc]
                what=f"death {number} noticed",
            )
        await asyncio.wait_for(asking, 90)
        await fleet.check(answer, TOKENS)
        deaths = fleet.log_events(leader, "worker_died_running")
        assert [death["deaths"] for death in deaths] == [1, 2, 3, 4]
        assert [death["wait_s"] > 0 for death in deaths] == [False, False, True, True]
        assert all("SIGKILL" in death["error"] for death in deaths)
        assert len(fleet.log_events(leader, "spawn_ordered")) == DEATHS + 1
