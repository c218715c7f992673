"""Automatic prefix caching and order of service in the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_fixtures import EngineHarness, Outcome, greedy, make_request
from llama_programs import TINY, random_plan

from scheduler.contract.errors import ErrorCode
from scheduler.contract.states import Priority
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend
from worker.engine.batch import PREFILL_TOKENS_PER_STEP
from worker.engine.prefill_budget import SLOWDOWN, PrefillBudget
from worker.engine.types import EngineRequest

BACKENDS: dict[str, type[Backend]] = {"numpy": NumpyBackend, "numkong": NumKongBackend}
BLOCK_BYTES = 16 * 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
CHAT = tuple(3 + i * 11 % 90 for i in range(50))


def cached_tokens(outcome: Outcome) -> int:
    """What the request's usage says."""
    assert outcome.final is not None
    assert outcome.final.error is None
    return outcome.final.usage.cached_tokens


@pytest.mark.parametrize("name", BACKENDS)
def test_second_turn_of_a_chat_computes_only_what_is_new(name: str) -> None:
    """The next turn takes over the first one's prompt and answer in whole blocks, and its tokens are those of a cold
    engine."""
    harness = EngineHarness(bound=BACKENDS[name]().bind(random_plan(TINY)))
    first = harness.complete(make_request("r1", CHAT, greedy(20, ignore_eos=True)))
    assert cached_tokens(first) == 0
    computed = harness.bound.statistics()["num_tokens"]
    prompt = (*CHAT, *first.token_ids(), 4, 5, 6)
    second = harness.complete(make_request("r2", prompt, greedy(20, ignore_eos=True)))
    # 69 tokens of the first turn were computed (the last sampled one never is): 4 whole blocks.
    assert cached_tokens(second) == 64
    assert harness.bound.statistics()["num_tokens"] - computed == len(prompt) - 64 + 19
    cold = EngineHarness(bound=BACKENDS[name]().bind(random_plan(TINY)))
    assert second.token_ids() == cold.complete(make_request("cold", prompt, greedy(20, ignore_eos=True))).token_ids()


def test_the_last_prompt_token_is_always_computed() -> None:
    """A prompt that is kept in whole leaves its last block to compute: only computing gives logits."""
    harness = EngineHarness()
    for request_id, expected in (("r1", 0), ("r2", 32)):
        outcome = harness.complete(make_request(request_id, CHAT[:48], greedy(4, ignore_eos=True)))
        assert cached_tokens(outcome) == expected


def test_requests_side_by_side_share_blocks() -> None:
    """While one runs, another with the same beginning holds the same blocks, and memory is counted once."""
    harness = EngineHarness()
    harness.submit(make_request("r1", CHAT, greedy(40, ignore_eos=True)))
    harness.run_round()
    alone = harness.engine.statistics().kv_used_bytes
    harness.submit(make_request("r2", (*CHAT[:48], 9), greedy(40, ignore_eos=True)))
    harness.run_round()
    assert harness.engine.statistics().kv_used_bytes == alone + BLOCK_BYTES
    harness.run_until_done()


def test_choices_share_the_prompts_full_blocks() -> None:
    """n choices hold the prompt's whole blocks once, and a copy each of the one that they write."""
    harness = EngineHarness()
    harness.submit(make_request("r", CHAT, greedy(10, ignore_eos=True), num_choices=3))
    harness.run_round()
    harness.run_round()
    assert harness.engine.statistics().kv_used_bytes == (3 + 3) * BLOCK_BYTES
    harness.run_until_done()


def test_nothing_is_kept_without_prefix_caching() -> None:
    """With caching off every prompt is computed in whole and all blocks are free at the end."""
    harness = EngineHarness(prefix_caching=False)
    for request_id in ("r1", "r2"):
        assert cached_tokens(harness.complete(make_request(request_id, CHAT))) == 0
    statistics = harness.engine.statistics()
    assert (statistics.kv_cached_bytes, statistics.kv_used_bytes, statistics.num_cached_tokens) == (0, 0, 0)


def test_preempted_request_finds_its_blocks_again() -> None:
    """What a preempted request had computed is kept while nobody needs the room: its second start is cheap."""
    harness = EngineHarness(max_running=1)
    batch = harness.submit(make_request("batch", CHAT, greedy(10, ignore_eos=True), priority=Priority.BATCH))
    harness.run_round()
    harness.submit(make_request("urgent", "7 8 9", greedy(2, ignore_eos=True)))
    harness.run_until_done()
    assert harness.engine.statistics().num_preemptions == 1
    prompts, decodes = 50 + 3, (10 - 1) + (2 - 1)
    again = 50 - 48  # of the first start, behind the last whole block
    assert harness.bound.statistics()["num_tokens"] == prompts + decodes + again
    assert cached_tokens(batch) == 0  # of the first start


