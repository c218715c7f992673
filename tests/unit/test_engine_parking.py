"""An idle model is parked and comes back: on the emulated GPU, and not at all on a CPU."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from llama_programs import TINY, random_plan

from scheduler.autoscaler import Drain, FleetView, ModelView, WorkerView, decide
from scheduler.config import ModelPolicy
from scheduler.contract.states import SlotState
from worker.backends.cuda.device import OutOfDeviceMemory
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import BackendFull
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


def test_a_model_is_parked_and_fetched_when_asked_to_be() -> None:
    """Without any idle time; a wish to park that comes while it works is kept until it is idle."""
    model, mailbox, heard = FakeModel(), Mailbox(), []

    def on_parked(is_parked: bool) -> None:
        heard.append(is_parked)
        if is_parked:
            parking.ask(False)

    parking = IdleParking(model, 0.0, on_parked)  # type: ignore[arg-type]
    parking.ask(True)
    assert parking.wait_collect(mailbox).is_empty
    assert (model.calls, heard) == (["park", "unpark"], [True, False])


class CrowdedModel(FakeModel):
    """Its device is full for the first ``num_full`` tries."""

    def __init__(self, num_full: int, mailbox: Mailbox) -> None:
        super().__init__()
        self.num_full = num_full
        self.mailbox = mailbox

    def unpark(self) -> None:
        super().unpark()
        if len(self.calls) - 1 == 2:
            self.mailbox.cancel("late")
        if len(self.calls) - 1 <= self.num_full:
            raise OutOfDeviceMemory("no room")


def test_a_full_device_is_waited_for() -> None:
    """A parked model whose room is taken tries again; what arrives meanwhile is not lost."""
    mailbox = Mailbox()
    model = CrowdedModel(3, mailbox)
    request: Any = object()
    parking = IdleParking(model, AFTER_S, lambda is_parked: mailbox.submit(request) if is_parked else None)  # type: ignore[arg-type]
    mail = parking.wait_collect(mailbox)
    assert (mail.requests, mail.cancelled) == ([request], ["late"])
    assert model.calls == ["park"] + ["unpark"] * 4


def test_a_device_that_stays_full_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a request the worker gives up, so that another is placed; with a mere wish the model stays parked."""
    monkeypatch.setattr("worker.engine.parking.RETURN_LIMIT_S", 0.0)
    mailbox = Mailbox()
    model = CrowdedModel(99, mailbox)
    parking = IdleParking(model, 0.0, lambda is_parked: parking.ask(False))  # type: ignore[arg-type]
    parking.ask(True)
    assert parking.wait_collect(mailbox).requests == []
    request: Any = object()
    mailbox.submit(request)
    with pytest.raises(BackendFull):
        parking.wait_collect(mailbox)


def test_a_stop_ends_the_wait_for_room() -> None:
    """A worker that is drained does not wait for memory that it no longer needs."""
    mailbox = Mailbox()
    model = CrowdedModel(99, mailbox)

    def on_parked(_is_parked: bool) -> None:
        request: Any = object()
        mailbox.submit(request)

    parking = IdleParking(model, AFTER_S, on_parked)  # type: ignore[arg-type]
    threading.Timer(0.1, mailbox.stop).start()
    assert parking.wait_collect(mailbox).stop


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
