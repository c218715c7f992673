"""Batch sequences beside interactive ones: what a step takes of them, as its time allows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.step_simulation import Load, Outcome, simulate
from worker.engine.batch_share import (
    PATIENCE,
    WARY_PROMPT_TOKENS,
    WARY_ROWS,
    WARY_STEPS,
    BatchShare,
    StepCosts,
)
from worker.engine.prefill_budget import PrefillBudget

MS = 1_000_000
STREAMS = Load(streams_per_s=1.7)
BATCH_LOAD = Load(in_flight=16)
BOTH = Load(streams_per_s=1.7, in_flight=16)  # a fifth of what eight streams at once come to on that machine


def sequence(name: str, *, is_batch: bool, num_pending: int = 1) -> Any:
    """A candidate as the share looks at it."""
    return SimpleNamespace(service_order=(is_batch, 0), name=name), SimpleNamespace(num_pending=num_pending)


BATCH = [sequence(f"b{i}", is_batch=True) for i in range(8)]
STREAM = sequence("u", is_batch=False)
PROMPT = sequence("p", is_batch=False, num_pending=30)


def batch_names(chosen: list[Any]) -> list[str]:
    return [request.name for request, _ in chosen if request.service_order[0]]


def run_step(share: BatchShare, candidates: list[Any], *, ms: float, num_rows: int | None = None) -> list[Any]:
    """One step that takes ``ms`` whatever is in it; its sequences."""
    chosen = share.choose(candidates)
    share.observe(len(chosen) if num_rows is None else num_rows, int(ms * MS))
    return chosen


def test_alone_a_batch_has_the_whole_step() -> None:
    """Without interactive sequences nothing is held back, prompts included."""
    everything = [*BATCH, sequence("p", is_batch=True, num_pending=90)]
    share, prefill = BatchShare(PrefillBudget()), PrefillBudget()
    assert share.choose(everything) == everything
    assert share.choose_prompt_tokens(8) == prefill.choose_tokens(8)
    assert share.choose_prompt_tokens(0) == prefill.choose_tokens(0)


def test_steps_of_a_batch_alone_are_short_while_streams_come_now_and_then() -> None:
    """The next stream waits for the end of one; after a while without any they are large again."""
    share = BatchShare(PrefillBudget())
    run_step(share, [STREAM], ms=10)
    for _ in range(WARY_STEPS):
        share.choose(BATCH)
        assert share.choose_prompt_tokens(8) <= WARY_ROWS - 8
    share.choose(BATCH)
    assert share.choose_prompt_tokens(0) > WARY_PROMPT_TOKENS


def test_the_batch_yields_to_a_prompt_in_the_very_next_step() -> None:
    """The first token of a stream waits for no batch row, however much room there is."""
    share = BatchShare(PrefillBudget())
    for _ in range(500):
        assert run_step(share, [STREAM, *BATCH], ms=10)
    assert len(batch_names(share.choose([STREAM, *BATCH]))) == len(BATCH)
    assert batch_names(share.choose([STREAM, *BATCH, PROMPT])) == []


def test_no_stream_of_prompts_starves_a_batch() -> None:
    """After PATIENCE steps without anything it gets one: a tile, in the place of the prompts."""
    share = BatchShare(PrefillBudget())
    taken = [len(batch_names(share.choose([*BATCH, PROMPT]))) for _ in range(2 * PATIENCE + 2)]
    assert taken == 2 * [*[0] * PATIENCE, len(BATCH)]


MANY = [sequence(f"b{i}", is_batch=True) for i in range(60)]


@pytest.mark.parametrize(("ms_a_row", "expected"), [(0.1, 16), (0.01, 32)])
def test_batch_rows_follow_measured_steps_and_take_turns(ms_a_row: float, expected: int) -> None:
    """As many rows as the aim allows, in whole tiles, one at least; every batch sequence gets on."""
    share = BatchShare(PrefillBudget())
    sizes, names = [], set[str]()
    for _ in range(3000):
        chosen = share.choose([STREAM, *MANY])
        names.update(batch_names(chosen))
        sizes.append(len(chosen))
        share.observe(len(chosen), int((1 + ms_a_row * (len(chosen) - 1)) * MS))
    usual = sorted(sizes[1000:])[1000]
    assert expected <= usual <= expected + 16
    assert names == {f"b{i}" for i in range(60)}


def test_one_stall_changes_little() -> None:
    """A step that took a hundred times as long does not keep the batch out."""
    share = BatchShare(PrefillBudget())
    for _ in range(500):
        run_step(share, [STREAM, *BATCH], ms=10)
    run_step(share, [STREAM, *BATCH], ms=1000)
    taken = [len(batch_names(run_step(share, [STREAM, *BATCH], ms=10))) for _ in range(20)]
    assert sum(taken) >= 18 * len(BATCH)


def test_costs_of_sizes_that_were_not_met_are_in_line_with_the_others() -> None:
    """Between two sizes, beyond the largest, and where nothing is known."""
    costs = StepCosts()
    assert costs.estimate_ns(5) == 0
    costs.observe(1, 10 * MS)
    costs.observe(16, 12 * MS)
    assert costs.estimate_ns(1) < costs.estimate_ns(8) < costs.estimate_ns(16) == costs.estimate_ns(200)
    assert costs.most_rows(11 * MS, before=256) == 8
    assert costs.most_rows(20 * MS, before=16) == 32  # one size beyond what it was, to learn what that costs


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Streams alone, a batch alone, and both, on the simulated machine."""
    loads = {"streams": STREAMS, "batch": BATCH_LOAD, "both": BOTH}
    return {name: simulate(load, lasts_ms=120_000, jitter=0.05) for name, load in loads.items()}


def test_streams_keep_their_pace_beside_a_batch(outcomes: dict[str, Outcome]) -> None:
    """99th percentiles where the processor is the limit and nothing but steps takes time: 1.5 times to the first token
    at most, and hardly more between tokens."""
    alone, both = outcomes["streams"], outcomes["both"]
    assert both.first_token_ms(0.99) <= 1.5 * alone.first_token_ms(0.99)
    assert both.gap_ms(0.99) <= 1.55 * alone.gap_ms(0.99)


def test_a_batch_keeps_its_throughput_beside_streams(outcomes: dict[str, Outcome]) -> None:
    """Three fifths of what it does alone where the processor is the limit, a fifth of which the streams take."""
    assert outcomes["both"].lines_per_s >= 0.6 * outcomes["batch"].lines_per_s


def test_where_rows_are_nearly_free_nobody_notices_anybody() -> None:
    """A device on which a step of 200 rows takes hardly longer than one of one: streams and batch as if alone."""

    def step_ms(num_rows: int) -> float:
        return 5 * (1 + num_rows / 2000)

    alone = simulate(BATCH_LOAD, lasts_ms=30_000, step_ms=step_ms)
    both = simulate(Load(streams_per_s=10, in_flight=16), lasts_ms=30_000, step_ms=step_ms)
    streams = simulate(Load(streams_per_s=10), lasts_ms=30_000, step_ms=step_ms)
    assert both.lines_per_s >= 0.85 * alone.lines_per_s
    assert both.gap_ms(0.99) <= 1.2 * streams.gap_ms(0.99)
