"""A run that was killed after any of its tokens and is run again: the text is that of the undisturbed run.

On the reference backend (NumPy, float32) with a clear choice at each position this holds for every position, every way
of sampling and every number of choices. What a worker's death may change, and when, is in SPECIFICATION.md.
"""

from __future__ import annotations

import pytest
from engine_fixtures import EngineHarness, Outcome, greedy, make_request
from test_engine_grammar import SpelledText, by_pattern

from scheduler.contract.messages import SamplingParams

PROMPTS = ("5 6 7", "40 3 21 8 9 11 60 2 17", " ".join(str(3 + i % 50) for i in range(37)))
NUM_TOKENS = 20
WAYS = {
    "greedy": greedy(NUM_TOKENS, ignore_eos=True),
    "sampled": SamplingParams(seed=11, max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True),
    "nucleus": SamplingParams(seed=12, max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, top_k=20, ignore_eos=True),
    "penalties": SamplingParams(
        seed=13,
        max_tokens=NUM_TOKENS,
        temperature=1.0,
        frequency_penalty=0.7,
        presence_penalty=0.3,
        repetition_penalty=1.2,
        ignore_eos=True,
    ),
}


def complete(
    prompt: str, sampling: SamplingParams, num_choices: int, emitted: tuple[tuple[int, ...], ...] = ()
) -> Outcome:
    """The request alone on an engine of its own."""
    return EngineHarness().complete(make_request("r", prompt, sampling, num_choices=num_choices, emitted=emitted))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_choices", [1, 3])
def test_killed_after_any_token_the_rest_is_the_same(way: str, num_choices: int) -> None:
    """Every position of every choice; the choices of one request have got differently far."""
    for prompt in PROMPTS:
        undisturbed = complete(prompt, WAYS[way], num_choices)
        whole = [tuple(undisturbed.token_ids(choice)) for choice in range(num_choices)]
        assert all(len(one) == NUM_TOKENS for one in whole)
        for killed_after in range(1, NUM_TOKENS):
            emitted = tuple(one[: max(0, killed_after - choice)] for choice, one in enumerate(whole))
            again = complete(prompt, WAYS[way], num_choices, emitted)
            for choice, one in enumerate(whole):
                assert (*emitted[choice], *again.token_ids(choice)) == one, (prompt, killed_after, choice)


def test_killed_after_any_token_under_a_grammar_the_rest_is_the_same() -> None:
    """The grammar's state is replayed too."""
    sampling = SamplingParams(seed=3, max_tokens=40, grammar=by_pattern("[A-Z]{3,9}b(cc){1,2}d"))

    def run(emitted: tuple[tuple[int, ...], ...] = ()) -> list[int]:
        harness = EngineHarness(text=SpelledText())
        return harness.complete(make_request("r", "XYZ", sampling, emitted=emitted)).token_ids()

    whole = run()
    for killed_after in range(1, len(whole) + 1):
        assert run((tuple(whole[:killed_after]),)) == whole[killed_after:]


def test_killed_twice_the_rest_is_the_same() -> None:
    """A third run replays what both earlier ones logged."""
    whole = complete(PROMPTS[1], WAYS["sampled"], 1).token_ids()
    second = complete(PROMPTS[1], WAYS["sampled"], 1, (tuple(whole[:4]),)).token_ids()
    logged = (*whole[:4], *second[:7])
    assert [*logged, *complete(PROMPTS[1], WAYS["sampled"], 1, (logged,)).token_ids()] == whole
