"""The engine on a tiny random model: batching, admission, errors, replay. Driven round by round, no threads but one."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from engine_fixtures import EOS, POISON, EngineHarness, FakeText, Outcome, greedy, make_request
from eventually import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_programs import TINY, compute_logits, random_plan

from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import SamplingParams
from scheduler.contract.states import FinishReason, Priority
from scheduler.contract.telemetry import Mark
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import FloatArray, SequenceInput

PROMPTS = ["5 6 7", "11 12 13 14 15 16 17", "3", "40 41 42 43 44"]
BLOCK_BYTES = 16 * 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
LONG_PROMPT = tuple(3 + i % 80 for i in range(100))


def solo(prompt: str | tuple[int, ...], sampling: SamplingParams, num_choices: int = 1) -> Outcome:
    """What a request gets on an engine of its own."""
    return EngineHarness().complete(make_request("solo", prompt, sampling, num_choices=num_choices))


SOLO_TOKENS = [solo(prompt, greedy(12)).token_ids() for prompt in PROMPTS]


def test_greedy_tokens_equal_the_backends_own_argmax() -> None:
    """The engine adds nothing to what the backend computes step by step."""
    bound = NumpyBackend().bind(random_plan(TINY))
    bound.open_kv(2)
    table = (0, 1)
    tokens = [5, 6, 7]
    logits = compute_logits(bound, SequenceInput(table, 0, (5, 6, 7)))
    for _ in range(11):
        tokens.append(int(logits[0].argmax()))
        logits = compute_logits(bound, SequenceInput(table, len(tokens) - 1, (tokens[-1],)))
    tokens.append(int(logits[0].argmax()))
    assert SOLO_TOKENS[0] == tokens[3:][: len(SOLO_TOKENS[0])]


def test_final_step_has_usage_marks_and_reason() -> None:
    """The last step carries usage; the first token's marks are in order; the last event says why it ended."""
    outcome = solo("5 6 7", greedy(4, ignore_eos=True))
    assert outcome.final is not None
    assert (outcome.final.usage.prompt_tokens, outcome.final.usage.completion_tokens) == (3, 4)
    assert outcome.finish_reasons() == {0: FinishReason.LENGTH}
    marks = outcome.marks
    assert marks[Mark.TOKENISED] <= marks[Mark.PREFILLED] <= marks[Mark.SAMPLED]
    assert outcome.text() == "".join(f"<{token}>" for token in outcome.token_ids())


@settings(max_examples=40, deadline=None)
@given(
    script=st.lists(
        st.tuples(st.sampled_from(["join", "cancel", "round"]), st.integers(0, 3)), min_size=4, max_size=30
    ),
    max_running=st.integers(1, 4),
    budget_blocks=st.integers(2, 8),
)
def test_any_interleaving_leaves_every_sequence_its_solo_tokens(
    script: list[tuple[str, int]], max_running: int, budget_blocks: int
) -> None:
    """Joins, leaves, cancels and preemptions in any order change no token of anybody else."""
    harness = EngineHarness(max_running=max_running, kv_budget_bytes=budget_blocks * BLOCK_BYTES)
    prompt_of: dict[str, int] = {}
    cancelled: set[str] = set()
    for action, number in script:
        if action == "join":
            request_id = f"r{len(prompt_of)}"
            prompt_of[request_id] = number
            harness.submit(make_request(request_id, PROMPTS[number], greedy(12)))
        elif action == "cancel" and prompt_of:
            request_id = list(prompt_of)[number % len(prompt_of)]
            if harness.outcomes[request_id].final is None:
                cancelled.add(request_id)
            harness.cancel(request_id)
        else:
            harness.run_round()
    harness.run_until_done()
    for request_id, number in prompt_of.items():
        outcome = harness.outcomes[request_id]
        expected = SOLO_TOKENS[number]
        assert outcome.final is not None
        if request_id in cancelled:
            assert outcome.token_ids() == expected[: len(outcome.events)]
        else:
            assert outcome.token_ids() == expected
    assert harness.text.num_open == 0
    assert harness.engine.statistics().kv_used_bytes == 0


def test_preempted_request_goes_on_where_it_was() -> None:
    """With KV memory for too few blocks the later request waits, computes its tokens again, and repeats none."""
    sampling = greedy(100, ignore_eos=True)
    expected = [solo(prompt, sampling).token_ids() for prompt in PROMPTS[:2]]
    harness = EngineHarness(kv_budget_bytes=9 * BLOCK_BYTES)
    outcomes = [harness.submit(make_request(f"r{i}", PROMPTS[i], sampling)) for i in range(2)]
    harness.run_until_done()
    assert harness.engine.statistics().num_preemptions > 0
    assert [outcome.token_ids() for outcome in outcomes] == expected


