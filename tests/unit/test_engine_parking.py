"""An idle model is parked and comes back: on the emulated GPU, and not at all on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import structlog
from llama_programs import TINY, random_plan

from scheduler.autoscaler import Drain, FleetView, ModelView, WorkerView, decide
from scheduler.config import ModelPolicy
from scheduler.contract.states import ParkPolicy, SlotState, Tier
from worker.backends.cuda.device import OutOfDeviceMemory
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import BackendError, BackendFull, BackendLost
from worker.engine.mailbox import Mailbox
from worker.engine.parking import IdleParking

AFTER_S = 0.02


class FakeModel:
    """Records what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.parkings: list[tuple[bool, bool]] = []  # keeps KV, locks the source

    def park(self, *, keeps_kv: bool = False, locks_source: bool = True) -> None:
        self.calls.append("park")
        self.parkings.append((keeps_kv, locks_source))

    def unpark(self) -> None:
        self.calls.append("unpark")

    def watch_kv(self, on_dropped: Callable[[], None]) -> None:
        pass

    def read_free_bytes(self) -> int:
        return 1000 + len(self.calls)


class FakeRelease:
    """Records likewise, and fails as it is told."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.errors: list[Exception] = []

    def suspend(self) -> None:
        self._call("suspend")

    def resume(self) -> None:
        self._call("resume")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.errors:
            raise self.errors.pop(0)


def test_idle_model_is_parked_and_returns_with_the_next_request() -> None:
    """After the idle time it parks once; a request brings it back before it is handed on."""
    model, mailbox, heard = FakeModel(), Mailbox(), []

    def on_moved(tier: Tier) -> None:
        heard.append(tier)
        if tier is Tier.PARKED:
            request: Any = object()
            mailbox.submit(request)

    parking = IdleParking(model, AFTER_S, on_moved)  # type: ignore[arg-type]
    assert len(parking.wait_collect(mailbox).requests) == 1
    assert (model.calls, heard) == (["park", "unpark"], [Tier.PARKED, Tier.HOT])


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
    parking = IdleParking(model, AFTER_S, lambda tier: mailbox.stop())  # type: ignore[arg-type]
    assert parking.wait_collect(mailbox).stop
    assert model.calls == ["park"]


def test_a_model_is_parked_and_fetched_when_asked_to_be() -> None:
    """Without any idle time; a wish to park that comes while it works is kept until it is idle."""
    model, mailbox, heard = FakeModel(), Mailbox(), []

    def on_moved(tier: Tier) -> None:
        heard.append(tier)
        if tier is Tier.PARKED:
            parking.ask(False)

    parking = IdleParking(model, 0.0, on_moved)  # type: ignore[arg-type]
    parking.ask(True)
    assert parking.wait_collect(mailbox).is_empty
    assert (model.calls, heard) == (["park", "unpark"], [Tier.PARKED, Tier.HOT])


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
    parking = IdleParking(model, AFTER_S, lambda tier: mailbox.submit(request) if tier is Tier.PARKED else None)  # type: ignore[arg-type]
    mail = parking.wait_collect(mailbox)
    assert (mail.requests, mail.cancelled) == ([request], ["late"])
    assert model.calls == ["park"] + ["unpark"] * 4


def test_a_device_that_stays_full_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a request the worker gives up, so that another is placed; with a mere wish the model stays parked."""
    monkeypatch.setattr("worker.engine.parking.RETURN_LIMIT_S", 0.0)
    mailbox = Mailbox()
    model = CrowdedModel(99, mailbox)
    parking = IdleParking(model, 0.0, lambda tier: parking.ask(False))  # type: ignore[arg-type]
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

    def on_moved(_tier: Tier) -> None:
        request: Any = object()
        mailbox.submit(request)

    parking = IdleParking(model, AFTER_S, on_moved)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("policy", "parking_of"), [(ParkPolicy.KEEP, (True, True)), (ParkPolicy.DROP, (False, True)), (None, (False, True))]
)
def test_the_policy_says_what_leaves_and_the_log_what_came_free(
    policy: ParkPolicy | None, parking_of: tuple[bool, bool]
) -> None:
    """KV blocks are dropped unless they are to be kept. A line tells the device's free memory then, and the gain."""
    model, mailbox = FakeModel(), Mailbox()
    arguments = () if policy is None else (policy,)
    parking = IdleParking(model, 0.0, lambda tier: mailbox.stop(), *arguments)  # type: ignore[arg-type]
    parking.ask(True)
    with structlog.testing.capture_logs() as logs:
        assert parking.wait_collect(mailbox).stop
    assert model.parkings == [parking_of]
    (line,) = logs
    assert (line["event"], line["tier"], line["freed_bytes"], line["device_free_bytes"]) == (
        "model_parked",
        "T3",
        1,
        1001,
    )
    assert line["kv"] == ("kept" if policy is ParkPolicy.KEEP else "dropped")


