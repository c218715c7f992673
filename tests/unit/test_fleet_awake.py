"""Worker-seconds: what a model cost, and what it would have cost always on."""

from __future__ import annotations

from scheduler.config import SchedulerConfig
from scheduler.contract.messages import ModelCard, WorkerChanged
from scheduler.contract.states import SlotState
from scheduler.fleet import Fleet


def test_awake_seconds_count_each_worker_from_its_order_to_its_end() -> None:
    """Two workers side by side count twice; time asleep counts only as known."""
    fleet = Fleet(SchedulerConfig())
    fleet.on_cards([ModelCard("m")], 100.0)
    fleet.on_ordered("a", "m", "n", 110.0)
    fleet.on_ordered("b", "m", "n", 115.0)
    fleet.on_worker_changed(WorkerChanged("n", "a", "m", SlotState.COLD, exited=True), 120.0)
    fleet.on_worker_changed(WorkerChanged("n", "b", "m", SlotState.COLD, exited=True), 130.0)
    (status,) = fleet.statuses([], 200.0)
    assert status.awake_s == (120 - 110) + (130 - 115)
    assert status.known_s == 100.0


def test_reading_the_status_often_changes_nothing() -> None:
    """The sum does not depend on how often it is read."""
    fleet = Fleet(SchedulerConfig())
    fleet.on_cards([ModelCard("m")], 0.0)
    fleet.on_ordered("a", "m", "n", 0.0)
    seen = [fleet.statuses([], second / 4)[0].awake_s for second in range(41)]
    assert seen[-1] == 10.0
    assert seen == sorted(seen)
