"""The publisher's writing task: what ends it is told to its owner, who must not run on without it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from redis.asyncio import Redis

from scheduler.contract import token_log
from scheduler.contract.messages import StepFrame
from tests.queue_fixtures import make_request
from worker.publisher import TokenPublisher


class ConfusedServer:
    """Gives every run its fence, and an answer to each write that is none."""

    def register_script(self, script: str) -> Callable[..., Awaitable[Any]]:
        async def run(keys: list[str], args: list[Any]) -> Any:
            return [b"0"] if script == token_log.TAKE_FENCE else [b"an odd number of fields"]

        return run


async def test_an_end_of_the_writing_task_is_told() -> None:
    """An answer that cannot be understood is no trouble that passes: the owner hears of it, and of its cause."""
    publisher = TokenPublisher(cast(Redis, ConfusedServer()))
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    publisher.watch(lambda task: ended.set_result(task.exception()))
    await publisher.begin(make_request("r1"), 1)
    publisher.publish([("r1", StepFrame((), 0))])
    async with asyncio.timeout(10):
        assert isinstance(await ended, ValueError)
    await publisher.aclose()
