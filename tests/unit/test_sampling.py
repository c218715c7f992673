"""Sampling: each parameter against a plain definition of it, and what a seed promises."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.contract.messages import SamplingParams
from worker.backends.host_sampling import (
    adjust_scores,
    choose_candidates,
    choose_nucleus,
    compute_logprobs,
    draw_index,
    list_allowed,
    sample_rows,
)
from worker.backends.protocol import FloatArray
from worker.backends.sampling_rows import NO_CHOICE, SampledToken, SamplingRow
from worker.engine.sampling import PositionalRandom, Sampler

VOCAB = 64


def make_sampler(params: SamplingParams, *, prompt: tuple[int, ...] = (1, 2), choice: int = 0) -> Sampler:
    """A sampler over a vocabulary of 64 with end token 0."""
    return Sampler(params, choice, prompt_token_ids=prompt, eos_token_ids=(0,), vocab_size=VOCAB)


def make_params(**changes: object) -> SamplingParams:
    """Parameters with seed 5, room for 100 tokens and temperature 1."""
    return SamplingParams(**{"seed": 5, "max_tokens": 100, **changes})  # type: ignore[arg-type]


def choose(sampler: Sampler, logits: FloatArray) -> int:
    """The token that ``sampler`` would take from ``logits`` ``[V]``."""
    return sample_rows(logits[np.newaxis], [sampler.make_row(0)])[0].token_id


def make_mask(ids: list[int], vocab_size: int = VOCAB) -> npt.NDArray[np.uint32]:
    """A mask that allows ``ids``."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def random_logits(seed: int, size: int = VOCAB, scale: float = 3.0) -> FloatArray:
    """Normal logits."""
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def softmax(logits: FloatArray) -> FloatArray:
    """Probabilities of ``logits``, float64 inside."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return (exponentials / exponentials.sum()).astype(np.float32)


def test_greedy_takes_the_best_and_leaves_the_logits_alone() -> None:
    """Temperature 0 is the argmax; the caller's array is not written."""
    logits = random_logits(0)
    before = logits.copy()
    sampler = make_sampler(make_params(temperature=0.0, frequency_penalty=1.0, logit_bias={3: 0.5}))
    sampler.accept(int(logits.argmax()))
    choose(sampler, logits)
    np.testing.assert_array_equal(logits, before)
    assert choose(make_sampler(make_params(temperature=0.0)), logits) == int(logits.argmax())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.999), st.floats(0.1, 12.0))
def test_nucleus_equals_its_definition(seed: int, top_p: float, scale: float) -> None:
    """The partial selection finds what sorting everything would: the smallest set that reaches top_p."""
    weights = softmax(random_logits(seed, 500, scale))
    kept = choose_nucleus(weights, top_p)
    ordered = np.sort(weights)[::-1]
    cumulative = np.cumsum(ordered, dtype=np.float64)
    total = cumulative[-1]
    assert cumulative[len(kept) - 1] >= top_p * total * (1 - 1e-6)
    if len(kept) > 1:
        assert cumulative[len(kept) - 2] < top_p * total * (1 + 1e-6)
    np.testing.assert_array_equal(weights[kept], ordered[: len(kept)])


def test_top_k_keeps_the_k_best() -> None:
    """Exactly the k largest logits may be drawn."""
    logits = random_logits(1)
    ids, weights = choose_candidates(logits, SamplingRow(0, temperature=1.0, top_k=7))
    assert ids is not None
    assert set(ids) == set(np.argsort(logits)[-7:])
    np.testing.assert_allclose(weights / weights.sum(), softmax(logits)[ids] / softmax(logits)[ids].sum(), rtol=1e-5)


def test_min_p_keeps_what_is_near_the_best() -> None:
    """Tokens below min_p times the best probability are out."""
    logits = random_logits(2)
    ids, _ = choose_candidates(logits, SamplingRow(0, temperature=1.0, min_p=0.2))
    probabilities = softmax(logits)
    assert ids is not None
    assert set(ids) == set(np.flatnonzero(probabilities >= 0.2 * probabilities.max()))


