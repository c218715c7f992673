"""Tenants never share KV blocks: neither while both run nor through what is kept, whatever they ask."""

from __future__ import annotations

from engine_fixtures import EngineHarness, Outcome, greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.types import EngineRequest

SECRET = tuple(3 + i * 13 % 90 for i in range(64))


def submit(harness: EngineHarness, request_id: str, tenant: str, prompt: tuple[int, ...] = SECRET) -> Outcome:
    """A request of ``tenant``."""
    return harness.submit(EngineRequest(request_id, prompt, greedy(4, ignore_eos=True), tenant=tenant))


def cached_tokens(outcome: Outcome) -> int:
    """What the request's usage says, which is also what shows in its time to first token."""
    assert outcome.final is not None
    return outcome.final.usage.cached_tokens


def test_a_guess_at_another_tenants_prompt_finds_nothing() -> None:
    """The very prompt of another tenant is computed in whole: neither usage nor work tells that it was asked before."""
    harness = EngineHarness()
    submit(harness, "victim", "victim")
    harness.run_until_done()
    computed = harness.bound.statistics()["num_tokens"]
    for tenant in ("other", "", "victim ", "VICTIM", "victi"):
        guess = submit(harness, f"by {tenant}", tenant)
        harness.run_until_done()
        assert cached_tokens(guess) == 0
        assert harness.bound.statistics()["num_tokens"] - computed == len(SECRET) + 3
        computed = harness.bound.statistics()["num_tokens"]
    own = submit(harness, "again", "victim")
    harness.run_until_done()
    assert cached_tokens(own) == 48


def test_a_tenant_cannot_name_itself_into_the_operators_partition() -> None:
    """Names that look like the pool's own partitions are tenants like any other."""
    harness = EngineHarness()
    submit(harness, "plain", "")
    harness.run_until_done()
    for tenant in ("primed", "tenant ", "tenant", "\x00"):
        guess = submit(harness, f"by {tenant!r}", tenant)
        harness.run_until_done()
        assert cached_tokens(guess) == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 3), st.booleans()), min_size=2, max_size=12))
def test_no_block_is_held_or_kept_for_two_tenants(script: list[tuple[str, int, bool]]) -> None:
    """Over any requests with common beginnings: a block table never has a block that another tenant's tokens fill."""
    harness = EngineHarness(max_running=3)
    owner_of: dict[int, str] = {}
    for number, (tenant, extra, runs_on) in enumerate(script):
        submit(harness, f"r{number}", tenant, (*SECRET, *range(5, 5 + extra)))
        for _ in range(1 if runs_on else 8):
            harness.run_round()
            held: dict[int, set[str]] = {}
            for request in harness.engine._running:
                for choice in request.choices:
                    for block in choice.blocks:
                        held.setdefault(block, set()).add(request.request.tenant)
                    for block in choice.blocks[: choice.num_remembered]:
                        owner_of[block] = request.request.tenant
            assert all(len(tenants) == 1 for tenants in held.values())
            pool = harness.engine._kv.pool
            for tenant_name in "abc":
                key = pool.make_root(f"tenant {tenant_name}")
                for index in range(4):
                    key = pool.extend_key(key, SECRET[16 * index : 16 * index + 16])
                    found = pool.find(key)
                    assert found is None or owner_of[found] == tenant_name
    harness.run_until_done()