def test_long_prompt_is_prefilled_in_chunks_beside_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running sequence gets a token in every step while a longer prompt is computed in pieces."""
    harness = EngineHarness()
    monkeypatch.setattr("worker.engine.prefill_budget.PrefillBudget.choose_tokens", lambda _self, _num_decodes: 16)
    short = harness.submit(make_request("short", "5 6 7", greedy(40, ignore_eos=True)))
    harness.run_round()
    long = harness.submit(make_request("long", LONG_PROMPT, greedy(4, ignore_eos=True)))
    for expected_tokens in range(2, 8):
        harness.run_round()
        assert len(short.events) == expected_tokens
        assert not long.events
    harness.run_until_done()
    assert long.token_ids() == solo(LONG_PROMPT, greedy(4, ignore_eos=True)).token_ids()


def test_interactive_takes_the_place_of_batch() -> None:
    """With one place, a batch request gives way to an interactive one and finishes afterwards, unharmed."""
    harness = EngineHarness(max_running=1)
    sampling = greedy(10, ignore_eos=True)
    batch = harness.submit(make_request("batch", "5 6 7", sampling, priority=Priority.BATCH))
    for _ in range(3):
        harness.run_round()
    interactive = harness.submit(make_request("inter", "9 10", sampling))
    while not interactive.final:
        harness.run_round()
    assert batch.final is None
    harness.run_until_done()
    assert batch.token_ids() == solo("5 6 7", sampling).token_ids()


def test_choices_share_one_prefill() -> None:
    """n choices compute the prompt once, and each draws from its own stream of random numbers."""
    sampling = SamplingParams(seed=7, max_tokens=6, temperature=1.0, ignore_eos=True)
    harness = EngineHarness()
    outcome = harness.complete(make_request("r", LONG_PROMPT, sampling, num_choices=3))
    assert harness.bound.statistics()["num_tokens"] == len(LONG_PROMPT) + 2 + 3 * 5
    assert outcome.finish_reasons() == dict.fromkeys(range(3), FinishReason.LENGTH)
    assert len({tuple(outcome.token_ids(choice)) for choice in range(3)}) == 3
    assert outcome.token_ids(0) == solo(LONG_PROMPT, sampling).token_ids()
    assert outcome.final is not None
    assert outcome.final.usage.completion_tokens == 18


def test_same_seed_gives_the_same_tokens_beside_others() -> None:
    """A seeded request draws the same tokens alone and in a batch of strangers."""
    sampling = SamplingParams(seed=99, max_tokens=10, temperature=0.9, top_p=0.9, ignore_eos=True)
    expected = solo("5 6 7", sampling).token_ids()
    harness = EngineHarness()
    for i in range(3):
        harness.submit(make_request(f"other{i}", PROMPTS[i], SamplingParams(seed=i, max_tokens=12)))
    harness.run_round()
    outcome = harness.submit(make_request("r", "5 6 7", sampling))
    harness.run_until_done()
    assert outcome.token_ids() == expected


@pytest.mark.parametrize("num_emitted", [0, 1, 5, 9])
def test_replayed_request_goes_on_with_the_same_tokens(num_emitted: int) -> None:
    """After a crash the log's tokens are replayed, none is emitted twice, and the rest equals the undisturbed run."""
    sampling = SamplingParams(seed=3, max_tokens=10, temperature=1.0, frequency_penalty=0.5, ignore_eos=True)
    undisturbed = solo("5 6 7", sampling, num_choices=2)
    emitted = (
        tuple(undisturbed.token_ids(0)[:num_emitted]),
        tuple(undisturbed.token_ids(1)[: num_emitted // 2]),
    )
    again = EngineHarness().complete(make_request("r", "5 6 7", sampling, num_choices=2, emitted=emitted))
    for choice in range(2):
        assert list(emitted[choice]) + again.token_ids(choice) == undisturbed.token_ids(choice)
    assert again.final is not None
    assert undisturbed.final is not None
    assert again.final.usage == undisturbed.final.usage


def test_replay_of_a_finished_request_only_ends_it() -> None:
    """A run that died between its last token and its end is ended without another token."""
    tokens = tuple(solo("5 6 7", greedy(5)).token_ids())
    again = EngineHarness().complete(make_request("r", "5 6 7", greedy(5), emitted=(tokens,)))
    assert again.events == []
    assert again.final is not None
    assert again.final.usage.completion_tokens == len(tokens)


def test_the_stop_string_that_ended_a_choice_is_named() -> None:
    """With one string and among several; a stop token and an end by length name none."""
    third = solo("5 6 7", greedy(8, ignore_eos=True)).token_ids()[2]
    for stop in ((f"<{third}>",), ("<9999>", f"<{third}>", "never")):
        events = solo("5 6 7", greedy(8, ignore_eos=True, stop=stop)).events
        assert [event.stop_sequence for event in events] == [None, None, f"<{third}>"]
    assert solo("5 6 7", greedy(2, ignore_eos=True, stop=("a", "b"))).events[-1].stop_sequence is None
    assert solo("5 6 7", greedy(8, logit_bias={EOS: 1000.0}, stop=("a", "b"))).events[-1].stop_sequence is None


def test_stop_string_and_stop_token_end_with_stop() -> None:
    """What the guest's stop rules end has reason stop, and the stop itself is not in the text."""
    free = solo("5 6 7", greedy(8, ignore_eos=True))
    third = free.token_ids()[2]
    stopped = solo("5 6 7", greedy(8, ignore_eos=True, stop=(f"<{third}>",)))
    assert stopped.finish_reasons() == {0: FinishReason.STOP}
    assert f"<{third}>" not in stopped.text()
    ended = solo("5 6 7", greedy(8, logit_bias={EOS: 1000.0}))
    assert (ended.token_ids(), ended.finish_reasons()) == ([EOS], {0: FinishReason.STOP})


def test_min_tokens_holds_the_end_token_back() -> None:
    """The end token cannot be sampled before min_tokens tokens were."""
    outcome = solo("5 6 7", greedy(8, logit_bias={EOS: 1000.0}, min_tokens=3))
    assert outcome.token_ids().index(EOS) == 3


@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "mentions"),
    [
        (tuple([5] * 128), greedy(4), ErrorCode.CONTEXT_LENGTH_EXCEEDED, ["128 tokens", "context is 128"]),
        ((5, 96), greedy(4), ErrorCode.INVALID_REQUEST, ["96"]),
        ("", greedy(4), ErrorCode.INVALID_REQUEST, ["no tokens"]),
        ("5 6", greedy(4, logit_bias={500: 1.0}), ErrorCode.INVALID_REQUEST, ["500"]),
        (POISON, greedy(4), ErrorCode.GUEST_FAILED, ["unreachable"]),
    ],
)
def test_request_that_cannot_run_ends_with_its_error(
    prompt: str | tuple[int, ...], sampling: SamplingParams, code: ErrorCode, mentions: list[str]
) -> None:
    """Each refusal names its cause and numbers, and leaves nothing behind."""
    harness = EngineHarness()
    outcome = harness.complete(make_request("r", prompt, sampling))
    assert outcome.final is not None
    assert outcome.final.error is not None
    assert outcome.final.error.code is code
    assert all(part in outcome.final.error.message for part in mentions)
    assert harness.text.num_open == 0


