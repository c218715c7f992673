"""The scheduler's picture of the fleet as events come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.config import SchedulerConfig, load_config
from scheduler.contract.environment import SettingsError
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import ModelCard, NodeReport, WorkerChanged
from scheduler.contract.states import SlotState, Tier
from scheduler.fleet import Fleet


def make_fleet() -> Fleet:
    """One model, one node."""
    fleet = Fleet(SchedulerConfig())
    fleet.on_cards([ModelCard("m", weights_bytes=100)], now_s=0.0)
    fleet.on_nodes([NodeReport("n1", 1, 0.0, 10**9, 10**9, {"m": 100})])
    return fleet


def changed(state: SlotState, *, exited: bool = False, error: ErrorInfo | None = None) -> WorkerChanged:
    return WorkerChanged("n1", "w1", "m", state, exited, error)


def test_a_worker_is_counted_from_its_order_to_its_exit() -> None:
    """Ordered, restoring, ready, draining, gone."""
    fleet = make_fleet()
    fleet.on_ordered("w1", "m", "n1", 1.0)
    assert [w.state for w in fleet.view().models[0].workers] == [SlotState.COLD]
    fleet.on_worker_changed(changed(SlotState.READY), 2.0)
    assert fleet.statuses([], 3.0)[0].tier is Tier.HOT
    fleet.on_draining("w1", "m")
    fleet.on_worker_changed(changed(SlotState.READY), 3.0)  # a late message does not undo the drain
    assert [w.state for w in fleet.view().models[0].workers] == [SlotState.DRAINING]
    fleet.on_worker_changed(changed(SlotState.COLD, exited=True), 4.0)
    assert fleet.view().models[0].workers == ()
    assert fleet.statuses([], 5.0)[0].tier is Tier.HOST_RAM


def test_failures_are_counted_once_a_worker_and_reset_by_success() -> None:
    """A worker that reports its failure and then exits counts once."""
    fleet = make_fleet()
    error = ErrorInfo(ErrorCode.WORKER_FAILED, "boom")
    fleet.on_ordered("w1", "m", "n1", 1.0)
    fleet.on_worker_changed(changed(SlotState.FAILED, error=error), 2.0)
    fleet.on_worker_changed(changed(SlotState.FAILED, exited=True, error=error), 2.1)
    assert fleet.view().models[0].failures == 1
    fleet.on_worker_changed(changed(SlotState.READY), 3.0)
    assert fleet.view().models[0].failures == 0


def test_demand_and_queue_length_feed_the_idle_timer() -> None:
    """The last activity moves while requests are in flight, and once when the last one ends."""
    fleet = make_fleet()
    assert fleet.on_demand("m", 5.0)
    assert not fleet.on_demand("unknown", 5.0)
    fleet.on_in_flight("m", 1, 6.0)
    fleet.on_in_flight("m", 0, 7.0)
    fleet.on_in_flight("m", 0, 8.0)
    assert fleet.view().models[0].last_active_s == 7.0
    assert fleet.view().models[0].in_flight == 0


def test_workers_of_a_lost_node_are_forgotten() -> None:
    """Their requests can then wake a worker elsewhere."""
    fleet = make_fleet()
    fleet.on_ordered("w1", "m", "n1", 1.0)
    fleet.on_nodes([])
    assert fleet.forget_workers_of_lost_nodes() == ["w1"]
    assert fleet.view().models[0].workers == ()


def test_config_overrides_and_its_errors_name_the_field(tmp_path: Path) -> None:
    """Per-model settings lie over the defaults; a misspelt or wrong field is named with a remedy."""
    path = tmp_path / "glowplug.yaml"
    path.write_text("defaults: {idle_timeout_s: 60}\nmodels: {m: {max_workers: 3}}\n")
    config = load_config(path, env={"GLOWPLUG_IDLE_TIMEOUT_S": "7"})
    assert config.policy_of("m").max_workers == 3
    assert config.policy_of("m").idle_timeout_s == 7
    path.write_text("defaults: {idle_timout_s: 60}\n")
    with pytest.raises(SettingsError, match="did you mean idle_timeout_s"):
        load_config(path, env={})
    path.write_text("defaults: {max_workers: -1}\n")
    with pytest.raises(SettingsError, match=r"defaults\.max_workers: -1: expected a positive number"):
        load_config(path, env={})
    path.write_text("models: {m: {max_workers: many}}\n")
    with pytest.raises(SettingsError, match=r"yaml:1: models\.m\.max_workers: 'many': expected a whole number"):
        load_config(path, env={})
    with pytest.raises(SettingsError, match="GLOWPLUG_MAX_WORKERS"):
        load_config(None, env={"GLOWPLUG_MAX_WORKERS": "no"})