def test_budget_is_kept_to_the_byte() -> None:
    """Whole blocks that fit the budget, reported; a request for one block more than that is refused with figures."""
    harness = EngineHarness(kv_budget_bytes=4 * BLOCK_BYTES + BLOCK_BYTES - 1)
    assert harness.engine.statistics().kv_total_bytes == 0  # before the first round
    fits = harness.complete(make_request("fits", (5,) * 40, greedy(25, ignore_eos=True)))
    assert harness.engine.statistics().kv_total_bytes == 4 * BLOCK_BYTES
    assert len(fits.token_ids()) == 25
    refused = harness.complete(make_request("refused", (5,) * 40, greedy(26, ignore_eos=True)))
    assert refused.final is not None
    assert refused.final.error is not None
    assert refused.final.error.code is ErrorCode.OUT_OF_MEMORY
    assert str(5 * BLOCK_BYTES) in refused.final.error.message


def submit(harness: EngineHarness, request_id: str, tenant: str, prompt: str = "5 6 7", tokens: int = 8) -> Outcome:
    """A request of ``tenant``."""
    sampling = greedy(tokens, ignore_eos=True)
    return harness.submit(EngineRequest(request_id, prompt, sampling, tenant=tenant))


def test_tenants_are_admitted_in_turn() -> None:
    """One request of a second tenant does not wait for all that the first one handed in before."""
    harness = EngineHarness(max_running=1)
    for i in range(6):
        submit(harness, f"many{i}", "many")
    harness.run_round()
    submit(harness, "one", "one")
    harness.run_until_done()
    assert harness.finished.index("one") == 1


def test_a_tenant_saves_up_no_claim_by_staying_away() -> None:
    """Who comes late is treated as the least served of those present: turns alternate from then on."""
    harness = EngineHarness(max_running=1)
    for i in range(4):
        submit(harness, f"early{i}", "early")
    harness.run_until_done()
    for i in range(3):
        submit(harness, f"a{i}", "early")
        submit(harness, f"b{i}", "late")
    harness.run_until_done()
    owners = [request_id[0] for request_id in harness.finished[4:]]
    assert sorted(owners[:2]) == sorted(owners[2:4]) == ["a", "b"]


def test_prompts_of_two_tenants_share_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short prompt of another tenant does not wait for the end of a long one that came first."""
    monkeypatch.setattr("worker.engine.prefill_budget.PrefillBudget.choose_tokens", lambda _self, _num_decodes: 16)
    harness = EngineHarness()
    long = submit(harness, "long", "a", " ".join(["5"] * 110))
    harness.run_round()
    short = submit(harness, "short", "b", " ".join(["6"] * 30))
    for _ in range(4):
        harness.run_round()
    assert short.events
    assert not long.events
    harness.run_until_done()


def test_prefill_budget_follows_what_steps_cost() -> None:
    """Prompt tokens beside decodes are as many as the slowdown allows, by measured times, in whole tiles."""
    budget = PrefillBudget()
    assert budget.choose_tokens(0) == PREFILL_TOKENS_PER_STEP
    assert (budget.choose_tokens(8) + 8) % 16 == 0
    for _ in range(20):
        budget.observe(8, 0, 20_000_000)
    for _ in range(40):
        chosen = budget.choose_tokens(8)
        budget.observe(8, chosen, 20_000_000 + 200_000 * chosen)
    assert abs(chosen - (SLOWDOWN - 1) * 20_000_000 / 200_000) <= 8
    assert (chosen + 8) % 16 == 0
    for _ in range(40):
        chosen = budget.choose_tokens(8)
        budget.observe(8, chosen, 20_000_000 + 10_000_000 * chosen)
    assert chosen == 8  # never none: a prompt always gets on
    budget.observe(8, 0, 20_000_000_000)  # a stall is not the price of a step
    assert budget.choose_tokens(8) == 8


def test_8192_token_prompt_runs_within_a_budget_of_its_size() -> None:
    """The longest prompt of an 8k model finds room in exactly its blocks, beside nothing else, and is kept."""
    config = replace(TINY, num_layers=1, context_length=8192)
    bound = NumKongBackend(1).bind(random_plan(config))
    harness = EngineHarness(config=config, bound=bound, kv_budget_bytes=512 * bound.kv_block_bytes)
    prompt = tuple(3 + i * i % 90 for i in range(8190))
    outcome = harness.complete(make_request("r", prompt, greedy(2, ignore_eos=True)))
    assert len(outcome.token_ids()) == 2
    statistics = harness.engine.statistics()
    assert statistics.kv_total_bytes == 512 * bound.kv_block_bytes
    again = harness.complete(make_request("again", prompt, greedy(2, ignore_eos=True)))
    assert cached_tokens(again) == 8176
    assert again.token_ids() == outcome.token_ids()