def test_request_that_can_never_fit_is_refused() -> None:
    """More KV memory than the whole budget is an error at once, not an endless wait."""
    harness = EngineHarness(kv_budget_bytes=64 * 256)
    outcome = harness.complete(make_request("r", "5 6 7", greedy(100)))
    assert outcome.final is not None
    assert outcome.final.error is not None
    assert outcome.final.error.code is ErrorCode.OUT_OF_MEMORY


def test_max_tokens_are_cut_to_the_context() -> None:
    """A completion ends with reason length where the context is full."""
    outcome = solo(LONG_PROMPT, greedy(10_000, ignore_eos=True))
    assert len(outcome.events) == TINY.context_length - len(LONG_PROMPT)
    assert outcome.finish_reasons() == {0: FinishReason.LENGTH}


def test_zero_max_tokens_ends_at_once() -> None:
    """A request for no tokens computes nothing and ends with reason length."""
    outcome = solo("5 6 7", greedy(0))
    assert (outcome.token_ids(), outcome.finish_reasons()) == ([-1], {0: FinishReason.LENGTH})


def test_cancel_frees_the_blocks_before_the_next_step() -> None:
    """A cancelled request has no KV blocks, no guest state and no further event after one round."""
    harness = EngineHarness()
    outcome = harness.submit(make_request("r", "5 6 7", greedy(100, ignore_eos=True)))
    for _ in range(3):
        harness.run_round()
    harness.cancel("r")
    harness.run_round()
    assert len(outcome.events) == 3
    assert outcome.final is not None
    assert outcome.final.error is not None
    assert outcome.final.error.code is ErrorCode.CANCELLED
    assert (harness.engine.statistics().kv_used_bytes, harness.text.num_open) == (0, 0)


