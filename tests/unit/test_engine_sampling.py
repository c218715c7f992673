"""What a seed promises through the engine: a sampled text is its own, whatever shares its steps."""

from __future__ import annotations

from engine_fixtures import EngineHarness, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.contract.messages import SamplingParams

PROMPT = (5, 6, 7, 8)
PARAMS = (
    SamplingParams(seed=11, max_tokens=16, temperature=1.0, ignore_eos=True),
    SamplingParams(seed=12, max_tokens=16, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2),
    SamplingParams(seed=13, max_tokens=16, temperature=1.3, min_p=0.05, frequency_penalty=0.4, logit_bias={9: 2.0}),
)
neighbours = st.lists(
    st.tuples(
        st.lists(st.integers(3, 90), min_size=1, max_size=40).map(tuple),
        st.sampled_from([0.0, 1.0]),
        st.integers(1, 12),  # tokens
        st.integers(0, 8),  # rounds before it joins
    ),
    max_size=5,
)


@settings(max_examples=30, deadline=None)
@given(neighbours, st.sampled_from(PARAMS))
def test_a_seed_gives_the_same_text_among_any_neighbours(
    others: list[tuple[tuple[int, ...], float, int, int]], sampling: SamplingParams
) -> None:
    """Two choices of a seeded request, alone and with requests that come and go beside it, on the reference backend."""
    alone = EngineHarness().complete(make_request("r", PROMPT, sampling, num_choices=2))
    harness = EngineHarness()
    found = harness.submit(make_request("r", PROMPT, sampling, num_choices=2))
    for round_number in range(9):
        for index, (prompt, temperature, max_tokens, joins_at) in enumerate(others):
            if joins_at == round_number:
                params = SamplingParams(seed=index, max_tokens=max_tokens, temperature=temperature)
                harness.submit(make_request(f"other-{index}", prompt, params))
        harness.run_round()
    harness.run_until_done()
    for choice in range(2):
        assert found.token_ids(choice) == alone.token_ids(choice)
        assert found.text(choice) == alone.text(choice)
