"""The step loop of an encoder: inputs of all requests share batches, and leave with their vectors.

One thread owns everything here (``run``); others use ``submit``, ``cancel``, ``stop`` and ``statistics``, as with
:class:`worker.engine.engine.Engine`. Nothing is kept between steps but what waits, so there is no admission and no
preemption: each step takes one input of each request in turn, interactive requests first, until it is full.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import structlog

from scheduler.contract.errors import ErrorCode, ErrorInfo, GlowplugError
from scheduler.contract.messages import Usage
from scheduler.contract.states import Priority
from scheduler.contract.telemetry import Mark
from worker.backends.encoder_protocol import BoundEncoder
from worker.backends.protocol import BackendLost, FloatArray
from worker.engine.engine_statistics import EngineStatistics
from worker.engine.failures import describe_error
from worker.engine.mailbox import Mail, Mailbox
from worker.engine.text_requests import answer_text_request
from worker.engine.types import AnyRequest, EncodedInput, EncodeRequest, EngineRequest, RequestStep, TextRequest
from worker.loaded_model import LoadedEncoder

_log = structlog.get_logger()

#: Tokens that one step encodes; a longer input has a step to itself. Bounds how long a request waits for its turn.
STEP_TOKENS: Final = 256
_SMALLEST_LENGTH: Final = 1e-12


@dataclass(slots=True, eq=False)
class _EncodingRequest:
    """A request with its inputs tokenised. Owned by the step loop."""

    request: EncodeRequest
    arrival: int
    pending: deque[tuple[int, tuple[int, ...]]]  # (input, its token ids)
    num_tokens: int  # of all inputs, those of earlier runs included
    marks: dict[str, int] = field(default_factory=dict)  # of the first vector, until it was emitted

    @property
    def service_order(self) -> tuple[bool, int]:
        """Sort key: interactive before batch, then order of arrival."""
        return (self.request.priority is not Priority.INTERACTIVE, self.arrival)


class EncoderEngine:
    """Continuous batching over one bound encoder.

    ``on_steps`` is called on the engine thread after every step with what it did, and must not block for long; what it
    raises ends :meth:`run`.
    """

    def __init__(
        self,
        model: LoadedEncoder,
        bound: BoundEncoder,
        *,
        on_steps: Callable[[list[RequestStep]], None],
    ) -> None:
        self._model = model
        self._bound = bound
        self._on_steps = on_steps
        self._mailbox = Mailbox()
        self._requests: dict[str, _EncodingRequest] = {}
        self._steps: dict[str, RequestStep] = {}  # what this round did, by request
        self._num_arrivals = 0
        self._num_steps = 0
        self._statistics = EngineStatistics()

    # --- any thread ---

    def submit(self, request: AnyRequest) -> None:
        """See :meth:`worker.engine.engine.Engine.submit`."""
        self._mailbox.submit(request)

    def cancel(self, request_id: str) -> None:
        """See :meth:`worker.engine.engine.Engine.cancel`."""
        self._mailbox.cancel(request_id)

    def stop(self) -> None:
        """See :meth:`worker.engine.engine.Engine.stop`."""
        self._mailbox.stop()

    def statistics(self) -> EngineStatistics:
        """The state after the latest step; requests still in the mailbox count as waiting."""
        latest = self._statistics
        return replace(latest, num_waiting=latest.num_waiting + self._mailbox.num_requests)

    # --- the engine thread ---

    def run(self) -> None:
        """Thread main: step while there is work, sleep while there is none, return after :meth:`stop`."""
        while True:
            mail = self._mailbox.collect_nowait() if self._requests else self._mailbox.wait_collect()
            if mail.stop:
                return
            self.run_round(mail)

    def run_round(self, mail: Mail) -> None:
        """One turn of the loop: take mail, step, report. Public for tests that drive the engine by hand."""
        for request in mail.requests:
            self._accept(request)
        for request_id in mail.cancelled:
            if self._requests.pop(request_id, None) is not None:
                self._report_error(request_id, ErrorInfo(ErrorCode.CANCELLED, "the request was cancelled"))
        self._step()
        self._statistics = EngineStatistics(num_running=len(self._requests), num_steps=self._num_steps)
        if self._steps:
            steps, self._steps = list(self._steps.values()), {}
            self._on_steps(steps)

    def _accept(self, request: AnyRequest) -> None:
        self._requests.pop(request.request_id, None)
        self._num_arrivals += 1
        if isinstance(request, TextRequest):
            self._steps[request.request_id] = answer_text_request(request, self._model.text)
            return
        try:
            accepted = self._prepare(request)
        except Exception as error:  # one request's failure must not reach the others
            self._report_error(request.request_id, describe_error(error))
            return
        if accepted.pending:
            self._requests[request.request_id] = accepted
        else:
            self._end(accepted)  # an earlier run emitted everything but its end

    def _prepare(self, request: EngineRequest | EncodeRequest) -> _EncodingRequest:
        if isinstance(request, EngineRequest):
            message = f'model "{self._model.name}" makes embeddings and generates no text: use POST /v1/embeddings'
            raise GlowplugError(ErrorCode.INVALID_REQUEST, message, param="model")
        pending: deque[tuple[int, tuple[int, ...]]] = deque()
        num_tokens = 0
        for index, given in enumerate(request.inputs):
            num_done = request.emitted.get(index)
            if num_done is not None:
                num_tokens += num_done
                continue
            token_ids = self._tokenize(given, request)
            self._validate(token_ids, index, len(request.inputs))
            pending.append((index, token_ids))
            num_tokens += len(token_ids)
        accepted = _EncodingRequest(request, self._num_arrivals, pending, num_tokens)
        accepted.marks[Mark.TOKENISED] = time.monotonic_ns()
        return accepted

    def _tokenize(self, given: str | tuple[int, ...], request: EncodeRequest) -> tuple[int, ...]:
        if not isinstance(given, str):
            return given
        return tuple(self._model.text.tokenize(given, add_special=True, parse_special=request.parse_special))

    def _validate(self, token_ids: tuple[int, ...], index: int, num_inputs: int) -> None:
        plan = self._model.plan
        param = "input" if num_inputs == 1 else f"input[{index}]"
        if not token_ids:
            raise GlowplugError(ErrorCode.INVALID_REQUEST, f"{param} has no tokens", param=param)
        if len(token_ids) > plan.context_length:
            message = (
                f"{param} has {len(token_ids)} tokens; this model's context is {plan.context_length} tokens, "
                "the special ones around the text included. Shorten it, or split it into several inputs."
            )
            raise GlowplugError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param=param)
        for token_id in token_ids:
            if not 0 <= token_id < plan.vocab_size:
                message = f"token id {token_id}: the model's vocabulary has ids 0 to {plan.vocab_size - 1}"
                raise GlowplugError(ErrorCode.INVALID_REQUEST, message, param=param)

    # --- one step ---

    def _step(self) -> None:
        batch = self._take_batch()
        if not batch:
            return
        try:
            vectors = self._bound.encode(tuple(token_ids for _, _, token_ids in batch))
            if not np.isfinite(vectors).all():
                raise ArithmeticError("the model's vectors are not numbers")
        except BackendLost:
            raise  # the worker ends, and its requests go on in another
        except Exception as error:  # the device failed: the batch ends, the engine stays
            _log.error("step_failed", exc_info=error, num_sequences=len(batch))
            info = ErrorInfo(ErrorCode.WORKER_FAILED, f"the worker failed in a step: {error}")
            for request, _, _ in batch:
                if self._requests.pop(request.request.request_id, None) is not None:
                    self._report_error(request.request.request_id, info)
            return
        self._num_steps += 1
        encoded_mono_ns = time.monotonic_ns()
        for (request, index, token_ids), vector in zip(batch, vectors, strict=True):
            self._emit(request, index, len(token_ids), vector, encoded_mono_ns)
        for request in dict.fromkeys(request for request, _, _ in batch):
            if not request.pending:
                del self._requests[request.request.request_id]
                self._end(request)

    def _take_batch(self) -> list[tuple[_EncodingRequest, int, tuple[int, ...]]]:
        """Inputs of the next step: one of each request in turn, while they fit."""
        batch: list[tuple[_EncodingRequest, int, tuple[int, ...]]] = []
        room = STEP_TOKENS
        turns = deque(sorted(self._requests.values(), key=lambda request: request.service_order))
        while turns:
            request = turns.popleft()
            if batch and len(request.pending[0][1]) > room:
                continue
            index, token_ids = request.pending.popleft()
            batch.append((request, index, token_ids))
            room -= len(token_ids)
            if request.pending:
                turns.append(request)
        return batch

    def _emit(
        self, request: _EncodingRequest, index: int, num_tokens: int, vector: FloatArray, encoded_mono_ns: int
    ) -> None:
        step = self._step_of(request)
        cut = shorten(vector, request.request.dimensions)
        step.vectors.append(EncodedInput(index, num_tokens, cut.astype("<f4").tobytes()))
        step.sampled_mono_ns = encoded_mono_ns
        if request.marks:
            step.marks = {**request.marks, Mark.PREFILLED: encoded_mono_ns, Mark.SAMPLED: encoded_mono_ns}
            request.marks = {}

    # --- reporting ---

    def _step_of(self, request: _EncodingRequest) -> RequestStep:
        request_id = request.request.request_id
        return self._steps.setdefault(request_id, RequestStep(request_id))

    def _end(self, request: _EncodingRequest) -> None:
        step = self._step_of(request)
        step.finished = True
        step.usage = Usage(request.num_tokens, 0)

    def _report_error(self, request_id: str, error: ErrorInfo) -> None:
        step = self._steps.setdefault(request_id, RequestStep(request_id))
        step.finished = True
        step.error = error


def shorten(vector: FloatArray, dimensions: int) -> FloatArray:
    """The first ``dimensions`` of ``vector`` at length 1, as OpenAI's ``dimensions`` means; all of it, as it is, for 0.

    Source: Kusupati et al. 2022, arXiv:2205.13147 (models trained for it keep their meaning when cut).
    """
    if dimensions in (0, len(vector)):
        return vector
    cut = vector[:dimensions]
    length = max(float(np.sqrt(np.dot(cut, cut))), _SMALLEST_LENGTH)
    result: FloatArray = np.divide(cut, length, dtype=np.float32)
    return result
