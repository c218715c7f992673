"""Prompt-lookup drafts: what is guessed, when it rests, and that no text ever changes by it."""

from __future__ import annotations

from typing import Any

from engine_fixtures import EngineHarness, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.contract.messages import SamplingParams
from worker.engine.speculation import MAX_MISSES, NGRAM_TOKENS, PromptLookup

COPIED = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14)


def test_what_followed_the_last_tokens_before_is_drafted() -> None:
    """The latest earlier place of the longest match counts; no match, no draft."""
    assert PromptLookup([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3], 3).draft(3) == (5, 9, 1)
    assert PromptLookup([7, 1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 7, 1, 2, 3], 3).draft(3) == (4, 9, 1)
    assert PromptLookup([1, 2, 3, 4, 5], 3).draft(3) == ()
    assert PromptLookup([], 3).draft(3) == ()
    assert PromptLookup([1, 2, 3, 4, 9, 1, 2, 3], 3).draft(0) == ()


def test_a_text_that_repeats_itself_is_continued_beyond_its_end() -> None:
    """A period shorter than the draft is repeated."""
    assert PromptLookup([1, 2, 1, 2, 1, 2], 8).draft(8) == (1, 2, 1)
    lookup = PromptLookup([4, 4, 4, 4, 4], 8)
    lookup.observe(3, 3)
    assert lookup.draft(8) == (4,) * 6


def test_length_follows_what_was_kept_and_misses_lead_to_rest() -> None:
    """Doubled while all is kept, cut to what was kept; after misses nothing is drafted for some tokens."""
    token_ids = [1, 2, 3] * 20
    lookup = PromptLookup(token_ids, 16)
    for num_kept, expected in ((3, 6), (6, 12), (12, 16), (2, 3)):
        lookup.observe(len(lookup.draft(16)), num_kept)
        assert len(lookup.draft(16)) == expected
    for _ in range(MAX_MISSES):
        assert lookup.draft(16)
        lookup.observe(1, 0)
    num_rested = 0
    while not lookup.draft(16):
        token_ids.append(token_ids[-3])
        num_rested += 1
        assert num_rested < 100
    assert num_rested >= 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=10))
def test_index_equals_a_search(first: list[int], more: list[int]) -> None:
    """The incremental index finds what looking through the whole text finds."""
    token_ids = list(first)
    lookup = PromptLookup(token_ids, 1)
    lookup.draft(1)
    token_ids += more
    expected: tuple[int, ...] = ()
    for size in NGRAM_TOKENS:
        ends = [i for i in range(size, len(token_ids)) if token_ids[i - size : i] == token_ids[len(token_ids) - size :]]
        if ends:
            expected = (token_ids[ends[-1]],)
            break
    assert lookup.draft(1) == expected


def run(sampling: SamplingParams, prompts: list[tuple[int, ...]], **changes: Any) -> tuple[list[Any], EngineHarness]:
    """What each prompt gets, two choices each, on one engine."""
    harness = EngineHarness(**changes)
    outcomes = [
        harness.submit(make_request(f"r{i}", prompt, sampling, num_choices=2)) for i, prompt in enumerate(prompts)
    ]
    harness.run_until_done()
    assert all(outcome.final is not None and outcome.final.error is None for outcome in outcomes)
    return [(o.token_ids(0), o.token_ids(1), o.text(0), o.finish_reasons()) for o in outcomes], harness


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=20).map(tuple), min_size=1, max_size=3),
    max_draft_tokens=st.sampled_from([1, 3, 16]),
    kv_budget_bytes=st.sampled_from([1 << 17, 1 << 24]),
    temperature=st.sampled_from([0.0, 0.05, 1.0]),
    params=st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 99),
            "top_p": st.just(0.8),
            "frequency_penalty": st.just(0.7),
            "repetition_penalty": st.just(1.2),
            "logit_bias": st.just({5: 4.0}),
            "min_tokens": st.just(9),
            "num_top_logprobs": st.just(2),
        },
    ),
)
def test_drafts_change_no_text(
    prompts: list[tuple[int, ...]],
    max_draft_tokens: int,
    kv_budget_bytes: int,
    temperature: float,
    params: dict[str, Any],
) -> None:
    """Greedy or random, with penalties, end rules and too little memory: tokens, text and ends are those without."""
    sampling = SamplingParams(**{"seed": 1, "max_tokens": 24, "temperature": temperature, **params})
    expected, _ = run(sampling, prompts)
    found, harness = run(sampling, prompts, max_draft_tokens=max_draft_tokens, kv_budget_bytes=kv_budget_bytes)
    assert found == expected
    assert harness.text.num_open == 0


def test_a_text_that_repeats_takes_fewer_steps() -> None:
    """A biased model that repeats itself: most tokens come from drafts, in a fraction of the steps."""
    sampling = SamplingParams(
        seed=1, max_tokens=80, temperature=0.0, logit_bias={5: 100.0, 6: 99.9}, frequency_penalty=0.5, ignore_eos=True
    )
    _, without = run(sampling, [COPIED])
    _, drafting = run(sampling, [COPIED], max_draft_tokens=16)
    statistics = drafting.engine.statistics()
    assert statistics.num_steps < without.engine.statistics().num_steps / 2
    assert statistics.num_kept_tokens > 80
    assert statistics.num_drafted_tokens >= statistics.num_kept_tokens
    assert drafting.engine.statistics().tokens_generated == without.engine.statistics().tokens_generated