def released(model: FakeModel, mailbox: Mailbox, *errors: Exception) -> tuple[IdleParking, FakeRelease, list[Tier]]:
    """A parking that releases, where the first calls of the driver end as given."""
    heard: list[Tier] = []
    release = FakeRelease(model.calls)
    release.errors += errors

    def on_moved(tier: Tier) -> None:
        heard.append(tier)
        if tier is not Tier.HOT and len(heard) == 1:
            request: Any = object()
            mailbox.submit(request)

    parking = IdleParking(model, AFTER_S, on_moved, ParkPolicy.RELEASE, release)  # type: ignore[arg-type]
    return parking, release, heard


def test_a_released_process_is_fetched_before_its_weights() -> None:
    """Parked first, so that the driver stores no weights; nothing is left page-locked for it to lock anew."""
    model, mailbox = FakeModel(), Mailbox()
    parking, _, heard = released(model, mailbox)
    assert len(parking.wait_collect(mailbox).requests) == 1
    assert (model.calls, model.parkings) == (["park", "suspend", "resume", "unpark"], [(False, False)])
    assert heard == [Tier.RELEASED, Tier.PARKED, Tier.HOT]


def test_what_the_driver_refuses_is_parked_and_after_three_times_not_asked_again() -> None:
    """The source is page-locked then, as for any parked model."""
    model, mailbox = FakeModel(), Mailbox()
    refusal = BackendError("cuCheckpointProcessCheckpoint: CUDA error 801")
    parking, _, heard = released(model, mailbox, refusal, refusal, refusal)
    request: Any = object()
    for _ in range(4):
        assert parking.wait_collect(mailbox).requests
        mailbox.cancel("r")
        assert parking.wait_collect(mailbox).cancelled
        threading.Timer(10 * AFTER_S, mailbox.submit, (request,)).start()
    assert model.calls.count("suspend") == 3
    assert model.parkings == [(False, False), (False, True)] * 3 + [(False, True)]
    assert heard == [Tier.PARKED, Tier.HOT] * 4


def test_a_full_device_is_waited_for_on_both_ways_back() -> None:
    """The driver's and the weights'; what is back already is not fetched twice."""
    mailbox = Mailbox()
    model = CrowdedModel(1, mailbox)
    parking, release, heard = released(model, mailbox)
    release.errors += []
    suspend = release.suspend

    def suspend_then_crowd() -> None:
        suspend()
        release.errors += [OutOfDeviceMemory("no room")]

    release.suspend = suspend_then_crowd  # type: ignore[method-assign]
    assert parking.wait_collect(mailbox).requests
    assert [call for call in model.calls if call != "unpark"] == ["park", "suspend", "resume", "resume"]
    assert heard == [Tier.RELEASED, Tier.PARKED, Tier.HOT]


@pytest.mark.parametrize("at", ["suspend", "resume"])
def test_a_device_that_nobody_knows_ends_the_engine(at: str) -> None:
    """A driver that hangs, on the way out or back."""
    model, mailbox = FakeModel(), Mailbox()
    parking, release, _ = released(model, mailbox, *([BackendLost("hangs")] if at == "suspend" else []))
    if at == "resume":
        original = release.suspend

        def suspend() -> None:
            original()
            release.errors.append(BackendLost("hangs"))

        release.suspend = suspend  # type: ignore[method-assign]
    with pytest.raises(BackendLost):
        parking.wait_collect(mailbox)


def test_a_request_whose_grammar_is_compiled_keeps_the_model_where_it_is() -> None:
    """The engine waits for mail then, but it is not idle; asked to park, it does so afterwards."""
    model, mailbox = FakeModel(), Mailbox()
    pending = [True]
    parking = IdleParking(model, AFTER_S, lambda tier: mailbox.stop())  # type: ignore[arg-type]
    parking.attach(lambda: pending[0])
    threading.Timer(5 * AFTER_S, mailbox.wake).start()
    assert parking.wait_collect(mailbox).is_empty
    parking.ask(True)
    assert parking.wait_collect(mailbox).is_empty
    assert model.calls == []
    pending[0] = False
    assert parking.wait_collect(mailbox).stop
    assert model.calls == ["park"]
