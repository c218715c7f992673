"""Output grammars in the engine: every choice matches, ends where it must, and survives replay, drafts and company."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from engine_fixtures import EOS, EngineHarness, FakeText, FakeTextSequence, Outcome, greedy, make_request

from guests.abi import SequenceEnd
from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import OutputGrammar, SamplingParams
from scheduler.contract.states import FinishReason, GrammarKind
from worker.engine.text import PushResult

PATTERN = "[A-Z]{3,9}b(cc){1,2}d"


class SpelledSequence(FakeTextSequence):
    """One token is one character; stop strings are single characters."""

    def push(self, token_id: int) -> PushResult:
        pushed = super().push(token_id)
        if pushed.end is not SequenceEnd.NONE:
            return pushed
        character = chr(32 + token_id)
        return PushResult("", SequenceEnd.STOP_STRING) if character in self.stop else PushResult(character, pushed.end)


@dataclass
class SpelledText(FakeText):
    """Token ``i`` is the ASCII character ``32 + i``, but for the end token."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"<eos>" if token_id == EOS else bytes([32 + token_id])

    def detokenize(self, token_ids: list[int], *, show_special: bool = False) -> str:
        shown = [token_id for token_id in token_ids if show_special or token_id != EOS]
        return b"".join(map(self.token_bytes, shown)).decode()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [ord(character) - 32 for character in text]

    def open_sequence(
        self, stop: tuple[str, ...], *, ignore_stop_tokens: bool = False, keep_leading_space: bool = False
    ) -> FakeTextSequence:
        self.num_open += 1
        return SpelledSequence(self, stop, ignore_stop_tokens, self.generation)


def by_pattern(pattern: str) -> OutputGrammar:
    return OutputGrammar(GrammarKind.REGEX, pattern)


def sampled(max_tokens: int = 40, pattern: str = PATTERN, **changes: Any) -> SamplingParams:
    """Sampling at temperature 1 under a grammar."""
    return SamplingParams(**{"seed": 3, "max_tokens": max_tokens, "grammar": by_pattern(pattern), **changes})


def make_harness(**changes: Any) -> EngineHarness:
    return EngineHarness(text=SpelledText(), **changes)


def complete(harness: EngineHarness, sampling: SamplingParams, **changes: Any) -> Outcome:
    return harness.complete(make_request("r", "Spell:", sampling, **changes))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_choice_matches_and_ends_with_its_grammar(temperature: float) -> None:
    """Several choices of one request: each its own text of the grammar, ended by it and not by an end token."""
    outcome = complete(make_harness(), sampled(temperature=temperature, num_top_logprobs=2), num_choices=3)
    assert outcome.final is not None
    assert outcome.final.error is None
    for choice in range(3):
        assert re.fullmatch(PATTERN, outcome.text(choice))
        assert outcome.finish_reasons()[choice] == FinishReason.STOP
        assert EOS not in outcome.token_ids(choice)
    assert all(event.logprob is not None and len(event.logprob.top) == 2 for event in outcome.events)
    assert temperature == 0 or len({outcome.text(choice) for choice in range(3)}) > 1


def test_a_run_goes_on_where_an_earlier_one_stopped() -> None:
    """Replayed tokens advance the grammar: the rest is what the unbroken run had, also where nothing was left."""
    whole = complete(make_harness(), sampled()).token_ids()
    for num_emitted in (1, len(whole) - 1, len(whole)):
        outcome = complete(make_harness(), sampled(), emitted=(tuple(whole[:num_emitted]),))
        assert outcome.token_ids() == whole[num_emitted:]
        assert outcome.final is not None
        assert outcome.final.usage.completion_tokens == len(whole)


def test_replayed_tokens_of_another_grammar_end_the_request() -> None:
    """A log that does not fit its request is an error of that request."""
    outcome = complete(make_harness(), sampled(), emitted=((40, 9),))
    assert outcome.final is not None
    assert outcome.final.error is not None
    assert outcome.final.error.param == "response_format"


def test_company_without_a_grammar_keeps_its_tokens() -> None:
    """Free text beside constrained text, joining before, while and after the grammar is compiled."""
    expected = make_harness().complete(make_request("solo", (11, 12, 13), greedy(20, ignore_eos=True))).token_ids()
    harness = make_harness()
    free = [harness.submit(make_request("first", (11, 12, 13), greedy(20, ignore_eos=True)))]
    bound = harness.submit(make_request("bound", "Spell:", sampled()))
    harness.run_round()
    free.append(harness.submit(make_request("second", (11, 12, 13), greedy(20, ignore_eos=True))))
    harness.run_until_done()
    assert [outcome.token_ids() for outcome in free] == [expected] * 2
    assert bound.text() == complete(make_harness(), sampled()).text()


def test_a_grammar_that_cannot_be_enforced_is_the_clients_error() -> None:
    """Refused before a token, naming response_format; a request beside it goes on."""
    harness = make_harness()
    beside = harness.submit(make_request("beside", "Spell:", greedy(4)))
    refused = harness.submit(make_request("refused", "Spell:", sampled(pattern="(")))
    harness.run_until_done()
    assert refused.final is not None
    assert refused.final.error is not None
    assert (refused.final.error.code, refused.final.error.param) == (ErrorCode.INVALID_REQUEST, "response_format")
    assert not refused.events
    assert beside.final is not None
    assert beside.final.error is None


def test_a_request_is_cancelled_while_its_grammar_is_compiled() -> None:
    """It ends as cancelled, frees its text state, and its grammar's end is nobody's business any more."""
    harness = make_harness()
    outcome = harness.submit(make_request("r", "Spell:", sampled()))
    harness.cancel("r")
    harness.run_round()
    assert outcome.final is not None
    assert outcome.final.error is not None
    assert outcome.final.error.code is ErrorCode.CANCELLED
    harness.complete(make_request("next", "Spell:", sampled()))


def test_stop_strings_and_lengths_still_end_a_choice() -> None:
    """Both cut the text before the grammar's end, as the client asked."""
    assert complete(make_harness(), sampled(2)).finish_reasons() == {0: FinishReason.LENGTH}
    stopped = complete(make_harness(), sampled(stop=("b",)))
    assert stopped.finish_reasons() == {0: FinishReason.STOP}
    assert "b" not in stopped.text()


def test_ignoring_end_tokens_cannot_run_past_the_grammar() -> None:
    """Where nothing may follow, the choice is finished, whether or not end tokens are suppressed."""
    outcome = complete(make_harness(), sampled(ignore_eos=True, min_tokens=30))
    assert re.fullmatch(PATTERN, outcome.text())


def test_drafts_under_a_grammar_change_nothing() -> None:
    """Masks behind guessed tokens are those that the tokens themselves would have had."""
    pattern = "(ab(c|d)){4,12}e"
    for seed in range(6):
        sampling = sampled(pattern=pattern, seed=seed, logit_bias={ord("e") - 32: -2.0}, frequency_penalty=0.1)
        harness = make_harness(max_draft_tokens=8)
        outcome = complete(harness, sampling)
        assert outcome.token_ids() == complete(make_harness(), sampling).token_ids()
        assert re.fullmatch(pattern, outcome.text())
        assert harness.engine.statistics().num_kept_tokens > 0
