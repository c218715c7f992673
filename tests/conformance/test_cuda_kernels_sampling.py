"""Sampling on the device against the host's rule in NumPy, from the CUDA sources on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from cuda_fixtures import Array, poisoned, relative_error, run_in_every_order, seeded_rng

from worker.backends import cuda_kernels as kernels
from worker.backends import host_sampling
from worker.backends.cuda_kernels import Launch
from worker.backends.cuda_sampling_rows import pack_sampling_rows
from worker.backends.sampling_rows import SamplingRow


@dataclass(frozen=True)
class Choice:
    """One row's parameters, as the host has them."""

    uniform: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seen: tuple[int, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    counted: tuple[tuple[int, int], ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    allowed: Array | None = None  # [V] bool


def adjust(logits: Array, choice: Choice) -> Array:
    """Penalties, bias, mask."""
    scores = logits.astype(np.float32).copy()
    seen = list(choice.seen)
    penalty = np.float32(choice.repetition_penalty)
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    for token, count in choice.counted:
        scores[token] -= np.float32(choice.frequency_penalty) * np.float32(count) + np.float32(choice.presence_penalty)
    for token, value in choice.bias:
        scores[token] += np.float32(value)
    if choice.allowed is not None:
        scores[~choice.allowed] = -np.inf
    return scores


def choose(logits: Array, choice: Choice) -> int:
    """The rule of the host's sampling, with plain sorts."""
    scores = adjust(logits, choice)
    best = scores.max()
    if choice.temperature <= 0:
        return int(scores.argmax())
    ids = np.arange(len(scores))
    if 0 < choice.top_k < len(scores):
        ids = np.sort(np.argsort(-scores, kind="stable")[: choice.top_k])
    weights = np.exp((scores[ids] - best) / np.float32(choice.temperature))
    if choice.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        cumulative = np.cumsum(weights[order], dtype=np.float64)
        kept = order[: np.searchsorted(cumulative, choice.top_p * cumulative[-1]) + 1]
        ids, weights = ids[kept], weights[kept]
    if choice.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(choice.min_p) * weights.max())
        ids, weights = ids[kept], weights[kept]
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = np.searchsorted(cumulative, choice.uniform * cumulative[-1], side="right")
    return int(ids[min(int(index), len(ids) - 1)])


def acceptable(logits: Array, choice: Choice) -> set[int]:
    """What the rule gives within rounding of the drawn number and of the nucleus."""
    return {
        choose(logits, replace(choice, uniform=min(max(choice.uniform + shift, 0.0), 1 - 1e-9), top_p=choice.top_p + p))
        for shift, p in product((-2e-6, 0, 2e-6), (-2e-6, 0, 2e-6) if choice.top_p < 1 else (0,))
    }


def as_row(index: int, choice: Choice) -> SamplingRow:
    """The engine's form; ids ascend, as it promises."""
    counted, bias = sorted(choice.counted), sorted(choice.bias)
    allowed = None
    if choice.allowed is not None:
        bits = np.zeros(-(-len(choice.allowed) // 32) * 32, np.uint8)
        bits[: len(choice.allowed)] = choice.allowed
        allowed = np.packbits(bits, bitorder="little").view(np.uint32)
    return SamplingRow(
        index,
        *(choice.uniform, choice.temperature, choice.top_k, choice.top_p, choice.min_p, choice.repetition_penalty),
        seen_ids=np.array(sorted(choice.seen), np.int64),
        frequency_penalty=choice.frequency_penalty,
        presence_penalty=choice.presence_penalty,
        counted_ids=np.array([token for token, _ in counted], np.int64),
        counts=np.array([count for _, count in counted], np.float32),
        bias_ids=np.array([token for token, _ in bias], np.int64),
        bias_values=np.array([value for _, value in bias], np.float32),
        allowed=allowed,
    )


def sample(logits: Array, choices: list[Choice]) -> Array:
    """Tokens of the kernel; row ``i`` of the logits for choice ``i``."""
    vocab_size = logits.shape[1]
    packed = pack_sampling_rows([as_row(index, choice) for index, choice in enumerate(choices)])
    masks = 0 if packed.masks is None else packed.masks

    def make() -> tuple[Launch, tuple[Array, ...]]:
        tokens, scratch = poisoned(len(choices), np.int32), poisoned(logits.shape)
        launch = kernels.sample_rows(
            tokens, scratch, logits, packed.table, packed.ids, packed.values, masks,
            num_rows=len(choices), vocab_size=vocab_size,
        )  # fmt: skip
        return launch, (tokens,)

    return run_in_every_order(make)[0]


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run of a seed."""
    return seeded_rng()


def draw_choice(rng: np.random.Generator, vocab_size: int, index: int) -> Choice:
    """A mix of everything; ``index`` makes sure that each filter and each pair of them occurs."""
    some = tuple(int(i) for i in rng.permutation(vocab_size)[: min(5, vocab_size - 1)])
    return Choice(
        uniform=float(rng.random()),
        temperature=(0.0, 0.3, 1.0, 1.7)[index % 4] if index % 16 else 1.0,
        top_k=int(rng.integers(1, vocab_size + 2)) if index & 1 else 0,
        top_p=float(rng.uniform(0.05, 0.999)) if index & 2 else 1.0,
        min_p=float(rng.uniform(0.001, 0.5)) if index & 4 else 0.0,
        repetition_penalty=1.3 if index & 8 else 1.0,
        seen=some if index & 8 else (),
        frequency_penalty=0.4,
        presence_penalty=-0.3,
        counted=tuple((token, n + 1) for n, token in enumerate(some)) if index & 1 else (),
        bias=tuple((token, float("-inf") if n == 0 else 2.5) for n, token in enumerate(some)) if index & 4 else (),
        allowed=(rng.random(vocab_size) < 0.7) | (np.arange(vocab_size) == some[-1]) if index & 2 else None,
    )


@pytest.mark.parametrize("vocab_size", [2, 33, 1024, 3001])
def test_sampling_follows_the_rule(rng: np.random.Generator, vocab_size: int) -> None:
    """Rows with every mix of penalties, bias, masks and filters draw what the host would, within rounding."""
    choices = [draw_choice(rng, vocab_size, index) for index in range(24)]
    choices = [replace(c, bias=c.bias[1:]) if vocab_size == 2 else c for c in choices]
    logits = (rng.standard_normal((len(choices), vocab_size)) * 3).astype(np.float32)
    tokens = sample(logits, choices)
    num_exact = 0
    for row, (token, choice) in enumerate(zip(tokens, choices, strict=True)):
        allowed = acceptable(logits[row], choice)
        assert int(token) in allowed, (choice, token)
        (on_host,) = host_sampling.sample_rows(logits, [as_row(row, choice)])
        assert on_host.token_id in allowed, (choice, on_host)
        num_exact += len(allowed) == 1
    assert num_exact >= len(choices) - 4  # nearly always there is one right answer


def test_equal_scores_are_taken_by_id(rng: np.random.Generator) -> None:
    """Ties at the edge of top-k and within the nucleus go to the lowest ids, whatever the thread order."""
    logits = np.zeros((6, 500), np.float32)
    logits[:, 400:] = 1.0
    uniforms = [0.0, 0.3, 0.999]
    chosen = sample(logits, [Choice(u, top_k=10) for u in uniforms] + [Choice(u, top_p=0.2) for u in uniforms])
    assert [int(t) for t in chosen[:3]] == [400, 403, 409]
    for token, choice in zip(chosen, [Choice(u, top_k=10) for u in uniforms], strict=False):
        assert int(token) == choose(logits[0], choice)
    assert chosen[3] == 400
    assert all(int(t) in acceptable(logits[0], Choice(u, top_p=0.2)) for t, u in zip(chosen[3:], uniforms, strict=True))


def test_logits_that_are_not_numbers() -> None:
    """A NaN anywhere, an infinite best score and a row in which nothing is allowed give -1."""
    logits = np.zeros((4, 70), np.float32)
    logits[0, 69] = np.nan
    logits[1, 3] = np.inf
    none = np.zeros(70, bool)
    choices = [Choice(0.5), Choice(0.5, temperature=0.0), Choice(0.5, allowed=none), Choice(0.5, temperature=1e-30)]
    tokens = sample(logits, choices)
    assert tokens[:3].tolist() == [-1, -1, -1]
    assert tokens[3] == choose(logits[3], choices[3])
    on_host = host_sampling.sample_rows(logits, [as_row(row, choice) for row, choice in enumerate(choices)])
    assert [sampled.token_id for sampled in on_host[1:]] == tokens[1:].tolist()


def test_argmax(rng: np.random.Generator) -> None:
    """The first of the largest, of the rows asked for; -1 where there is none."""
    logits = rng.standard_normal((5, 2500)).astype(np.float32)
    logits[1, [7, 2000]] = 9
    logits[2, 1] = np.nan
    rows = np.array([4, 1, 2], np.int32)

    def make() -> tuple[Launch, tuple[Array, ...]]:
        tokens = poisoned(3, np.int32)
        return kernels.argmax_rows(tokens, logits, rows, num_rows=3, vocab_size=2500), (tokens,)

    (tokens,) = run_in_every_order(make)
    assert tokens.tolist() == [int(logits[4].argmax()), 7, -1]


@pytest.mark.parametrize(("vocab_size", "num_top"), [(50, 20), (3000, 5), (40, 0)])
def test_top_logprobs(rng: np.random.Generator, vocab_size: int, num_top: int) -> None:
    """Log-softmax of the chosen and of the best tokens, best first, equals by id."""
    logits = (rng.standard_normal((3, vocab_size)) * 4).astype(np.float32)
    logits[1, [5, 30]] = 20
    rows, tokens = np.array([2, 1], np.int32), np.array([11, 5], np.int32)

    def make() -> tuple[Launch, tuple[Array, ...]]:
        outputs = (poisoned(2), poisoned((2, max(num_top, 1)), np.int32), poisoned((2, max(num_top, 1))))
        sizes = {"num_rows": 2, "vocab_size": vocab_size, "num_top": num_top}
        return kernels.top_logprobs(*outputs, logits, rows, tokens, **sizes), outputs

    chosen, top_ids, top_values = run_in_every_order(make)
    exact = logits[rows].astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True)) + exact.max(1, keepdims=True)
    assert relative_error(chosen, exact[[0, 1], tokens]) < 1e-6
    for row in range(2 if num_top else 0):
        order = np.argsort(-logits[rows[row]], kind="stable")[:num_top]
        assert top_ids[row].tolist() == order.tolist()
        assert relative_error(top_values[row], exact[row, order]) < 1e-6
