"""A hostile guest under the real engine: the request that springs its attack fails, the others do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from engine_fixtures import EngineHarness, greedy, make_request
from hostile_guests import LIES, LIMITS, TRAPS, hostile_guest

from guests.runtime import GuestEngine
from guests.text import GuestText
from scheduler.contract.errors import ErrorCode

PROMPT = "\x05\x06\x07"  # the guest's tokens are bytes
ATTACK_PROMPT = "!\x06\x07"
FORCE_ATTACK = {33: 100.0}  # the next token is the one that springs the attack
AVOID_ATTACK = {33: -100.0}
NUM_TOKENS = 12

ATTACKS = TRAPS | {f"result: {name}": (f"(i64.const {lie})", "") for name, lie in LIES.items()}


@contextmanager
def harness_of(wasm: bytes) -> Iterator[EngineHarness]:
    """The engine on a tiny model with this guest's text side."""
    with GuestEngine() as engine:
        engine.start_ticker()
        module = engine.compile(wasm)
        text = GuestText(module, 1, LIMITS)
        yield EngineHarness(text=text)
        text.close()
        module.close()


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What an honest request gets from an honest guest."""
    with harness_of(hostile_guest()) as harness:
        outcome = harness.complete(make_request("alone", PROMPT, greedy(NUM_TOKENS, logit_bias=AVOID_ATTACK)))
        assert len(outcome.token_ids()) == NUM_TOKENS
        return outcome.token_ids()


@pytest.mark.parametrize("attack", ATTACKS)
def test_threat_prompt_springs_an_attack(attack: str, expected: list[int]) -> None:
    """The tokeniser attacks while another request runs: that one goes on, and the next one is right."""
    with harness_of(hostile_guest("gp_tokenize", ATTACKS[attack][0])) as harness:
        honest = greedy(NUM_TOKENS, logit_bias=AVOID_ATTACK)
        running = harness.submit(make_request("running", PROMPT, honest))
        for _ in range(3):
            harness.run_round()
        attacked = harness.submit(make_request("attacked", ATTACK_PROMPT, honest))
        harness.run_until_done()
        assert attacked.final is not None
        assert attacked.final.error is not None
        assert attacked.final.error.code is ErrorCode.GUEST_FAILED
        assert attacked.token_ids() == []
        assert running.token_ids() == expected
        assert running.final is not None
        assert running.final.error is None
        assert harness.complete(make_request("next", PROMPT, honest)).token_ids() == expected


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_token_that_springs_an_attack_fails_alone(attack: str, expected: list[int]) -> None:
    """The detokeniser attacks in the middle of a batch."""
    with harness_of(hostile_guest("gp_sequence_push", ATTACKS[attack][0])) as harness:
        honest = greedy(NUM_TOKENS, logit_bias=AVOID_ATTACK)
        running = harness.submit(make_request("running", PROMPT, honest))
        harness.run_round()
        attacked = harness.submit(make_request("attacked", PROMPT, greedy(NUM_TOKENS, logit_bias=FORCE_ATTACK)))
        harness.run_until_done()
        assert attacked.final is not None
        assert attacked.final.error is not None
        assert running.token_ids() == expected
        assert harness.complete(make_request("next", PROMPT, honest)).token_ids() == expected
