"""Batch sequences beside interactive ones: how many a step takes, as its time allows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from worker.engine.batch_share import FREE_EVERY, SLOWDOWN, BatchShare


def sequence(name: str, *, is_batch: bool, num_pending: int = 1) -> Any:
    """A candidate as the share looks at it."""
    return SimpleNamespace(service_order=(is_batch, 0), name=name), SimpleNamespace(num_pending=num_pending)


BATCH = [sequence(f"b{i}", is_batch=True) for i in range(8)]


def count_batch(chosen: list[Any]) -> int:
    return sum(request.service_order[0] for request, _ in chosen)


def test_alone_a_batch_has_the_whole_step() -> None:
    """Without interactive sequences nothing is held back, prompts included."""
    everything = [*BATCH, sequence("p", is_batch=True, num_pending=90)]
    assert BatchShare().choose(everything) == everything


def test_an_interactive_prompt_is_computed_without_any_batch_row() -> None:
    """Its first token waits for no batch; even so, one step in FREE_EVERY takes everything."""
    share, prompt = BatchShare(), sequence("u", is_batch=False, num_pending=30)
    counts = [count_batch(share.choose([*BATCH, prompt])) for _ in range(FREE_EVERY)]
    assert (counts[:-1], counts[-1]) == ([0] * (FREE_EVERY - 1), len(BATCH))


def test_batch_rows_follow_measured_steps_and_take_turns() -> None:
    """A row costs 10 % of a step: the steps stay about the aim, and every batch sequence gets on."""
    share, stream = BatchShare(), sequence("u", is_batch=False)
    taken, names = [], set[str]()
    for _ in range(2000):
        chosen = share.choose([stream, *BATCH])
        rows = count_batch(chosen)
        names.update(request.name for request, _ in chosen)
        taken.append(rows)
        share.observe(int(1e6 * (1 + 0.1 * rows)))
    later = taken[500:]
    # The aim, one row to try more, and a row of credit; one step in FREE_EVERY takes all.
    assert sorted(later)[int(0.98 * len(later))] <= (SLOWDOWN - 1) / 0.1 + 2
    assert 2 <= sum(later) / len(later) <= 5
    assert names == {"u", *(f"b{i}" for i in range(8))}