def test_tiny_temperature_is_greedy() -> None:
    """Dividing by a very small temperature neither overflows nor leaves the best token."""
    logits = random_logits(3, scale=50.0)
    assert choose(make_sampler(make_params(temperature=1e-6)), logits) == int(logits.argmax())


def test_draws_follow_the_distribution() -> None:
    """Over many positions the drawn tokens have the softmax's frequencies."""
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    sampler = make_sampler(make_params())
    counts = np.zeros(4)
    for _ in range(4000):
        token = choose(sampler, logits)
        counts[token] += 1
        sampler.accept(token)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.25, 0.15, 0.1], atol=0.03)


def test_a_draw_depends_on_seed_choice_and_position_only() -> None:
    """Positions can be drawn in any order; another seed or choice is another stream."""
    forward = [PositionalRandom(11, 0).draw(i) for i in range(20)]
    source = PositionalRandom(11, 0)
    assert [source.draw(i) for i in reversed(range(20))] == forward[::-1]
    assert len(set(forward)) == 20
    assert PositionalRandom(11, 1).draw(0) != forward[0]
    assert PositionalRandom(12, 0).draw(0) != forward[0]
    assert 0 <= PositionalRandom(-1, 0).draw(0) < 1


def test_penalties_follow_their_formulas() -> None:
    """Frequency counts, presence is once, repetition divides positive and multiplies negative logits."""
    logits = np.array([2.0, -1.0, 3.0, 0.5], np.float32)
    sampler = make_sampler(
        make_params(frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0), prompt=(1,)
    )
    for token in (2, 2, 0):
        sampler.accept(token)
    adjusted = adjust_scores(logits, sampler.make_row(0))
    np.testing.assert_allclose(adjusted, [2.0 / 2 - 0.75, -1.0 * 2, 3.0 / 2 - 1.25, 0.5])


def test_guessed_tokens_count_as_generated() -> None:
    """The row behind guessed tokens is the one that accepting them would have made: penalties, draw, end tokens."""
    params = make_params(
        frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0, min_tokens=3, logit_bias={5: 1.0}
    )
    ahead, stepped = make_sampler(params), make_sampler(params)
    guessed = [7, 7, 3, 1, 7]
    for num_guessed, token in enumerate([*guessed, 0]):
        row, expected = ahead.make_row(0, after=guessed[:num_guessed]), stepped.make_row(0)
        for name in ("uniform", "seen_ids", "counted_ids", "counts", "bias_ids", "bias_values"):
            np.testing.assert_array_equal(getattr(row, name), getattr(expected, name))
        stepped.accept(token)


def test_end_token_is_suppressed_until_min_tokens() -> None:
    """min_tokens masks the end token for that many tokens; ignore_eos for good."""
    logits = np.array([9.0, 1.0, 0.0], np.float32)
    sampler = make_sampler(make_params(temperature=0.0, min_tokens=2))
    chosen = []
    for _ in range(3):
        chosen.append(choose(sampler, logits))
        sampler.accept(chosen[-1])
    assert chosen == [1, 1, 0]
    assert choose(make_sampler(make_params(temperature=0.0, ignore_eos=True)), logits) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_possible_token_say_so(temperature: float) -> None:
    """NaN logits, or a mask that excludes everything, give no token, and leave the rows beside them alone."""
    logits = np.stack([np.full(VOCAB, np.nan, np.float32), random_logits(1), random_logits(1)])
    rows = [
        SamplingRow(0, temperature=temperature),
        SamplingRow(1, temperature=temperature, allowed=make_mask([])),
        SamplingRow(2, temperature=temperature, uniform=0.5),
    ]
    tokens = [sampled.token_id for sampled in sample_rows(logits, rows)]
    assert tokens[:2] == [NO_CHOICE, NO_CHOICE]
    assert tokens[2] == sample_rows(logits[2:], [SamplingRow(0, temperature=temperature, uniform=0.5)])[0].token_id


