"""The scheduler's decisions, by table: no clock, no I/O."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.autoscaler import (
    FAILURE_MEMORY_S,
    MAX_FAILURES,
    SPAWN_TIMEOUT_S,
    WORKER_BASE_BYTES,
    Drain,
    FleetView,
    GiveUp,
    ModelView,
    NodeView,
    RefuseQueue,
    Spawn,
    WorkerView,
    decide,
    decide_idle_deadline_s,
)
from scheduler.config import ModelPolicy
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.states import SlotState

GIB = 2**30
POLICY = ModelPolicy(idle_timeout_s=10.0, max_workers=2, max_running=4, kv_budget_bytes=GIB)
ASLEEP = ModelView("m", POLICY, weights_bytes=GIB, in_flight=0, last_active_s=0.0)
NODE = NodeView("n1", 16 * GIB)


def worker(state: SlotState, worker_id: str = "w1", model: str = "m", node_id: str = "n1") -> WorkerView:
    return WorkerView(worker_id, node_id, model, state, ordered_at_s=0.0)


def fleet(*models: ModelView, nodes: tuple[NodeView, ...] = (NODE,)) -> FleetView:
    return FleetView(models, nodes)


def test_a_model_without_demand_stays_asleep() -> None:
    """No demand, no worker, no action."""
    assert decide(fleet(ASLEEP), now_s=1000.0) == []


@pytest.mark.parametrize("in_flight", [1, 100])
def test_demand_for_a_sleeping_model_spawns_one_worker(in_flight: int) -> None:
    """One request or a hundred: one worker is started."""
    assert decide(fleet(replace(ASLEEP, in_flight=in_flight)), now_s=1.0) == [Spawn("m", "n1")]


@pytest.mark.parametrize("state", [SlotState.COLD, SlotState.RESTORING])
def test_a_wake_is_single_flight(state: SlotState) -> None:
    """While a worker is on its way, further demand starts nothing."""
    assert decide(fleet(replace(ASLEEP, in_flight=100, workers=(worker(state),))), now_s=1.0) == []


def test_a_draining_worker_does_not_count() -> None:
    """Demand that arrives while the only worker drains starts a new one."""
    model = replace(ASLEEP, in_flight=1, workers=(worker(SlotState.DRAINING),))
    assert decide(fleet(model), now_s=1.0) == [Spawn("m", "n1")]


def test_a_queue_longer_than_all_batches_adds_a_worker_up_to_the_limit() -> None:
    """Five requests over a batch of four add a second worker; a third is never added with max_workers two."""
    one = replace(ASLEEP, in_flight=5, workers=(worker(SlotState.READY),))
    assert decide(fleet(one), now_s=1.0) == [Spawn("m", "n1")]
    two = replace(one, in_flight=50, workers=(worker(SlotState.READY), worker(SlotState.READY, "w2")))
    assert decide(fleet(two), now_s=1.0) == []


def test_an_idle_model_is_drained_only_after_its_timeout() -> None:
    """The timer counts from the last activity and drains every ready worker."""
    model = replace(ASLEEP, last_active_s=100.0, workers=(worker(SlotState.READY),))
    assert decide(fleet(model), now_s=109.9) == []
    assert decide(fleet(model), now_s=110.0) == [Drain(worker(SlotState.READY), "idle")]
    assert decide_idle_deadline_s(fleet(model)) == 110.0


def test_requests_in_flight_keep_a_model_awake() -> None:
    """A request that runs longer than the idle timeout is not interrupted."""
    model = replace(ASLEEP, in_flight=1, workers=(worker(SlotState.READY),))
    assert decide(fleet(model), now_s=10_000.0) == []
    assert decide_idle_deadline_s(fleet(model)) is None


def test_a_refused_snapshot_refuses_its_queue() -> None:
    """Requests that slipped in before the refusal end with its error."""
    error = ErrorInfo(ErrorCode.SNAPSHOT_CORRUPT, "chunk 3")
    assert decide(fleet(replace(ASLEEP, in_flight=1, refused=error)), now_s=1.0) == [RefuseQueue("m", error)]


def test_a_failed_wake_is_tried_again_after_a_back_off() -> None:
    """The first failure waits 0.2 s."""
    model = replace(ASLEEP, in_flight=1, failures=1, last_failure_s=5.0)
    assert decide(fleet(model), now_s=5.1) == []
    assert decide(fleet(model), now_s=5.3) == [Spawn("m", "n1")]


def test_a_model_that_keeps_failing_refuses_its_queue_then_recovers() -> None:
    """After MAX_FAILURES the queue is told why; later the model may be tried afresh."""
    cause = ErrorInfo(ErrorCode.WORKER_FAILED, "exit status 11")
    model = replace(ASLEEP, in_flight=1, failures=MAX_FAILURES, last_failure_s=5.0, last_error=cause)
    (action,) = decide(fleet(model), now_s=6.0)
    assert isinstance(action, RefuseQueue)
    assert action.error.code is ErrorCode.WAKE_FAILED
    assert "exit status 11" in action.error.message
    assert decide(fleet(model), now_s=5.0 + FAILURE_MEMORY_S + 1) == [Spawn("m", "n1")]


def test_a_model_that_can_never_fit_is_refused_with_both_numbers() -> None:
    """The message names what is needed and what the largest node has."""
    (action,) = decide(fleet(replace(ASLEEP, in_flight=1), nodes=(NodeView("n1", GIB),)), now_s=1.0)
    assert isinstance(action, RefuseQueue)
    assert action.error.code is ErrorCode.OUT_OF_MEMORY
    assert str(2 * GIB + WORKER_BASE_BYTES) in action.error.message
    assert str(GIB) in action.error.message


def test_room_is_made_by_draining_the_model_idle_longest() -> None:
    """A model that does not fit beside idle ones drains the least recently used, and waits."""
    node = NodeView("n1", 5 * GIB)
    old = replace(ASLEEP, name="old", last_active_s=1.0, workers=(worker(SlotState.READY, "w-old", "old"),))
    new = replace(ASLEEP, name="new", last_active_s=2.0, workers=(worker(SlotState.READY, "w-new", "new"),))
    wanted = replace(ASLEEP, in_flight=1)
    assert decide(fleet(wanted, old, new, nodes=(node,)), now_s=3.0) == [
        Drain(old.workers[0], "room for another model")
    ]


def test_a_busy_machine_lets_the_request_wait() -> None:
    """Nothing idle to drain: no action, the request stays queued."""
    busy = replace(ASLEEP, name="busy", in_flight=1, workers=(worker(SlotState.READY, "w2", "busy"),))
    assert decide(fleet(replace(ASLEEP, in_flight=1), busy, nodes=(NodeView("n1", 3 * GIB),)), now_s=1.0) == []


def test_the_node_that_holds_the_weights_is_preferred() -> None:
    """A second worker goes where the sealed weights already are."""
    model = replace(ASLEEP, in_flight=9, workers=(worker(SlotState.READY, node_id="n1"),))
    nodes = (NodeView("n1", 8 * GIB), NodeView("n2", 16 * GIB))
    assert decide(fleet(model, nodes=nodes), now_s=1.0) == [Spawn("m", "n1")]


def test_without_nodes_the_request_waits() -> None:
    """An agent may be starting; nothing is refused."""
    assert decide(fleet(replace(ASLEEP, in_flight=1), nodes=()), now_s=1.0) == []


def test_a_worker_that_never_becomes_ready_is_given_up() -> None:
    """After SPAWN_TIMEOUT_S it is treated as failed."""
    stuck = worker(SlotState.COLD)
    assert decide(fleet(replace(ASLEEP, workers=(stuck,))), now_s=SPAWN_TIMEOUT_S + 1) == [GiveUp(stuck)]
