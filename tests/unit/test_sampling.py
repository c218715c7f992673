"""Sampling: each parameter against a plain definition of it, and what a seed promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.contract.messages import SamplingParams
from worker.backends.protocol import FloatArray
from worker.engine.sampling import (
    PositionalRandom,
    Sampler,
    SamplingError,
    choose_candidates,
    choose_nucleus,
    compute_logprobs,
)

VOCAB = 64


def make_sampler(params: SamplingParams, *, prompt: tuple[int, ...] = (1, 2), choice: int = 0) -> Sampler:
    """A sampler over a vocabulary of 64 with end token 0."""
    return Sampler(params, choice, prompt_token_ids=prompt, eos_token_ids=(0,), vocab_size=VOCAB)


def make_params(**changes: object) -> SamplingParams:
    """Parameters with seed 5, room for 100 tokens and temperature 1."""
    return SamplingParams(**{"seed": 5, "max_tokens": 100, **changes})  # type: ignore[arg-type]


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
    sampler.choose(logits)
    np.testing.assert_array_equal(logits, before)
    assert make_sampler(make_params(temperature=0.0)).choose(logits) == int(logits.argmax())


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
    ids, weights = choose_candidates(logits, make_params(top_k=7))
    assert ids is not None
    assert set(ids) == set(np.argsort(logits)[-7:])
    np.testing.assert_allclose(weights / weights.sum(), softmax(logits)[ids] / softmax(logits)[ids].sum(), rtol=1e-5)


def test_min_p_keeps_what_is_near_the_best() -> None:
    """Tokens below min_p times the best probability are out."""
    logits = random_logits(2)
    ids, _ = choose_candidates(logits, make_params(min_p=0.2))
    probabilities = softmax(logits)
    assert ids is not None
    assert set(ids) == set(np.flatnonzero(probabilities >= 0.2 * probabilities.max()))


def test_tiny_temperature_is_greedy() -> None:
    """Dividing by a very small temperature neither overflows nor leaves the best token."""
    logits = random_logits(3, scale=50.0)
    assert make_sampler(make_params(temperature=1e-6)).choose(logits) == int(logits.argmax())


def test_draws_follow_the_distribution() -> None:
    """Over many positions the drawn tokens have the softmax's frequencies."""
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    sampler = make_sampler(make_params())
    counts = np.zeros(4)
    for _ in range(4000):
        token = sampler.choose(logits)
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
    adjusted = sampler._adjust(logits)
    np.testing.assert_allclose(adjusted, [2.0 / 2 - 0.75, -1.0 * 2, 3.0 / 2 - 1.25, 0.5])


def test_end_token_is_suppressed_until_min_tokens() -> None:
    """min_tokens masks the end token for that many tokens; ignore_eos for good."""
    logits = np.array([9.0, 1.0, 0.0], np.float32)
    sampler = make_sampler(make_params(temperature=0.0, min_tokens=2))
    chosen = []
    for _ in range(3):
        chosen.append(sampler.choose(logits))
        sampler.accept(chosen[-1])
    assert chosen == [1, 1, 0]
    assert make_sampler(make_params(temperature=0.0, ignore_eos=True)).choose(logits) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(temperature: float) -> None:
    """NaN logits end the request instead of becoming a token."""
    with pytest.raises(SamplingError, match="nan"):
        make_sampler(make_params(temperature=temperature)).choose(np.full(8, np.nan, np.float32))


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
