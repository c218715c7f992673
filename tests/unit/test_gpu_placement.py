"""Where a model goes among GPUs, and who leaves for it: decisions without a GPU."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.contract.errors import ErrorCode
from scheduler.gpu_placement import (
    MIN_RESIDENCE_S,
    OVERHEAD_BYTES,
    GpuNeed,
    GpuView,
    Place,
    Refuse,
    Resident,
    Wait,
    compute_eviction_cost,
    decide_placement,
)

GIB = 1 << 30
NEED = GpuNeed("wanted", 10 * GIB, 2 * GIB - OVERHEAD_BYTES)  # 12 GiB in all


def gpu(number: int = 0, free: int = 20, total: int = 24, **options: object) -> GpuView:
    """A GPU with memory in GiB."""
    return replace(GpuView("node", number, total * GIB, free * GIB), **options)


def resident(name: str, gib: int, *, reload_s: float = 1.0, rate: float = 0.01, since_s: float = 0.0) -> Resident:
    """An idle worker of model ``name``."""
    return Resident(f"w-{name}", name, gib * GIB, since_s, since_s, reload_s, rate)


def test_room_is_taken_where_the_bytes_are() -> None:
    """A node that holds the weights in memory wins over one with more room."""
    gpus = [gpu(0, 24), gpu(1, 13, node_id="other", host_models=frozenset({"wanted"}))]
    assert decide_placement(NEED, gpus, 100) == Place("other", 1)


def test_fullest_gpu_that_fits_is_taken() -> None:
    """Large holes are kept for large models."""
    assert decide_placement(NEED, [gpu(0, 24), gpu(1, 13), gpu(2, 11)], 100) == Place("node", 1)


def test_promised_memory_is_not_promised_twice() -> None:
    """Two orders in a row do not count on the same bytes."""
    first = gpu(0, 20, promised_bytes=12 * GIB)
    assert decide_placement(NEED, [first, gpu(1, 13)], 100) == Place("node", 1)
    assert isinstance(decide_placement(NEED, [first], 100), Wait)


def test_cheapest_to_bring_back_leaves() -> None:
    """Reload time times the chance that it is wanted decides, not who was used longest ago."""
    rare, busy = resident("rare", 12, reload_s=3, rate=0.001), resident("busy", 12, reload_s=1, rate=0.5)
    found = decide_placement(NEED, [gpu(0, 0, residents=(busy, rare))], 100)
    assert found == Place("node", 0, ("w-rare",))
    assert compute_eviction_cost(rare, 10) < compute_eviction_cost(busy, 10) == 1.0


def test_only_as_many_leave_as_needed() -> None:
    """A small model that was looked at first stays when a larger one's memory is enough alone."""
    small, large = resident("small", 2, reload_s=0.1), resident("large", 12, reload_s=2)
    found = decide_placement(NEED, [gpu(0, 0, residents=(small, large))], 100)
    assert found == Place("node", 0, ("w-large",))


def test_busy_and_fresh_models_stay() -> None:
    """Nobody with requests leaves, nor anybody who has just come: the answer says when to ask again."""
    fresh, working = resident("fresh", 12, since_s=95), replace(resident("working", 12), in_flight=1)
    assert decide_placement(NEED, [gpu(0, 0, residents=(fresh, working))], 100) == Wait(95 + MIN_RESIDENCE_S)
    assert decide_placement(NEED, [gpu(0, 0, residents=(working,))], 100) == Wait(None)


def test_model_that_fits_nowhere_is_refused_with_numbers() -> None:
    """The message has need and limit; a GPU that reports faults does not count."""
    found = decide_placement(NEED, [gpu(0, 4, total=8), gpu(1, 24, is_usable=False)], 100)
    assert isinstance(found, Refuse)
    assert found.error.code is ErrorCode.OUT_OF_MEMORY
    assert str(12 * GIB) in found.error.message
    assert "1 more report faults" in found.error.message


residents = st.builds(
    resident,
    st.sampled_from("abcdef"),
    st.integers(1, 12),
    reload_s=st.floats(0, 10),
    rate=st.floats(0, 2),
    since_s=st.floats(0, 100),
)


@given(st.lists(st.lists(residents, max_size=4), min_size=1, max_size=3), st.integers(0, 24))
def test_a_placement_always_has_room(crowds: list[list[Resident]], free: int) -> None:
    """Whatever is decided, the memory is there once the evicted have gone, and none of them was busy or fresh."""
    gpus = [
        gpu(number, free, residents=tuple(replace(r, worker_id=f"{number}-{i}") for i, r in enumerate(crowd)))
        for number, crowd in enumerate(crowds)
    ]
    found = decide_placement(NEED, gpus, 100)
    if isinstance(found, Place):
        chosen = gpus[found.number]
        gone = [one for one in chosen.residents if one.worker_id in found.evicted]
        assert len(gone) == len(found.evicted)
        assert chosen.room_bytes + sum(one.device_bytes for one in gone) >= NEED.device_bytes
        assert all(100 - one.since_s >= MIN_RESIDENCE_S for one in gone)
