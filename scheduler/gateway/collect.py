"""A call that is not streamed: choices are gathered and answered with one body."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

import msgspec
from aiohttp import web

from scheduler.contract.messages import StepFrame, TokenLogprob, Trace
from scheduler.contract.states import FinishReason
from scheduler.contract.telemetry import Mark
from scheduler.gateway.anthropic_events import build_finished_message
from scheduler.gateway.exchange import Exchange, OnStep, OnVector, as_exception
from scheduler.gateway.exchange_part import Part
from scheduler.gateway.request_schema import Call, Endpoint
from scheduler.gateway.responses import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    LegacyChoice,
    LegacyCompletion,
    LegacyLogprobs,
    UsageBody,
    append_legacy_token,
    build_chat_message,
    build_chat_token,
    build_usage,
    empty_legacy_logprobs,
    fingerprint,
    finish_word,
)
from scheduler.gateway.responses_events import build_finished_response
from scheduler.gateway.tool_calls import choice_seed
from scheduler.gateway.traces import COLD_START_NAMES, format_server_timing

LIMIT_CHECK_EVERY_S: Final = 1.0


@dataclass(slots=True)
class GatheredChoice:
    """What has arrived of one choice. ``logprobs`` pairs each position with the offset of its text, in characters."""

    texts: list[str] = field(default_factory=list)
    num_chars: int = 0
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.STOP
    stop_sequence: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class CollectedCall:
    """One call that is not streamed. Used once, by its handler."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._choices = [GatheredChoice() for _ in range(exchange.call.total_choices)]

    async def run(self) -> web.Response:
        """Serve the call; the response is not sent yet.

        Raises:
            GlowplugError: refused, failed, or not finished within the configured limits.
        """
        trace = await wait_answer(self._exchange, on_step=self._on_step)
        return web.Response(body=self._build_body(), content_type="application/json", headers=build_headers(trace))

    def _on_step(self, part: Part, frame: StepFrame) -> None:
        for event in frame.events:
            choice = self._choices[part.choice_offset + event.choice]
            if event.logprob is not None:
                choice.logprobs.append((choice.num_chars, event.logprob))
            if event.text:
                choice.texts.append(event.text)
                choice.num_chars += len(event.text)
            if event.finish_reason is not None:
                choice.finish_reason, choice.stop_sequence = event.finish_reason, event.stop_sequence

    def _build_body(self) -> bytes:
        exchange = self._exchange
        call, created_at_s = exchange.call, int(time.time())
        usage = build_usage([part.terminal.usage for part in exchange.parts if part.terminal is not None])
        return msgspec.json.encode(self._build(call, created_at_s, usage))

    def _build(self, call: Call, created_at_s: int, usage: UsageBody) -> object:
        request_id, first = self._exchange.request_id, self._choices[0]
        match call.endpoint:
            case Endpoint.CHAT:
                return self._build_chat(call, created_at_s, usage)
            case Endpoint.RESPONSES:
                return build_finished_response(call, request_id, created_at_s, first.text, first.finish_reason, usage)
            case Endpoint.MESSAGES:
                ended = first.finish_reason, first.stop_sequence
                return build_finished_message(call, request_id, first.text, *ended, usage)
            case _:
                return self._build_legacy(call, created_at_s, usage)

    def _build_chat(self, call: Call, created_at_s: int, usage: UsageBody) -> ChatCompletion:
        choices = []
        for index, choice in enumerate(self._choices):
            logprobs = None
            if call.sampling.num_top_logprobs is not None:
                logprobs = ChatLogprobs([build_chat_token(logprob) for _, logprob in choice.logprobs])
            seed = choice_seed(self._exchange.request_id, index)
            message = build_chat_message(choice.text, call.tools, seed)
            reason = finish_word(choice.finish_reason, len(message.tool_calls or ()))
            choices.append(ChatChoice(index, message, logprobs, reason))
        return ChatCompletion(
            f"chatcmpl-{self._exchange.request_id}",
            created_at_s,
            call.card.name,
            fingerprint(call.card),
            choices,
            usage,
        )

    def _build_legacy(self, call: Call, created_at_s: int, usage: UsageBody) -> LegacyCompletion:
        choices = []
        for index, choice in enumerate(self._choices):
            echoed = str(call.prompts[index // call.num_choices]) if call.echo else ""
            logprobs: LegacyLogprobs | None = None
            if call.sampling.num_top_logprobs is not None:
                logprobs = empty_legacy_logprobs()
                for offset, logprob in choice.logprobs:
                    append_legacy_token(logprobs, logprob, offset)
            choices.append(LegacyChoice(index, echoed + choice.text, logprobs, choice.finish_reason.value))
        return LegacyCompletion(
            f"cmpl-{self._exchange.request_id}", created_at_s, call.card.name, fingerprint(call.card), choices, usage
        )


async def wait_answer(exchange: Exchange, on_step: OnStep | None = None, on_vector: OnVector | None = None) -> Trace:
    """Start ``exchange`` and wait for its end, frames going to the callbacks; its trace.

    Raises:
        GlowplugError: refused, failed, or not finished within the configured limits.
    """
    await exchange.start(on_step, on_vector)
    while not await exchange.wait_done(LIMIT_CHECK_EVERY_S):
        overdue = await exchange.find_overdue(streamed=False)
        if overdue is not None:
            raise as_exception(overdue)
    if exchange.error is not None:
        raise as_exception(exchange.error)
    now_mono_ns = time.monotonic_ns()
    for part in exchange.parts:
        part.marks[Mark.FIRST_BYTE] = now_mono_ns
    return await exchange.record()


def build_headers(trace: Trace) -> dict[str, str]:
    """What a finished call tells about its way."""
    return {
        "X-Cold-Start": COLD_START_NAMES[trace.cold_tier],
        "Server-Timing": format_server_timing(trace.phases_ms),
        "openai-processing-ms": str(round(trace.total_ms)),
    }
