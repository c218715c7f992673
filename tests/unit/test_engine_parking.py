"""An idle model is parked and comes back: on the emulated GPU, and not at all on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
from llama_programs import TINY, random_plan

from scheduler.autoscaler import Drain, FleetView, ModelView, WorkerView, decide
from scheduler.config import ModelPolicy
from scheduler.contract.states import SlotState
from worker.backends.numpy_reference import NumpyBackend
from worker.engine.mailbox import Mailbox
from worker.engine.parking import IdleParking

AFTER_S = 0.02


class FakeModel:
    """Records what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def park(self, *, keeps_kv: bool = False) -> None:
        self.calls.append("park")

    def unpark(self) -> None:
        self.calls.append("unpark")


def test_idle_model_is_parked_and_returns_with_the_next_request() -> None:
    """After the idle time it parks once; a request brings it back before it is handed on."""
    model, mailbox, heard = FakeModel(), Mailbox(), []

    def on_parked(is_parked: bool) -> None:
        heard.append(is_parked)
        if is_parked:
            request: Any = object()
            mailbox.submit(request)

    parking = IdleParking(model, AFTER_S, on_parked)  # type: ignore[arg-type]
    assert len(parking.wait_collect(mailbox).requests) == 1
    assert (model.calls, heard) == (["park", "unpark"], [True, False])


def test_mail_before_the_idle_time_parks_nothing() -> None:
    """Requests, cancellations and stops that come in time are handed on at once."""
    model, mailbox = FakeModel(), Mailbox()
    parking = IdleParking(model, 60.0, lambda _: None)  # type: ignore[arg-type]
    mailbox.cancel("r")
    assert parking.wait_collect(mailbox).cancelled == ["r"]
    mailbox.wake()
    assert parking.wait_collect(mailbox).is_empty
    assert model.calls == []


def test_parked_model_is_not_fetched_to_be_stopped() -> None:
    """A stop, which needs no weights, leaves it parked."""
    model, mailbox = FakeModel(), Mailbox()
    parking = IdleParking(model, AFTER_S, lambda is_parked: mailbox.stop())  # type: ignore[arg-type]
    assert parking.wait_collect(mailbox).stop
    assert model.calls == ["park"]


@pytest.mark.parametrize("after_s", [0.0, AFTER_S])
def test_models_that_cannot_park_wait_for_mail_only(after_s: float) -> None:
    """A CPU backend's model, or a policy of 0, skips the state."""
    bound = NumpyBackend().bind(random_plan(TINY)) if after_s else FakeModel()
    mailbox = Mailbox()
    mailbox.stop()
    parking = IdleParking(bound, after_s, lambda _: pytest.fail("parked"))  # type: ignore[arg-type]
    assert parking.wait_collect(mailbox).stop


def test_parked_worker_counts_as_one_that_serves() -> None:
    """Demand for a parked model spawns no second worker, and the idle limit drains it like a hot one."""
    worker = WorkerView("w", "node", "m", SlotState.PARKED, 0.0)
    policy = ModelPolicy(idle_timeout_s=10)
    model = ModelView("m", policy, 100, in_flight=1, last_active_s=0.0, workers=(worker,))
    assert decide(FleetView((model,), ()), 5.0) == []
    idle = ModelView("m", policy, 100, in_flight=0, last_active_s=0.0, workers=(worker,))
    assert decide(FleetView((idle,), ()), 11.0) == [Drain(worker, "idle")]