def test_guest_trap_ends_its_request_only() -> None:
    """A trap loses the shared guest instance; the culprit ends, the others rebuild their text and go on."""
    sampling = greedy(10, ignore_eos=True)
    expected = solo("5 6 7", sampling)
    harness = EngineHarness()
    innocent = harness.submit(make_request("innocent", "5 6 7", sampling))
    harness.run_round()
    harness.run_round()
    harness.text.trap_on = set(range(96)) - set(expected.token_ids())
    culprit = harness.submit(make_request("culprit", "9 10", greedy(4, logit_bias={95: 1e6})))
    harness.submit(make_request("poison", POISON))
    harness.run_until_done()
    assert culprit.final is not None
    assert culprit.final.error is not None
    assert culprit.final.error.code is ErrorCode.GUEST_FAILED
    assert innocent.text() == expected.text()


class FailingModel:
    """A bound model whose next step raises when told so."""

    def __init__(self) -> None:
        self._bound = NumpyBackend().bind(random_plan(TINY))
        self.fails = False
        self.kv_block_bytes = self._bound.kv_block_bytes

    def __getattr__(self, name: str) -> object:
        return getattr(self._bound, name)

    def step(self, inputs: tuple[SequenceInput, ...]) -> FloatArray:
        if self.fails:
            raise RuntimeError("device lost")
        return self._bound.step(inputs)


def test_step_failure_ends_its_batch_and_the_engine_survives() -> None:
    """Requests in the failed step end with WORKER_FAILED; a later one is served."""
    bound = FailingModel()
    harness = EngineHarness(bound=bound)  # type: ignore[arg-type]  # delegates to a BoundModel
    outcomes = [harness.submit(make_request(f"r{i}", PROMPTS[i])) for i in range(2)]
    harness.run_round()
    bound.fails = True
    harness.run_round()
    for outcome in outcomes:
        assert outcome.final is not None
        assert outcome.final.error is not None
        assert outcome.final.error.code is ErrorCode.WORKER_FAILED
    bound.fails = False
    assert harness.complete(make_request("later", "5 6 7", greedy(12))).token_ids() == SOLO_TOKENS[0]


def test_newer_submission_supersedes_a_known_request() -> None:
    """A request handed in again under its id runs once, from the newer submission."""
    harness = EngineHarness()
    harness.submit(make_request("r", "5 6 7", greedy(50, ignore_eos=True)))
    harness.run_round()
    newer = harness.complete(make_request("r", "5 6 7", greedy(12)))
    assert newer.token_ids() == SOLO_TOKENS[0]


def test_logprobs_come_from_the_unmodified_logits() -> None:
    """Sampling parameters change the choice, never the reported log-probabilities."""
    plain = solo("5 6 7", greedy(1, num_top_logprobs=3)).events[0].logprob
    biased = solo("5 6 7", greedy(1, num_top_logprobs=3, logit_bias={50: 1000.0})).events[0].logprob
    assert plain is not None
    assert biased is not None
    assert biased.token_id == 50
    assert biased.top == plain.top
    assert plain.top[0].token_id == plain.token_id
    assert [entry.logprob for entry in plain.top] == sorted((e.logprob for e in plain.top), reverse=True)


async def test_engine_thread_serves_submissions_and_stops() -> None:
    """The real loop on its own thread: it sleeps idle, serves what is submitted from outside, and stops."""
    harness = EngineHarness()
    thread = threading.Thread(target=harness.engine.run, name="engine")
    thread.start()
    try:
        for round_number in range(2):
            request = make_request(f"r{round_number}", "5 6 7", greedy(12))
            outcome = harness.outcomes[request.request_id] = Outcome()
            harness.engine.submit(request)
            await eventually(lambda outcome=outcome: outcome.final is not None)
            assert outcome.token_ids() == SOLO_TOKENS[0]
    finally:
        harness.engine.stop()
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert harness.engine.statistics().tokens_generated == 2 * len(SOLO_TOKENS[0])


def test_a_completion_continues_its_prompt_and_a_chats_answer_does_not() -> None:
    """The detokeniser is told which it is: a space at the beginning belongs to the one and not to the other."""
    text = FakeText()
    harness = EngineHarness(text=text)
    request = make_request("completion", "5 6 7", greedy(2))
    harness.complete(request)
    harness.complete(replace(request, request_id="chat", add_special=False))
    assert text.continued == [True, False]
