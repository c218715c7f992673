"""What a round of the engine did, by request, on its way to whoever asked."""

from __future__ import annotations

import time
from collections.abc import Callable

from scheduler.contract.errors import ErrorInfo
from scheduler.contract.messages import TokenEvent
from scheduler.contract.states import FinishReason
from scheduler.contract.telemetry import Mark
from worker.backends.sampling_rows import NO_CHOICE, SampledToken
from worker.engine.sampling import SamplingError
from worker.engine.sequence import NO_TOKEN, Choice, RunningRequest, describe_logprob
from worker.engine.types import RequestStep


class StepReports:
    """Gathers events until :meth:`take`. Engine thread only."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self.tokens_generated = 0
        self._ask_token_bytes = token_bytes
        self._token_bytes: dict[int, bytes] = {}
        self._steps: dict[str, RequestStep] = {}

    def push(self, request: RunningRequest, choice: Choice, sampled: SampledToken, computed_mono_ns: int) -> None:
        """Append a sampled token to ``choice`` and report it; the first one of a request with its marks.

        Raises:
            SamplingError: there is no token.
            GlowplugError: the token is not of the request's grammar.
            GuestError: the guest failed on the token.
        """
        if sampled.token_id == NO_CHOICE:
            raise SamplingError("no token can be chosen: the logits are not numbers, or every token is excluded")
        logprob = None
        if sampled.logprobs is not None:
            logprob = describe_logprob(sampled.logprobs, sampled.token_id, self._token_bytes_of)
        event = choice.push(sampled.token_id, logprob)
        step = self._step_of(request.request_id)
        step.events.append(event)
        step.sampled_mono_ns = time.monotonic_ns()
        self.tokens_generated += 1
        if request.marks:
            step.marks = {
                **request.marks,
                Mark.PREFILLED: computed_mono_ns,
                Mark.SAMPLED: step.sampled_mono_ns,
            }
            request.marks = {}

    def end(self, request: RunningRequest) -> None:
        """The request is finished; one that may generate nothing says so for each choice."""
        step = self._step_of(request.request_id)
        if request.max_tokens <= 0:
            step.events += [TokenEvent(choice.index, NO_TOKEN, "", FinishReason.LENGTH) for choice in request.choices]
        step.finished = True
        step.usage = request.usage

    def add(self, step: RequestStep) -> None:
        """A request's only step."""
        self._steps[step.request_id] = step

    def fail(self, request_id: str, error: ErrorInfo) -> None:
        """The request ended with ``error``."""
        step = self._step_of(request_id)
        step.finished = True
        step.error = error

    def take(self) -> list[RequestStep]:
        """What was reported since the last call."""
        steps, self._steps = list(self._steps.values()), {}
        return steps

    def _step_of(self, request_id: str) -> RequestStep:
        return self._steps.setdefault(request_id, RequestStep(request_id))

    def _token_bytes_of(self, token_id: int) -> bytes:
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._ask_token_bytes(token_id)
        return found
