"""Primed prefixes in the engine: found by token ids, adopted instead of computed, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

import msgspec
import numpy as np
import pytest
from engine_fixtures import EngineHarness, greedy, make_request
from hypothesis import given
from hypothesis import strategies as st
from llama_programs import TINY, compute_logits, random_plan

from scheduler.contract.errors import ErrorCode
from scheduler.contract.states import Priority
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend, BackendError, FloatArray, SequenceInput
from worker.engine.batch import PREFILL_TOKENS_PER_STEP
from worker.engine.prefixes import MIN_SHARED_TOKENS, PrefixIndex, PrimedPrefixArray

LONG = replace(TINY, context_length=1024)
BACKENDS: dict[str, type[Backend]] = {"numpy": NumpyBackend, "numkong": NumKongBackend}
SYSTEM = tuple(int(i) % 90 + 5 for i in np.random.default_rng(3).integers(0, 90, 30))
QUESTION = (11, 12, 13, 14, 15)


def prime(*token_ids: tuple[int, ...], backend: Backend | None = None) -> PrefixIndex:
    """An index of prefixes computed as a build does."""
    bound = (backend or NumpyBackend()).bind(random_plan(LONG))
    bound.open_kv(64)
    table = tuple(range(64))

    def compute(ids: tuple[int, ...]) -> FloatArray:
        bound.step((SequenceInput(table, 0, ids, num_logits=0),))
        return bound.capture_prefix(table, len(ids))

    return PrefixIndex(PrimedPrefixArray(ids, compute(ids)) for ids in token_ids)


def harness(prefixes: PrefixIndex | None = None, **options: object) -> EngineHarness:
    """An engine on the tiny model with a longer context."""
    return EngineHarness(config=LONG, prefixes=prefixes, **options)  # type: ignore[arg-type]  # options of the harness


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8).map(tuple), max_size=6, unique=True),
    st.lists(st.integers(0, 3), max_size=12).map(tuple),
)
def test_longest_shared_beginning_is_found(prefixes: list[tuple[int, ...]], prompt: tuple[int, ...]) -> None:
    """The trie agrees with a comparison with every prefix, and leaves the prompt's last token to compute."""
    arrays = [np.array(ids, np.float32).reshape(1, 1, 1, -1, 1) for ids in prefixes]
    index = PrefixIndex(PrimedPrefixArray(ids, array) for ids, array in zip(prefixes, arrays, strict=True))

    def num_shared(prefix: tuple[int, ...]) -> int:
        pairs = zip(prefix, prompt[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    longest = max(map(num_shared, prefixes), default=0)
    found = index.find(prompt)
    if longest < MIN_SHARED_TOKENS:
        assert found is None
    else:
        assert found is not None
        assert tuple(found.reshape(-1).astype(int)) == prompt[:longest]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("num_choices", [1, 3])
def test_primed_request_gets_the_same_tokens_and_computes_only_the_rest(name: str, num_choices: int) -> None:
    """Same greedy tokens as without priming, fewer tokens computed, and usage says how many were cached."""
    backend, prompt = BACKENDS[name](), SYSTEM + QUESTION
    plain = harness(bound=backend.bind(random_plan(LONG)))
    primed = harness(prime(SYSTEM, backend=backend), bound=backend.bind(random_plan(LONG)))
    request = make_request("r", prompt, greedy(12), num_choices=num_choices)
    expected, found = plain.complete(request), primed.complete(request)
    assert [found.token_ids(i) for i in range(num_choices)] == [expected.token_ids(i) for i in range(num_choices)]
    assert expected.final is not None
    assert expected.final.usage.cached_tokens == 0
    assert found.final is not None
    assert found.final.usage == msgspec.structs.replace(expected.final.usage, cached_tokens=len(SYSTEM))
    computed = [engine.bound.statistics()["num_tokens"] for engine in (plain, primed)]
    assert computed[0] - computed[1] == len(SYSTEM)


@pytest.mark.parametrize("name", BACKENDS)
def test_logits_after_a_primed_prefix_are_those_of_a_whole_prefill(name: str) -> None:
    """Restored keys and values lead to the logits of an undisturbed run, up to the order of sums."""
    backend = BACKENDS[name]()
    bound = backend.bind(random_plan(LONG))
    keys_values = prime(SYSTEM, backend=backend).find(SYSTEM + QUESTION)
    assert keys_values is not None
    bound.open_kv(8)
    whole, rest = (0, 1, 2, 3), (7, 6, 5, 4)
    expected = compute_logits(bound, SequenceInput(whole, 0, SYSTEM + QUESTION))[0]
    bound.restore_prefix(rest, keys_values)
    found = compute_logits(bound, SequenceInput(rest, len(SYSTEM), QUESTION))[0]
    np.testing.assert_allclose(found, expected, atol=3e-4)


def test_prompt_that_is_a_prefix_computes_its_last_token() -> None:
    """A prompt equal to a primed prefix, or shorter than it: all but its last token is adopted."""
    for prompt in (SYSTEM, SYSTEM[:10]):
        primed = harness(prime(SYSTEM))
        found = primed.complete(make_request("r", prompt, greedy(6), num_choices=2))
        expected = harness().complete(make_request("r", prompt, greedy(6), num_choices=2))
        assert [found.token_ids(i) for i in (0, 1)] == [expected.token_ids(i) for i in (0, 1)]
        assert found.final is not None
        assert found.final.usage.cached_tokens == len(prompt) - 1


def test_prompt_that_leaves_the_prefix_midway_adopts_what_they_share() -> None:
    """Only the shared beginning counts; a prompt that shares too little is computed wholly."""
    for num_shared, num_cached in ((20, 20), (MIN_SHARED_TOKENS, MIN_SHARED_TOKENS), (MIN_SHARED_TOKENS - 1, 0)):
        prompt = (*SYSTEM[:num_shared], 3, 4, 3)
        found = harness(prime(SYSTEM)).complete(make_request("r", prompt, greedy(6)))
        assert found.token_ids() == harness().complete(make_request("r", prompt, greedy(6))).token_ids()
        assert found.final is not None
        assert found.final.usage.cached_tokens == num_cached


def test_longest_of_several_prefixes_wins() -> None:
    """With one prefix that begins another, a prompt adopts as much as either gives."""
    index = prime(SYSTEM[:12], SYSTEM, (*SYSTEM[:12], 60, 61, 62))
    for prompt, num_cached in (
        (SYSTEM + QUESTION, len(SYSTEM)),
        (SYSTEM[:12] + QUESTION, 12),
        ((*SYSTEM[:12], 60, 61, 62, *QUESTION), 15),
    ):
        found = harness(index).complete(make_request("r", prompt, greedy(5)))
        assert found.token_ids() == harness().complete(make_request("r", prompt, greedy(5))).token_ids()
        assert found.final is not None
        assert found.final.usage.cached_tokens == num_cached


def test_replayed_request_adopts_the_prefix_and_goes_on() -> None:
    """A run after a crash: prefix adopted, prompt's rest and earlier tokens computed, the same tokens follow."""
    prompt = SYSTEM + QUESTION
    whole = harness().complete(make_request("r", prompt, greedy(12)))
    emitted = (tuple(whole.token_ids()[:5]),)
    found = harness(prime(SYSTEM)).complete(make_request("r", prompt, greedy(12), emitted=emitted))
    assert found.token_ids() == whole.token_ids()[5:]
    assert found.final is not None
    assert found.final.usage.cached_tokens == len(SYSTEM)


def test_rest_behind_a_prefix_is_prefilled_in_chunks() -> None:
    """A rest longer than one step computes takes two steps, a whole prompt a step more; the tokens are the same."""
    random = np.random.default_rng(4)
    system = tuple(map(int, random.integers(5, 95, PREFILL_TOKENS_PER_STEP + 40)))
    prompt = system + tuple(map(int, random.integers(5, 95, PREFILL_TOKENS_PER_STEP + 20)))
    index, request = prime(system), make_request("r", prompt, greedy(4))
    primed, plain = harness(index), harness()
    assert primed.complete(request).token_ids() == plain.complete(request).token_ids()
    steps = [engine.engine.statistics().num_steps for engine in (plain, primed)]
    assert steps[0] - steps[1] == 1


def test_adopted_tokens_count_against_the_kv_budget_and_are_given_back() -> None:
    """A primed sequence reserves as much as an unprimed one; a preempted one adopts its prefix again."""
    block_bytes = harness().bound.kv_block_bytes
    primed = harness(prime(SYSTEM), kv_budget_bytes=8 * block_bytes)
    plain = harness()
    batch = make_request("batch", SYSTEM + QUESTION, greedy(40), priority=Priority.BATCH)
    # So long that it needs all eight blocks: whatever pace the batch got, one of the two gives way.
    urgent = make_request("urgent", SYSTEM + QUESTION[::-1], greedy(80, ignore_eos=True))
    outcome = primed.submit(batch)
    primed.run_round()
    assert primed.engine.statistics().kv_used_bytes == 3 * block_bytes
    second = primed.submit(urgent)
    primed.run_until_done()
    assert primed.engine.statistics().num_preemptions >= 1
    assert primed.engine.statistics().kv_used_bytes == 0
    assert outcome.token_ids() == plain.complete(batch).token_ids()
    assert second.token_ids() == plain.complete(urgent).token_ids()
    assert outcome.final is not None
    assert outcome.final.usage.cached_tokens == len(SYSTEM)


def test_prefix_does_not_move_the_context_limit() -> None:
    """A prompt that fills the context is refused with the same error, prefix or none."""
    prompt = (SYSTEM * 40)[: LONG.context_length]
    found = harness(prime(SYSTEM)).complete(make_request("r", prompt))
    assert found.final is not None
    assert found.final.error is not None
    assert found.final.error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED


def test_prefix_that_cannot_be_restored_ends_its_request_alone() -> None:
    """A backend that refuses the keys and values fails that request; one that needs no prefix runs on."""
    index = PrefixIndex([PrimedPrefixArray(SYSTEM, np.zeros((1, 2, 1, len(SYSTEM), 2), np.float32))])
    primed = harness(index)
    with pytest.raises(BackendError):
        primed.bound.restore_prefix((0,), np.zeros((1, 2, 1, 3, 2), np.float32))
    bad, good = primed.submit(make_request("bad", SYSTEM + QUESTION)), primed.submit(make_request("good", QUESTION))
    primed.run_until_done()
    assert bad.final is not None
    assert bad.final.error is not None
    assert good.final is not None
    assert good.final.error is None
