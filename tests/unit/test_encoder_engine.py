"""The encoder's step loop, driven round by round: batches, turns, limits, replay and failures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from guests.abi import ProgramKind
from guests.program import Program
from scheduler.contract.errors import ErrorCode
from scheduler.contract.messages import SamplingParams
from scheduler.contract.states import Priority
from worker.backends.encoder_protocol import EncoderPlan
from worker.backends.protocol import BackendLost, FloatArray
from worker.engine.encoder_engine import STEP_TOKENS, EncoderEngine, shorten
from worker.engine.mailbox import Mail
from worker.engine.types import EncodeRequest, EngineRequest, RequestStep
from worker.loaded_model import LoadedEncoder
from worker.vector_frames import CHUNK_BYTES, split_vector

CONTEXT = 300


class _Words:
    """A text's token ids are its numbers, between 1 and 2."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [1, *map(int, text.split()), 2]


class _Sums:
    """The vector of a sequence is (number of tokens, their sum, 0)."""

    def __init__(self) -> None:
        self.batches: list[tuple[tuple[int, ...], ...]] = []
        self.fails = False
        self.error: Exception = RuntimeError("the device is gone")

    def encode(self, sequences: tuple[tuple[int, ...], ...]) -> FloatArray:
        if self.fails:
            raise self.error
        self.batches.append(sequences)
        return np.array([(len(sequence), sum(sequence), 0) for sequence in sequences], np.float32)

    def prepare_step(self, num_tokens: int) -> None: ...

    def statistics(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None: ...


class _Harness:
    def __init__(self) -> None:
        self.bound = _Sums()
        plan = EncoderPlan(Program(ProgramKind.ENCODE, 0, ()), (), 1000, CONTEXT, 3)
        self.steps: list[RequestStep] = []
        self.engine = EncoderEngine(LoadedEncoder("m", "id", plan, _Words()), self.bound, on_steps=self.steps.extend)

    def round(self, *requests: EncodeRequest | EngineRequest, cancelled: tuple[str, ...] = ()) -> list[RequestStep]:
        self.steps.clear()
        self.engine.run_round(Mail(list(requests), list(cancelled)))
        return list(self.steps)


@pytest.fixture
def harness() -> _Harness:
    return _Harness()


def numbers(step: RequestStep) -> dict[int, list[float]]:
    return {vector.index: np.frombuffer(vector.vector, "<f4").tolist() for vector in step.vectors}


def test_inputs_of_several_requests_share_a_step(harness: _Harness) -> None:
    """Texts and token ids, two requests, one batch; each ends with its own usage and marks."""
    first, second = harness.round(EncodeRequest("a", ("5 6", (7,))), EncodeRequest("b", ("8",)))
    assert len(harness.bound.batches) == 1
    assert numbers(first) == {0: [4, 14, 0], 1: [1, 7, 0]}
    assert numbers(second) == {0: [3, 11, 0]}
    assert (first.finished, first.usage.prompt_tokens, second.usage.prompt_tokens) == (True, 5, 3)
    assert set(first.marks) == {"tokenised", "prefilled", "sampled"}


def test_a_large_request_takes_turns_with_a_small_one(harness: _Harness) -> None:
    """A request that comes later gets its turn in the very next step; batch requests come after interactive ones."""
    long = tuple((1,) * 100 for _ in range(6))
    harness.round(EncodeRequest("large", long, priority=Priority.BATCH))
    steps = harness.round(EncodeRequest("small", ("5",)))
    assert {step.request_id: step.finished for step in steps} == {"small": True, "large": False}
    assert harness.bound.batches[1][0] == (1, 5, 2)
    assert all(sum(map(len, batch)) <= STEP_TOKENS for batch in harness.bound.batches)
    while not any(step.finished for step in harness.round()):
        pass
    assert sum(map(len, harness.bound.batches)) == 7


def test_an_input_larger_than_a_step_has_one_to_itself(harness: _Harness) -> None:
    """No input that fits the context waits for ever."""
    (step,) = harness.round(EncodeRequest("a", ((3,) * CONTEXT,)))
    assert step.finished
    assert numbers(step) == {0: [CONTEXT, 3 * CONTEXT, 0]}


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (("5", (3,) * (CONTEXT + 1)), ErrorCode.CONTEXT_LENGTH_EXCEEDED, ("input[1]", "301 tokens", "300 tokens")),
        (((),), ErrorCode.INVALID_REQUEST, ("no tokens",)),
        (((1000,),), ErrorCode.INVALID_REQUEST, ("1000", "0 to 999")),
    ],
)
def test_inputs_that_do_not_fit_end_their_request_only(
    harness: _Harness, given: tuple[str | tuple[int, ...], ...], code: ErrorCode, words: tuple[str, ...]
) -> None:
    """Too long (both numbers named), empty, outside the vocabulary; a neighbour is served."""
    bad, good = harness.round(EncodeRequest("bad", given), EncodeRequest("good", ("5",)))
    assert bad.error is not None
    assert bad.error.code is code
    assert all(word in bad.error.message for word in words)
    assert good.error is None
    assert good.finished


