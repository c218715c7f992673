"""Where the scheduler sends workers on nodes with GPUs, by table: no clock, no I/O, no GPU."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from scheduler.autoscaler import (
    Action,
    Drain,
    FleetView,
    ModelView,
    NodeView,
    RefuseQueue,
    Spawn,
    WorkerView,
    choose_prefetch_node,
    decide,
)
from scheduler.config import ModelPolicy, SchedulerConfig
from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import GpuReport, ModelCard, NodeReport, WorkerChanged, WorkerReport
from scheduler.contract.states import ParkPolicy, SlotState, Task, Tier
from scheduler.fleet import Fleet
from scheduler.gpu_ledger import RETURN_S
from scheduler.gpu_placement import MIN_RESIDENCE_S, OVERHEAD_BYTES, GpuView
from scheduler.model_history import MEMORY_S, ModelHistory

GIB = 2**30
POLICY = ModelPolicy(idle_timeout_s=60.0, max_workers=2, max_running=4, kv_budget_bytes=GIB)
MODEL = ModelView("m", POLICY, weights_bytes=8 * GIB, in_flight=1, last_active_s=0.0)
NEED_BYTES = 9 * GIB + OVERHEAD_BYTES
GPUS = (GpuView("g1", 0, 24 * GIB, 24 * GIB, uuid="GPU-a"), GpuView("g1", 1, 24 * GIB, 20 * GIB, uuid="GPU-b"))
NODE = NodeView("g1", 64 * GIB, gpus=GPUS)
CPU_NODE = NodeView("c1", 64 * GIB)


def fleet(*models: ModelView, nodes: tuple[NodeView, ...] = (NODE,)) -> FleetView:
    return FleetView(models, nodes)


def test_a_worker_is_sent_to_a_named_gpu() -> None:
    """The fullest that fits; the order names it."""
    assert decide(fleet(MODEL), 1.0) == [Spawn("m", "g1", "GPU-b")]


def test_two_wakes_of_one_moment_do_not_count_on_the_same_bytes() -> None:
    """What the first was promised is not there for the second and the third."""
    others = [replace(MODEL, name=name) for name in ("m2", "m3", "m4")]
    found = decide(fleet(MODEL, *others), 1.0)
    assert found == [Spawn("m", "g1", "GPU-b"), Spawn("m2", "g1", "GPU-b"), Spawn("m3", "g1", "GPU-a"),
                     Spawn("m4", "g1", "GPU-a")]  # fmt: skip


def test_what_fits_on_no_gpu_is_refused_or_goes_to_a_cpu() -> None:
    """With both numbers where there are GPUs only; a CPU node takes it if there is one with room."""
    huge = replace(MODEL, weights_bytes=30 * GIB)
    (refusal,) = decide(fleet(huge), 1.0)
    assert isinstance(refusal, RefuseQueue)
    assert refusal.error.code is ErrorCode.OUT_OF_MEMORY
    assert str(24 * GIB) in refusal.error.message
    assert decide(fleet(huge, nodes=(NODE, CPU_NODE)), 1.0) == [Spawn("m", "c1")]


def test_encoders_and_cpu_nodes_are_placed_as_before() -> None:
    """They take host memory and name no device."""
    encoder = replace(MODEL, takes_gpu=False)
    assert decide(fleet(encoder), 1.0) == [Spawn("m", "g1")]
    assert decide(fleet(MODEL, nodes=(CPU_NODE,)), 1.0) == [Spawn("m", "c1")]


def test_a_faulty_gpu_gets_nothing() -> None:
    """All faulty: the queue hears it, with the number of faults."""
    broken = replace(NODE, gpus=tuple(replace(gpu, is_usable=False) for gpu in GPUS))
    half = replace(NODE, gpus=(GPUS[0], replace(GPUS[1], is_usable=False)))
    assert decide(fleet(MODEL, nodes=(half,)), 1.0) == [Spawn("m", "g1", "GPU-a")]
    (refusal,) = decide(fleet(MODEL, nodes=(broken,)), 1.0)
    assert isinstance(refusal, RefuseQueue)
    assert "2 report faults" in refusal.error.message


def test_host_memory_is_still_counted() -> None:
    """Sealed weights and a worker's libraries are in the host's memory; the KV cache is not."""
    tight = replace(NODE, budget_bytes=8 * GIB + 700 * 2**20)
    assert decide(fleet(MODEL, nodes=(tight,)), 1.0) == [Spawn("m", "g1", "GPU-b")]
    assert not any(isinstance(a, Spawn) for a in decide(fleet(MODEL, nodes=(replace(tight, budget_bytes=GIB),)), 1.0))


def test_a_second_worker_takes_free_room_and_sends_nobody_away() -> None:
    """It is a wish, not a need."""
    ready = WorkerView("w1", "g1", "m", SlotState.READY, 0.0, "GPU-b")
    busy = replace(MODEL, in_flight=9, workers=(ready,))
    assert decide(fleet(busy), 1.0) == [Spawn("m", "g1", "GPU-b")]
    full = replace(NODE, gpus=(replace(GPUS[0], free_bytes=0),))
    assert decide(fleet(busy, nodes=(full,)), 1.0) == []


def test_prefetching_goes_to_nodes_with_gpus_too() -> None:
    """Sealed memory is the host's."""
    assert choose_prefetch_node(fleet(MODEL), "m") == "g1"


