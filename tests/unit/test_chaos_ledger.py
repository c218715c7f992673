"""The chaos tool's own books: what it calls a gap, a repeat, a wrong text, a recovery. A tool that cannot find fault
proves nothing."""

from __future__ import annotations

import json

from loadtest.chaos_clients import Entry, Question
from loadtest.chaos_faults import StruckFault, plan_faults
from loadtest.chaos_verdict import judge

QUESTION = Question("capital?", 8, "Paris is it")


def entry_of(*events: tuple[str, str]) -> Entry:
    """An accepted entry that took ``events``: (number, text)."""
    entry = Entry(QUESTION, is_streamed=True, sent_s=0.0, accepted_s=1.0, request_id="R")
    for number, text in events:
        entry.take(f"R:{number}" if number else "", text)
    return entry


def chunk(text: str) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}}]})


def test_a_whole_answer_is_clean() -> None:
    """Consecutive events, one end, the text of the solo run."""
    entry = entry_of(("1", chunk("Paris ")), ("2", chunk("is it")), ("", "[DONE]"))
    verdict = judge([entry], [])
    assert verdict.is_clean
    assert verdict.outcomes == {"completed": 1}


def test_gaps_repeats_wrong_texts_losses_and_double_ends_are_found() -> None:
    """Each kind of damage shows in its own count."""
    gap = entry_of(("1", chunk("Paris ")), ("3", chunk("it")), ("", "[DONE]"))
    repeat = entry_of(("1", chunk("Paris ")), ("1", chunk("is it")), ("", "[DONE]"))
    wrong = entry_of(("1", chunk("Lyon")), ("", "[DONE]"))
    lost = entry_of(("1", chunk("Paris ")))
    twice = entry_of(("1", chunk("Paris is it")), ("", "[DONE]"), ("", "[DONE]"))
    assert judge([gap], []).gaps == 1
    assert judge([repeat], []).repeats == 1
    assert judge([wrong], []).wrong == 1
    assert judge([lost], []).lost == 1
    assert judge([twice], []).double_ends == 1
    for entry in (gap, repeat, wrong, lost, twice):
        assert not judge([entry], []).is_clean


def test_an_error_event_ends_a_request_with_its_reason() -> None:
    """Not lost: the client was told."""
    entry = entry_of(("1", chunk("Paris ")), ("", json.dumps({"error": {"code": "worker_failed"}})))
    verdict = judge([entry], [])
    assert verdict.errors == {"worker_failed": 1}
    assert verdict.is_clean


def test_a_recovery_is_measured_from_the_fault_to_the_end_of_the_silence() -> None:
    """The silence that begins at the fault counts, not the ordinary time between two tokens."""
    entry = entry_of()
    entry.content_at_s = [10.0, 10.1, 10.2, 11.7, 11.8]
    entry.outcome = "completed"
    verdict = judge([entry], [StruckFault("worker killed", 10.15, 1, is_pair=False)])
    count, p50_s, _ = verdict.recovery_s["worker killed"]
    assert (count, round(p50_s, 6)) == (1, 1.55)


def test_a_schedule_follows_from_its_seed() -> None:
    """Equal seeds, equal faults; it ends before the run does."""
    assert plan_faults(3, 300, 5) == plan_faults(3, 300, 5)
    assert plan_faults(3, 300, 5) != plan_faults(4, 300, 5)
    assert sum(fault.after_s for fault in plan_faults(3, 300, 5)) < 300
    assert {kind.name for fault in plan_faults(3, 900, 8) for kind in fault.kinds} >= {"worker killed", "redis killed"}
