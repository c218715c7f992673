"""Requests for the tokeniser alone: what they answer, what a second run adds, and guests that fail."""

from __future__ import annotations

from scheduler.contract.errors import ErrorCode
from tests.engine_fixtures import POISON, EngineHarness, FakeText
from worker.engine.text_requests import answer_text_request
from worker.engine.types import RequestStep, TextRequest


class _TokenizeOnly:
    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [7]


def token_ids(step: RequestStep) -> list[int]:
    return [event.token_id for event in step.events]


def test_text_becomes_token_ids_and_back() -> None:
    """One step, with usage and marks."""
    step = answer_text_request(TextRequest("a", "5 6 7"), FakeText())
    assert (token_ids(step), step.finished, step.usage.prompt_tokens) == ([5, 6, 7], True, 3)
    assert step.marks
    step = answer_text_request(TextRequest("b", (5, 6)), FakeText())
    assert [(event.token_id, event.text) for event in step.events] == [(-1, "<5><6>")]


def test_a_second_run_adds_what_the_first_one_did_not_log() -> None:
    """Nothing comes twice; the count is of all."""
    step = answer_text_request(TextRequest("a", "5 6 7", num_emitted=2), FakeText())
    assert (token_ids(step), step.usage.prompt_tokens) == ([7], 3)


def test_failures_are_the_requests_own() -> None:
    """A guest that traps, and one that has no way back to text."""
    step = answer_text_request(TextRequest("a", POISON), FakeText())
    assert step.finished
    assert step.error is not None
    assert step.error.code is ErrorCode.GUEST_FAILED
    step = answer_text_request(TextRequest("a", (1,)), _TokenizeOnly())
    assert step.error is not None
    assert step.error.code is ErrorCode.INVALID_REQUEST


def test_the_engine_answers_them_without_a_step() -> None:
    """In the round in which they arrive."""
    harness = EngineHarness()
    outcome = harness.complete(TextRequest("a", "5 6"))
    assert outcome.token_ids() == [5, 6]
    assert harness.engine.statistics().num_steps == 0