# --- with the fleet's own books ---------------------------------------------------------------------------------------


def report(free_gib: float, *, at_s: float = 0.0, **fields: object) -> NodeReport:
    gpu = GpuReport(0, "GPU-a", "g", 24 * GIB, int(free_gib * GIB), **fields)  # type: ignore[arg-type]
    return NodeReport("g1", 1, at_s, 64 * GIB, 64 * GIB, {}, backend="cuda", gpus=(gpu,))


def make_fleet(*names: str, park: ParkPolicy = ParkPolicy.DROP) -> Fleet:
    """Models of 12 GiB on a GPU of 24, of which the driver calls 24 free."""
    known = Fleet(SchedulerConfig(defaults=ModelPolicy(kv_budget_bytes=GIB, park=park)))
    known.on_cards([ModelCard(name, weights_bytes=12 * GIB) for name in names], 0.0)
    known.on_nodes([report(24)])
    return known


def act(known: Fleet, now_s: float) -> list[Action]:
    """Decide, and note spawns and drains as the service does."""
    actions = decide(known.view(now_s), now_s)
    for action in actions:
        if isinstance(action, Spawn):
            known.on_ordered(f"w-{action.model}", action.model, action.node_id, now_s, action.device)
        elif isinstance(action, Drain):
            known.on_draining(action.worker.worker_id, action.worker.model)
    return actions


def tell(known: Fleet, name: str, state: SlotState, now_s: float, *, exited: bool = False) -> None:
    known.on_worker_changed(WorkerChanged("g1", f"w-{name}", name, state, exited), now_s)


def test_an_idle_model_leaves_for_another_and_nobody_else_does() -> None:
    """Young residents stay; then one is drained; until its memory shows in the report, nobody further leaves."""
    known = make_fleet("a", "b")
    known.on_demand("a", 1.0)
    assert act(known, 1.0) == [Spawn("a", "g1", "GPU-a")]
    tell(known, "a", SlotState.READY, 2.0)
    known.on_in_flight("a", 0, 2.5)
    known.on_demand("b", 3.0)
    assert act(known, 3.0) == []  # `a` has just come; the driver's report (24 GiB free) is old and not believed
    known.on_nodes([report(10.5)])
    later_s = 2.0 + MIN_RESIDENCE_S + 1
    (drain,) = act(known, later_s)
    assert isinstance(drain, Drain)
    assert (drain.worker.worker_id, drain.reason) == ("w-a", "room on its GPU for b")
    assert act(known, later_s + 0.1) == []
    tell(known, "a", SlotState.COLD, later_s + 0.2, exited=True)
    assert act(known, later_s + 0.3) == []  # the report still says 10.5
    known.on_nodes([report(24)])
    assert act(known, later_s + 0.4) == [Spawn("b", "g1", "GPU-a")]