@st.composite
def sampling_rows(draw: st.DrawFn) -> SamplingRow:
    """Any row over a vocabulary of 64; its number is set by whoever uses it."""
    ids = np.array(sorted(draw(st.sets(st.integers(0, VOCAB - 1), max_size=8))), np.int64)
    values = np.linspace(-3, 3, len(ids)).astype(np.float32)
    allowed = draw(st.none() | st.lists(st.integers(0, VOCAB - 1), max_size=20, unique=True))
    return SamplingRow(
        row=0,
        uniform=draw(st.floats(0, 1, exclude_max=True)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 5, 63, 64, 100])),
        top_p=draw(st.sampled_from([1e-9, 0.5, 0.95, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.1, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        seen_ids=ids,
        frequency_penalty=draw(st.sampled_from([0.0, -0.5, 1.0])),
        counted_ids=ids,
        counts=np.ones(len(ids), np.float32),
        bias_ids=ids,
        bias_values=values,
        allowed=None if allowed is None else make_mask(allowed),
        num_top_logprobs=draw(st.sampled_from([None, 0, 3])),
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(sampling_rows(), st.integers(0, 3)), min_size=1, max_size=6), st.randoms())
def test_a_row_is_drawn_the_same_whatever_is_beside_it(
    asked: list[tuple[SamplingRow, int]], shuffler: random.Random
) -> None:
    """Bit for bit: token and log-probabilities of a row alone are those among any others, in any place and order."""

    def sample(chosen: list[tuple[SamplingRow, int]]) -> list[SampledToken]:
        logits = np.stack([random_logits(seed) for _, seed in chosen])
        return sample_rows(logits, [replace(row, row=place) for place, (row, _) in enumerate(chosen)])

    alone = [sample([one])[0] for one in asked]
    order = list(range(len(asked)))
    shuffler.shuffle(order)
    assert sample([asked[i] for i in order]) == [alone[i] for i in order]


@settings(max_examples=100, deadline=None)
@given(sampling_rows(), st.integers(0, 50))
def test_only_tokens_that_the_mask_allows_are_chosen(row: SamplingRow, seed: int) -> None:
    """Whatever else is set, a chosen token is one whose bit is set."""
    token = sample_rows(random_logits(seed)[np.newaxis], [row])[0].token_id
    allowed = range(VOCAB) if row.allowed is None else list_allowed(row.allowed, VOCAB)
    assert token in allowed or (token == NO_CHOICE and len(allowed) == 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.integers(0, 1000), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_inverse_of_the_cumulative_weights(size: int, seed: int, uniform: float) -> None:
    """The drawn index is where the exact cumulative sum passes the number, and never one of weight 0."""
    rng = np.random.default_rng(seed)
    weights = (rng.random(size) * (rng.random(size) < 0.5)).astype(np.float32)
    weights[rng.integers(size)] = 1.0
    index = draw_index(weights, uniform)
    cumulative = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    assert weights[index] > 0
    assert cumulative[index] >= uniform - 1e-5
    assert index == 0 or cumulative[index - 1] <= uniform + 1e-5


def test_logprobs_are_the_log_softmax() -> None:
    """Natural logarithm of the softmax, best first, ties in order of token id."""
    logits = random_logits(4)
    logits[10] = logits[20] = logits.max() + 1
    found = compute_logprobs(logits, 7, 5)
    expected = np.log(softmax(logits).astype(np.float64))
    assert [token for token, _ in found.top[:2]] == [10, 20]
    for token, logprob in [*found.top, (7, found.chosen)]:
        assert logprob == pytest.approx(expected[token], abs=1e-4)
    assert compute_logprobs(logits, 7, 0).top == ()
