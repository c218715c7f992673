"""Requests that the tokeniser alone answers: no step, no KV memory, no weights read."""

from __future__ import annotations

import time

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import TokenEvent, Usage
from scheduler.contract.telemetry import Mark
from worker.engine.failures import describe_error
from worker.engine.sequence import NO_TOKEN
from worker.engine.text import Tokenizer
from worker.engine.types import RequestStep, TextRequest


def answer_text_request(request: TextRequest, text: Tokenizer) -> RequestStep:
    """The only step of ``request``: an event for each token id that an earlier run has not logged, or one with the
    text. Whatever goes wrong is the step's error."""
    try:
        events, num_tokens = _convert(request, text)
    except Exception as error:  # one request's failure must not reach the others
        return RequestStep(request.request_id, finished=True, error=describe_error(error))
    now_mono_ns = time.monotonic_ns()
    return RequestStep(
        request.request_id,
        events,
        sampled_mono_ns=now_mono_ns,
        marks=dict.fromkeys((Mark.TOKENISED, Mark.PREFILLED, Mark.SAMPLED), now_mono_ns),
        finished=True,
        usage=Usage(num_tokens),
    )


def _convert(request: TextRequest, text: Tokenizer) -> tuple[list[TokenEvent], int]:
    given = request.given
    if isinstance(given, str):
        token_ids = text.tokenize(given, add_special=request.add_special, parse_special=request.parse_special)
        return [TokenEvent(0, token_id, "") for token_id in token_ids[request.num_emitted :]], len(token_ids)
    detokenize = getattr(text, "detokenize", None)  # an encoder's guest need not have it
    if detokenize is None:
        raise GlowplugError(ErrorCode.INVALID_REQUEST, "this model's guest cannot turn token ids into text")
    return [TokenEvent(0, NO_TOKEN, detokenize(list(given), show_special=True))], len(given)
