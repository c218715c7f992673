"""A client that goes away over HTTP, counted in steps of the real engine: what it held is free with the next one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from scheduler.contract.states import Tier
from tests.engine_fixtures import EngineHarness
from tests.eventually import eventually
from tests.gateway_fixtures import MODEL, GatewayHarness, make_card, make_status, run_gateway
from worker.engine.mailbox import Mail
from worker.engine.types import AnyRequest, RequestStep
from worker.jobs import ClaimingWorker
from worker.publisher import TokenPublisher
from worker.request_runner import RequestRunner, WakeRecord


class SteppedWorker(EngineHarness):
    """A worker of a tiny model on this process's loop, whose engine thread takes a step only when it is let.

    ``rounds`` are the ids of the requests that got tokens, step by step.
    """

    def __init__(self, gateway: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(max_running=4)
        self.rounds: list[list[str]] = []
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self._got: list[str] = []
        self._may_step = threading.Semaphore(0)
        self._publisher = TokenPublisher(gateway.redis)
        self._runner = RequestRunner(
            self._publisher,
            WakeRecord("w1", "5ca1ab1e", Tier.HOST_RAM, {}),
            lambda request_id: request_id in self._claiming.aborting_tasks,
        )
        self._claiming = ClaimingWorker(
            gateway.redis, model=MODEL, worker_id="w1", handler=self._runner.run, room=8, idle_poll_s=0.05
        )
        run_round, submit, cancel = self.engine.run_round, self.engine.submit, self.engine.cancel

        def run_when_let(mail: Mail) -> None:
            self._may_step.acquire()
            run_round(mail)
            self.rounds.append(self._got)
            self._got = []

        def note_submit(request: AnyRequest) -> None:
            submit(request)
            self.submitted.append(request.request_id)

        def note_cancel(request_id: str) -> None:
            cancel(request_id)
            self.cancelled.append(request_id)

        monkeypatch.setattr(self.engine, "run_round", run_when_let)
        monkeypatch.setattr(self.engine, "submit", note_submit)
        monkeypatch.setattr(self.engine, "cancel", note_cancel)
        self._runner.attach(self.engine)

    def _on_steps(self, steps: list[RequestStep]) -> None:
        self._got += [step.request_id for step in steps if step.events]
        self._runner.on_steps(steps)

    async def step(self, times: int = 1) -> None:
        """Let the engine take so many steps, and wait for them."""
        target = len(self.rounds) + times
        self._may_step.release(times)
        await eventually(lambda: len(self.rounds) >= target, what=f"step {target}")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[SteppedWorker]:
        thread = threading.Thread(target=self.engine.run, name="engine")
        thread.start()
        serving = asyncio.create_task(self._claiming.serve())
        try:
            yield self
        finally:
            self.engine.stop()
            self._may_step.release(1000)
            await self._claiming.aclose()
            await serving
            await self._runner.aclose()
            await self._publisher.aclose()
            await asyncio.to_thread(thread.join)


async def begin_stream(gateway: GatewayHarness) -> tuple[aiohttp.ClientResponse, str]:
    """A streamed completion of some hundred tokens, and its request id."""
    body: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 400, "temperature": 0, "stream": True}
    response = await gateway.client.post(f"{gateway.url}/v1/completions", json={**body, "ignore_eos": True})
    assert response.status == 200, await response.text()
    return response, response.headers["X-Request-Id"]


async def test_a_client_that_goes_away_is_out_of_the_batch_with_the_next_step(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two streams, one client hangs up in mid-stream: the step under way may still serve it, the next one does not, and
    its blocks are free then; the other stream gets a token in each."""
    async with run_gateway(redis_url, tmp_path) as gateway:
        gateway.worker.is_away = True
        await gateway.publish(make_card(), status=make_status(Tier.HOT, state="ready"))
        async with SteppedWorker(gateway, monkeypatch).running() as worker:
            leaving, left = await begin_stream(gateway)
            staying, stays = await begin_stream(gateway)
            await eventually(lambda: {left, stays} == set(worker.submitted), what="both requests at the engine")
            while not {left, stays} <= set(worker.rounds[-1] if worker.rounds else ()):
                assert len(worker.rounds) < 8
                await worker.step()
            used_bytes = worker.engine.statistics().kv_used_bytes
            assert worker.engine.statistics().num_running == 2
            leaving.close()  # the connection, in mid-stream
            await eventually(lambda: worker.cancelled == [left], what="word of it at the engine")
            at_cancel = worker.engine.statistics().num_steps
            await worker.step()  # this one had begun: its mail was collected before
            await worker.step()
            statistics = worker.engine.statistics()
            assert statistics.num_steps == at_cancel + 2
            assert worker.rounds[-1] == [stays]
            assert statistics.num_running == 1
            assert statistics.kv_used_bytes == used_bytes // 2
            assert worker.rounds[-2] in ([left, stays], [stays, left], [stays])
            staying.close()
