"""Calls that the model's tokeniser answers alone: its fields, and the answer's body.

The tokeniser is the model's own code in its sandbox, so a cold model wakes for them; no weight is read. Fields and
bodies are those of vLLM and of llama.cpp's server, side by side where they differ.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from aiohttp import web

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.messages import ModelCard, SamplingParams, StepFrame
from scheduler.contract.states import Priority
from scheduler.gateway.anthropic_request import read_message_call
from scheduler.gateway.collect import build_headers, wait_answer
from scheduler.gateway.errors import bad_field
from scheduler.gateway.exchange import Exchange
from scheduler.gateway.exchange_part import Part
from scheduler.gateway.field_reader import FieldReader
from scheduler.gateway.request_schema import (
    UNLIMITED_TOKENS,
    Call,
    Endpoint,
    Prompt,
    read_chat_call,
    read_token_ids,
)
from scheduler.gateway.responses_request import read_response_call

MAX_TEXT_BYTES: Final = 256 * 1024
MAX_TOKENS: Final = 256 * 1024


def read_tokenize_call(body: dict[str, Any], card: ModelCard, templates: ChatTemplates) -> Call:
    """``prompt`` (vLLM's), ``content`` (llama.cpp's), or ``messages`` through the chat template.

    Raises:
        GlowplugError: none or several of them, or a field is wrong.
    """
    reader = FieldReader(body)
    given = [name for name in ("prompt", "content", "messages") if reader.raw(name) is not None]
    if len(given) != 1:
        raise bad_field("prompt", "send one of prompt, content and messages")
    if given == ["messages"]:
        prompt = read_chat_call(body, _unbounded(card), templates).prompts[0]
        add_special = reader.boolean("add_special_tokens", default=False)
    else:
        prompt = reader.string(given[0], max_chars=MAX_TEXT_BYTES) or ""
        llama = reader.boolean("add_special", default=given == ["prompt"])
        add_special = reader.boolean("add_special_tokens", default=llama)
    for name in ("return_token_strs", "with_pieces"):
        if reader.boolean(name, default=False):
            raise bad_field(name, "pieces are not given; POST /detokenize has the text of token ids")
    parse_special = reader.boolean("parse_special", default=True)
    return _make_call(Endpoint.TOKENIZE, card, prompt, add_special=add_special, parse_special=parse_special)


def read_detokenize_call(body: dict[str, Any], card: ModelCard, _templates: ChatTemplates) -> Call:
    """
    Raises:
        GlowplugError: ``tokens`` are no token ids of the model.
    """
    value = FieldReader(body).raw("tokens")
    if value is None:
        raise bad_field("tokens", "is required")
    token_ids = read_token_ids(value, card, param="tokens") if value != [] else ()
    if len(token_ids) > MAX_TOKENS:
        raise bad_field("tokens", f"{len(token_ids)} token ids; at most {MAX_TOKENS} are accepted")
    return _make_call(Endpoint.DETOKENIZE, card, token_ids)


def read_message_count_call(body: dict[str, Any], card: ModelCard, templates: ChatTemplates) -> Call:
    """The prompt of a message, to be counted.

    Raises:
        GlowplugError: see :func:`read_message_call`.
    """
    call = read_message_call(body, _unbounded(card), templates, counts_only=True)
    return _make_call(Endpoint.COUNT, card, call.prompts[0])


def read_response_count_call(body: dict[str, Any], card: ModelCard, templates: ChatTemplates) -> Call:
    """The prompt of a response, to be counted.

    Raises:
        GlowplugError: see :func:`read_response_call`.
    """
    return _make_call(Endpoint.COUNT, card, read_response_call(body, _unbounded(card), templates).prompts[0])


def _unbounded(card: ModelCard) -> ModelCard:
    """Who counts may want to know how much too long a prompt is."""
    return msgspec.structs.replace(card, context_length=0)


def _make_call(
    endpoint: Endpoint, card: ModelCard, prompt: Prompt, *, add_special: bool = False, parse_special: bool = True
) -> Call:
    if isinstance(prompt, str) and (num_bytes := len(prompt.encode())) > MAX_TEXT_BYTES:
        raise bad_field(endpoint.prompt_field, f"{num_bytes} bytes of text; at most {MAX_TEXT_BYTES} are tokenised")
    return Call(
        endpoint=endpoint,
        card=card,
        prompts=(prompt,),
        sampling=SamplingParams(seed=0, max_tokens=0),
        num_choices=1,
        stream=False,
        include_usage=False,
        echo=False,
        priority=Priority.INTERACTIVE,
        user=None,
        text_only=True,
        add_special=add_special,
        parse_special=parse_special,
    )


class TextCall:
    """One call for the tokeniser. Used once, by its handler."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._token_ids: list[int] = []
        self._text = ""

    async def run(self) -> web.Response:
        """Serve the call; the response is not sent yet.

        Raises:
            GlowplugError: refused, failed, or not finished within the configured limits.
        """
        trace = await wait_answer(self._exchange, on_step=self._on_step)
        body = msgspec.json.encode(self._build_body())
        return web.Response(body=body, content_type="application/json", headers=build_headers(trace))

    def _on_step(self, _part: Part, frame: StepFrame) -> None:
        for event in frame.events:
            if event.token_id >= 0:
                self._token_ids.append(event.token_id)
            else:
                self._text = event.text  # whole; a second attempt gives it again

    def _build_body(self) -> dict[str, Any]:
        call = self._exchange.call
        match call.endpoint:
            case Endpoint.DETOKENIZE:
                return {"prompt": self._text, "content": self._text}
            case Endpoint.TOKENIZE:
                return {
                    "count": len(self._token_ids),
                    "max_model_len": call.card.context_length or UNLIMITED_TOKENS,
                    "tokens": self._token_ids,
                }
            case _:
                return {"object": "response.input_tokens", "input_tokens": len(self._token_ids)}
