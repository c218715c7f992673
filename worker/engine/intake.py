"""Turns a submitted request into one that can run: tokenise, check against the model, replay what was emitted."""

from __future__ import annotations

import time
from functools import partial

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.telemetry import Mark
from worker.engine.grammar import Grammars
from worker.engine.kv_cache import KvCache, count_request_blocks
from worker.engine.post_processing import find_model_text
from worker.engine.sampling import Sampler
from worker.engine.sequence import Choice, RunningRequest
from worker.engine.stop_strings import find_stop_string
from worker.engine.text import TextModel
from worker.engine.types import EncodeRequest, EngineRequest
from worker.loaded_model import LoadedModel


def prepare_request(
    request: EngineRequest | EncodeRequest, arrival: int, model: LoadedModel, kv: KvCache
) -> RunningRequest:
    """Tokenise ``request`` and build its choices, with earlier tokens replayed; where it asks for a grammar, those wait
    for :func:`attach_grammar`.

    Raises:
        GlowplugError: the prompt, or a token id in the request, does not fit the model.
        GuestError: the guest failed on this prompt.
    """
    if isinstance(request, EncodeRequest):
        message = f'model "{model.name}" generates text and makes no embeddings: use POST /v1/chat/completions'
        raise GlowplugError(ErrorCode.INVALID_REQUEST, message, param="model")
    prompt = tokenize_prompt(request, model.text)
    tokenised_mono_ns = time.monotonic_ns()
    _validate_token_ids(request, prompt, model.plan.vocab_size)
    max_tokens = _cut_to_context(request, prompt, model.plan.context_length)
    _validate_fits(request, prompt, max_tokens, kv)
    choices: list[Choice] = []
    running = RunningRequest(request, arrival, prompt, max_tokens, choices)
    running.marks[Mark.TOKENISED] = tokenised_mono_ns
    try:
        for index in range(request.num_choices):
            choices.append(_open_choice(running, index, model))
        if request.sampling.grammar is None:
            _replay(running)
    except Exception:  # whatever went wrong: choices opened so far hold guest state
        running.close()
        raise
    return running


def attach_grammar(running: RunningRequest, grammars: Grammars) -> None:
    """Give every choice a matcher of the request's grammar, then replay earlier tokens, which advances it.

    Requires: the grammar is compiled.

    Raises:
        GlowplugError: the earlier tokens are not of this grammar.
        GuestError: the guest failed on the earlier tokens.
    """
    grammar = running.request.sampling.grammar
    if grammar is None:
        raise ValueError(f"request {running.request_id} has no grammar")
    for choice in running.choices:
        choice.matcher = grammars.open_matcher(grammar)
    _replay(running)


def _replay(running: RunningRequest) -> None:
    for choice, emitted in zip(running.choices, running.request.emitted, strict=False):
        choice.replay(emitted)


def tokenize_prompt(request: EngineRequest, text: TextModel) -> tuple[int, ...]:
    """Token ids of a request's prompt.

    Raises:
        GuestError: the guest failed on this prompt.
    """
    if not isinstance(request.prompt, str):
        return tuple(request.prompt)
    return tuple(text.tokenize(request.prompt, add_special=request.add_special, parse_special=request.parse_special))


def _validate_token_ids(request: EngineRequest, prompt: tuple[int, ...], vocab_size: int) -> None:
    if not prompt:
        raise GlowplugError(ErrorCode.INVALID_REQUEST, "the prompt has no tokens", param="prompt")
    for token_ids, param in ((prompt, "prompt"), (request.sampling.logit_bias, "logit_bias")):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                message = f"token id {token_id}: the model's vocabulary has ids 0 to {vocab_size - 1}"
                raise GlowplugError(ErrorCode.INVALID_REQUEST, message, param=param)


def _cut_to_context(request: EngineRequest, prompt: tuple[int, ...], context_length: int) -> int:
    room = context_length - len(prompt)
    if room < 1:
        message = (
            f"the prompt has {len(prompt)} tokens; this model's context is {context_length} tokens, "
            "of which at least one must be left for the completion. Shorten the prompt."
        )
        raise GlowplugError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param="prompt")
    return min(request.sampling.max_tokens, room)


def _validate_fits(request: EngineRequest, prompt: tuple[int, ...], max_tokens: int, kv: KvCache) -> None:
    if kv.fits_alone(len(prompt), max_tokens, request.num_choices):
        return
    needed = count_request_blocks(len(prompt), max_tokens, request.num_choices)
    message = (
        f"{request.num_choices} choice(s) of {len(prompt)} prompt and up to {max_tokens} completion tokens "
        f"need {needed * kv.block_bytes} bytes of KV memory; this worker has {kv.pool.num_blocks * kv.block_bytes}. "
        "Ask for fewer max_tokens or choices, or raise the worker's KV budget."
    )
    raise GlowplugError(ErrorCode.OUT_OF_MEMORY, message)


def _open_choice(running: RunningRequest, index: int, model: LoadedModel) -> Choice:
    params = running.request.sampling
    sampler = Sampler(
        params,
        index,
        prompt_token_ids=running.prompt,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.plan.vocab_size,
    )
    # A raw completion goes on where its prompt ends; a chat's answer is a text of its own.
    keep_space, ignore_eos = running.request.add_special, params.ignore_eos
    open_sequence = partial(model.text.open_sequence, ignore_stop_tokens=ignore_eos, keep_leading_space=keep_space)
    plain_text = find_model_text(model.text)  # where stop strings are found
    open_plain_text = partial(plain_text.open_sequence, (), ignore_stop_tokens=True, keep_leading_space=True)
    find_stop = partial(find_stop_string, open_plain_text, params.stop)
    return Choice(index, running.prompt, running.max_tokens, sampler, partial(open_sequence, params.stop), find_stop)