def test_memory_that_does_not_come_back_is_not_waited_for_for_ever() -> None:
    """Somebody else took it: the next resident leaves, or the request waits; nothing is counted twice."""
    known = make_fleet("a", "b")
    known.on_demand("a", 1.0)
    act(known, 1.0)
    tell(known, "a", SlotState.READY, 2.0)
    known.on_in_flight("a", 0, 2.5)
    known.on_nodes([report(10.5)])
    tell(known, "a", SlotState.COLD, 20.0, exited=True)
    known.on_demand("b", 20.1)
    assert act(known, 20.1) == []
    (gpu,) = known.view(20.1 + RETURN_S).nodes[0].gpus
    assert (gpu.leaving_bytes, gpu.room_bytes) == (0, int(10.5 * GIB))


def test_busy_and_pinned_models_do_not_leave() -> None:
    """The request waits in its queue."""
    for pinned in (False, True):
        known = make_fleet("a", "b")
        known.on_demand("a", 1.0)
        act(known, 1.0)
        tell(known, "a", SlotState.READY, 2.0)
        if pinned:
            known.on_in_flight("a", 0, 2.5)
            known.set_policies(frozenset({"a"}), frozenset())
        known.on_nodes([report(10.5)])
        known.on_demand("b", 30.0)
        assert act(known, 30.0) == []


def test_a_parked_model_gives_room_and_gets_it_back() -> None:
    """Parked, only its context is booked; called back to a full GPU, the idle newcomer leaves for it."""
    known = make_fleet("a", "b")
    known.on_demand("a", 1.0)
    act(known, 1.0)
    tell(known, "a", SlotState.READY, 2.0)
    known.on_in_flight("a", 0, 2.5)
    tell(known, "a", SlotState.PARKED, 5.0)
    known.on_nodes([report(22.5)])
    known.on_demand("b", 6.0)
    assert act(known, 6.0) == [Spawn("b", "g1", "GPU-a")]
    tell(known, "b", SlotState.READY, 7.0)
    known.on_in_flight("b", 0, 7.5)
    known.on_nodes([report(9)])
    known.on_demand("a", 8.0)
    assert act(known, 8.0) == []  # `b` is fresh
    (drain,) = act(known, 7.0 + MIN_RESIDENCE_S + 1)
    assert isinstance(drain, Drain)
    assert drain.worker.worker_id == "w-b"


def test_a_parked_model_that_came_back_stays_as_long_as_a_new_one() -> None:
    """Its residence begins with its return: the other one that wants the GPU has to wait."""
    known = make_fleet("a", "b")
    known.on_demand("a", 1.0)
    act(known, 1.0)
    tell(known, "a", SlotState.READY, 2.0)
    known.on_in_flight("a", 0, 2.5)
    tell(known, "a", SlotState.PARKED, 50.0)
    tell(known, "a", SlotState.READY, 100.0)
    known.on_nodes([report(10.5)])
    known.on_demand("b", 101.0)
    assert act(known, 101.0) == []
    (drain,) = act(known, 100.0 + MIN_RESIDENCE_S + 1)
    assert isinstance(drain, Drain)
    assert drain.worker.worker_id == "w-a"


def test_instances_of_one_gpu_are_devices_of_their_own() -> None:
    """Under one number; a model goes to the one that it fits, and a faulty one gets none."""
    known = make_fleet("a")
    small, large = (
        GpuReport(0, f"MIG-{size}", "Stand-in MIG", size * GIB, size * GIB, instance=size) for size in (10, 20)
    )
    known.on_nodes([msgspec.structs.replace(report(0), gpus=(small, large))])
    known.on_demand("a", 1.0)
    assert act(known, 1.0) == [Spawn("a", "g1", "MIG-20")]
    broken = make_fleet("a")
    fault = "bad rows of its memory wait to be mapped out: reset it"
    broken.on_nodes([msgspec.structs.replace(report(0), gpus=(small, msgspec.structs.replace(large, fault=fault)))])
    broken.on_demand("a", 1.0)
    (refusal,) = act(broken, 1.0)
    assert isinstance(refusal, RefuseQueue)
    assert "1 more report faults" in refusal.error.message
    both = (msgspec.structs.replace(small, fault=fault), msgspec.structs.replace(large, fault=fault))
    broken.on_nodes([msgspec.structs.replace(report(0), gpus=both)])
    broken.on_demand("a", 2.0)
    (refusal,) = act(broken, 2.0)
    assert isinstance(refusal, RefuseQueue)
    assert refusal.error.code is ErrorCode.BACKEND_UNAVAILABLE
    assert "2 report faults" in refusal.error.message