def test_a_chat_that_reaches_an_encoder_is_told_where_to_go(harness: _Harness) -> None:
    """The gateway refuses it before; a stale card must not end in silence."""
    (step,) = harness.round(EngineRequest("chat", "Hi", SamplingParams(seed=1, max_tokens=4)))
    assert step.error is not None
    assert "/v1/embeddings" in step.error.message


def test_what_an_earlier_attempt_logged_is_not_encoded_again(harness: _Harness) -> None:
    """Its tokens still count; a request that lacked nothing but its end just ends."""
    (step,) = harness.round(EncodeRequest("a", ("5", "6", "7"), emitted={0: 3, 2: 3}))
    assert numbers(step) == {1: [3, 9, 0]}
    assert step.usage.prompt_tokens == 9
    (step,) = harness.round(EncodeRequest("b", ("5",), emitted={0: 3}))
    assert (step.finished, step.vectors, step.usage.prompt_tokens) == (True, [], 3)


def test_a_failed_step_ends_its_batch_and_a_cancelled_request_its_own(harness: _Harness) -> None:
    """The engine goes on after both."""
    harness.bound.fails = True
    (step,) = harness.round(EncodeRequest("a", ("5",)))
    assert step.error is not None
    assert step.error.code is ErrorCode.WORKER_FAILED
    harness.bound.fails = False
    (step,) = harness.round(EncodeRequest("b", tuple((1,) * 200 for _ in range(3))), cancelled=("b",))
    assert step.error is not None
    assert step.error.code is ErrorCode.CANCELLED
    (step,) = harness.round(EncodeRequest("c", ("5",)))
    assert step.finished
    assert harness.engine.statistics().num_running == 0


def test_a_lost_device_ends_the_engine(harness: _Harness) -> None:
    """Nothing that the worker asks of it will succeed: its requests go on in another, and are not ended here."""
    harness.bound.fails, harness.bound.error = True, BackendLost("sticky error")
    with pytest.raises(BackendLost):
        harness.round(EncodeRequest("a", ("5",)))
    assert harness.steps == []


def test_shortened_vectors_have_length_one(harness: _Harness) -> None:
    """``dimensions`` cuts and normalises anew; all of a vector stays as the model gave it."""
    vector = np.array([3, 4, 12], np.float32)
    np.testing.assert_allclose(shorten(vector, 2), [0.6, 0.8], atol=1e-6)
    assert shorten(vector, 0) is vector
    assert not shorten(np.zeros(3, np.float32), 2).any()
    (step,) = harness.round(EncodeRequest("a", ((3, 1),), dimensions=1))
    assert numbers(step) == {0: [1]}


@pytest.mark.parametrize("num_values", [1, 384, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 1, 8192])
def test_vectors_travel_in_frames_of_bounded_size(num_values: int) -> None:
    """Frames fall into place by their offsets, and only the last one says that the vector is whole."""
    from worker.engine.types import EncodedInput

    data = np.arange(num_values, dtype="<f4").tobytes()
    frames = list(split_vector(EncodedInput(3, 9, data)))
    assert b"".join(frame.values for frame in frames) == data
    assert [frame.is_last for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert all(len(frame.values) <= CHUNK_BYTES and frame.index == 3 for frame in frames)
