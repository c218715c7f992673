"""Workers that die in a row: when the next one starts, what requests are told, and how it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.autoscaler import FleetView, ModelView, NodeView, RefuseQueue, Spawn, WorkerView, decide
from scheduler.config import ModelPolicy, SchedulerConfig
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import ModelCard, NodeReport, WorkerChanged
from scheduler.contract.states import SlotState
from scheduler.crash_streak import MAX_DELAY_S, REFUSED_FROM, STEADY_S, compute_delay_s
from scheduler.fleet import Fleet

DIED = ErrorInfo(ErrorCode.WORKER_FAILED, "worker w of model 'm' was killed by signal SIGSEGV")
ASLEEP = ModelView("m", ModelPolicy(max_running=4, max_workers=2), weights_bytes=1, in_flight=1, last_active_s=0.0)
NODES = (NodeView("n1", 2**40),)


class Life:
    """A fleet of one model, whose clock the test moves."""

    def __init__(self) -> None:
        self.fleet = Fleet(SchedulerConfig(), draw_jitter=lambda: 0.5)
        self.fleet.on_cards([ModelCard("m", weights_bytes=1)], now_s=0.0)
        self.fleet.on_nodes([NodeReport("n1", 1, 0.0, 2**40, 2**40, {})])
        self.fleet.on_demand("m", 0.0)
        self.now_s = 100.0
        self.workers = 0

    def live(self, seconds: float) -> None:
        """A worker is ordered, becomes ready, and lives so long."""
        self.workers += 1
        self.fleet.on_ordered(f"w{self.workers}", "m", "n1", self.now_s)
        self.fleet.on_worker_changed(WorkerChanged("n1", f"w{self.workers}", "m", SlotState.READY), self.now_s)
        self.now_s += seconds

    def die(self, *, had_requests: bool = True) -> float:
        """It dies; seconds until the next one may start."""
        change = WorkerChanged("n1", f"w{self.workers}", "m", SlotState.FAILED, True, DIED, had_requests)
        self.fleet.on_worker_changed(change, self.now_s)
        return max(0.0, self.fleet.crash_streak("m")[1] - self.now_s)

    def decide(self) -> list[object]:
        return list(decide(self.fleet.view(), self.now_s))


@pytest.mark.parametrize(("jitter", "factor"), [(0.0, 0.5), (0.5, 1.0), (0.999, 1.499)])
def test_the_wait_doubles_up_to_its_bound(jitter: float, factor: float) -> None:
    """Two deaths cost nothing; then half a second, doubled each time, never more than the bound; jitter spreads it."""
    waits = [compute_delay_s(deaths, jitter) for deaths in range(1, 10)]
    assert waits == pytest.approx([factor * s for s in (0, 0, 0.5, 1, 2, 4, 8, 16, MAX_DELAY_S)])
    assert compute_delay_s(1_000_000, jitter) == pytest.approx(factor * MAX_DELAY_S)


def test_a_model_whose_workers_die_is_not_started_again_and_again() -> None:
    """The first two deaths are followed at once, the third after a wait, and the queue waits with it."""
    life = Life()
    for _ in range(2):
        life.live(0.1)
        assert life.die() == 0
        assert life.decide() == [Spawn("m", "n1")]
    life.live(0.1)
    assert life.die() == pytest.approx(0.5)
    assert life.decide() == []
    assert "3 workers in a row died" in str(life.fleet.statuses([], life.now_s)[0].error)
    life.now_s += 0.6
    assert life.decide() == [Spawn("m", "n1")]


def test_a_hopeless_model_refuses_its_queue_until_the_next_try() -> None:
    """From the limit on requests are told why and when to come back; then one more worker is tried."""
    life = Life()
    for _ in range(REFUSED_FROM):
        life.live(0.1)
        wait_s = life.die()
    (refusal,) = life.decide()
    assert isinstance(refusal, RefuseQueue)
    assert refusal.error.code is ErrorCode.WAKE_FAILED
    assert refusal.error.retry_after_s == wait_s == MAX_DELAY_S
    for words in ("held back", f"{REFUSED_FROM} of its workers", "SIGSEGV", "glowplug logs", "in 30 s"):
        assert words in refusal.error.message
    life.now_s += MAX_DELAY_S
    assert life.decide() == [Spawn("m", "n1")]


def test_a_worker_that_stays_up_ends_the_count() -> None:
    """Told once; the next death is a first one again. One that dies later than that is a first one too."""
    life = Life()
    for _ in range(5):
        life.live(0.1)
        life.die()
    life.live(STEADY_S - 1)
    assert life.fleet.take_recovered(life.now_s) == []
    life.now_s += 1
    assert life.fleet.take_recovered(life.now_s) == ["m"]
    assert life.fleet.take_recovered(life.now_s) == []
    assert life.fleet.statuses([], life.now_s)[0].error is None
    assert life.die() == 0
    for _ in range(5):
        life.live(STEADY_S)
        assert life.die() == 0


def test_an_operator_or_a_new_snapshot_ends_the_wait() -> None:
    """A wake that is asked for, or another card, is tried at once."""
    for forgive in (
        lambda fleet: fleet.on_wake_asked("m", 0.0),
        lambda fleet: fleet.on_cards([ModelCard("m", snapshot_id="new", weights_bytes=1)], 0.0),
    ):
        life = Life()
        for _ in range(6):
            life.live(0.1)
            life.die()
        assert life.decide() == []
        forgive(life.fleet)
        assert life.decide() == [Spawn("m", "n1")]


def test_deaths_of_idle_workers_and_failed_wakes_do_not_count() -> None:
    """They have a count of their own."""
    life = Life()
    for _ in range(6):
        life.live(0.1)
        assert life.die(had_requests=False) == 0
    assert life.fleet.crash_streak("m") == (0, 0.0)


def test_a_second_worker_is_not_added_while_the_first_ones_die() -> None:
    """A queue longer than the batches of the worker that lives is no reason to start another before its time."""
    ready = WorkerView("w1", "n1", "m", SlotState.READY, 0.0)
    model = replace(ASLEEP, in_flight=50, workers=(ready,), retry_at_s=10.0, deaths=REFUSED_FROM)
    assert decide(FleetView((model,), NODES), 9.0) == []
    assert decide(FleetView((model,), NODES), 10.0) == [Spawn("m", "n1")]