@pytest.mark.parametrize(
    ("park", "state", "held"),
    [
        ("keep", SlotState.PARKED, GIB + OVERHEAD_BYTES),
        ("drop", SlotState.PARKED, OVERHEAD_BYTES),
        ("release", SlotState.PARKED, OVERHEAD_BYTES),
        ("release", SlotState.RELEASED, 0),
    ],
)
def test_what_a_parked_model_holds_is_booked_and_the_rest_is_promised_to_its_return(
    park: str, state: SlotState, held: int
) -> None:
    """By the policy that its worker was started with, whatever the configuration says by now."""
    known = make_fleet("a", park=ParkPolicy(park))
    known.on_demand("a", 1.0)
    act(known, 1.0)
    tell(known, "a", SlotState.READY, 2.0)
    known.on_in_flight("a", 0, 2.5)
    known.set_config(SchedulerConfig(defaults=ModelPolicy(kv_budget_bytes=GIB)))
    tell(known, "a", state, 5.0)
    (gpu,) = known.view(5.0).nodes[0].gpus
    assert ([one.device_bytes for one in gpu.residents], gpu.promised_bytes) == ([held], 0)
    (row,) = known.statuses([], 5.0)
    assert (row.tier, row.state) == (Tier.RELEASED if state is SlotState.RELEASED else Tier.PARKED, state.value)
    known.on_demand("a", 6.0)
    assert act(known, 6.0) == []  # it claims the request and comes back by itself
    (gpu,) = known.view(6.0).nodes[0].gpus
    assert gpu.promised_bytes == 13 * GIB + OVERHEAD_BYTES - held


def test_a_new_leader_learns_devices_from_the_workers_reports() -> None:
    """Until then the driver's count alone protects their memory."""
    known = make_fleet("a")
    tell(known, "a", SlotState.READY, 1.0)
    assert known.view(1.0).nodes[0].gpus[0].residents == ()
    beat = WorkerReport("w-a", "g1", "a", 1, SlotState.READY, 0, 0, 0.0, device="GPU-a")
    known.on_reports([beat], 2.0)
    assert [one.worker_id for one in known.view(2.0).nodes[0].gpus[0].residents] == ["w-a"]


def test_a_warm_spare_is_room_for_one() -> None:
    """The next worker is that process: what it holds already is not missing."""
    known = make_fleet("a")
    known.on_nodes([report(13.0, spare_workers=2, spare_bytes=GIB)])
    known.on_demand("a", 1.0)
    assert act(known, 1.0) == [Spawn("a", "g1", "GPU-a")]


def test_a_node_that_does_not_use_its_gpus_is_a_cpu_node() -> None:
    """GLOWPLUG_BACKEND=numkong on a machine with GPUs; and encoders anywhere take none."""
    known = make_fleet("a")
    known.on_nodes([NodeReport("g1", 1, 0.0, 64 * GIB, 64 * GIB, {}, gpus=report(24).gpus)])
    assert known.view(0.0).nodes[0].gpus == ()
    known.on_cards([ModelCard("e", task=Task.EMBED)], 0.0)
    assert [model.takes_gpu for model in known.view(0.0).models] == [False]


def test_history_forgets_and_measures() -> None:
    """Arrivals fade; reload times are the measured ones, by halves, once there is one."""
    history = ModelHistory()
    for second in range(10):
        history.on_request(float(second))
    assert 9 / MEMORY_S < history.requests_per_s(9.0) <= 10 / MEMORY_S
    assert history.requests_per_s(9.0 + 20 * MEMORY_S) < 1e-6
    assert history.reload_s(4 * 10**9) == 1.5
    history.on_ready(4.0)
    history.on_ready(2.0)
    assert history.reload_s(4 * 10**9) == 3.0
