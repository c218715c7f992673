"""A request inside the engine: its choices, their tokens and text, and how a sampled token becomes an event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from guests.abi import SequenceEnd
from guests.errors import GuestError, GuestTrap
from scheduler.contract.messages import TokenEvent, TokenLogprob, TopLogprob, Usage
from scheduler.contract.states import FinishReason, Priority
from worker.backends.sampling_rows import Logprobs
from worker.engine.grammar import GrammarMatcher
from worker.engine.sampling import Sampler
from worker.engine.speculation import PromptLookup
from worker.engine.text import PushResult, TextSequence
from worker.engine.types import EngineRequest

_log = structlog.get_logger()

NO_TOKEN: Final = -1  # TokenEvent.token_id of an event that brings no token


class Choice:
    """One completion of a request: a sequence of tokens with its KV blocks, sampler and detokeniser.

    ``token_ids`` is prompt plus completion. The first ``num_computed`` of them are in the KV blocks; at least one is
    always pending while the choice runs, because the last sampled token is computed in the step that follows.
    ``blocks`` are written by the KV cache alone; a choice that runs has at least one.
    """

    def __init__(
        self,
        index: int,
        prompt: tuple[int, ...],
        max_tokens: int,
        sampler: Sampler,
        open_text: Callable[[], TextSequence],
        find_stop: Callable[[list[int]], str | None] = lambda generated: None,
    ) -> None:
        self.index = index
        self.token_ids = list(prompt)
        self.sampler = sampler
        self.matcher: GrammarMatcher | None = None  # of the request's grammar, advanced with every token
        self.drafter: PromptLookup | None = None  # guesses tokens ahead, where that is asked for
        self.blocks: list[int] = []
        self.block_table: tuple[int, ...] = ()  # blocks, a new object whenever they change
        self.keys: list[bytes] = []  # of the full blocks of token_ids, as far as they were asked for
        self.num_computed = 0
        self.num_remembered = 0  # blocks from the first on that prompts to come may share
        self.awaits_prefix = False  # gets the prompt's keys and values from the request's first choice
        self.finish_reason: FinishReason | None = None
        self.stop_sequence: str | None = None  # the stop string that ended it
        self._find_stop = find_stop
        self._num_prompt = len(prompt)
        self._max_tokens = max_tokens
        self._open_text = open_text
        self._text = open_text()

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self._num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self._max_tokens - self.num_generated

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def replay(self, token_ids: tuple[int, ...]) -> None:
        """Take over what an earlier run emitted: tokens, stop rules and penalties advance, nothing is emitted."""
        for token_id in token_ids:
            if self.is_finished:
                return
            self._advance(token_id)

    def push(self, token_id: int, logprob: TokenLogprob | None) -> TokenEvent:
        """Append a sampled token; the event that it makes. Sets :attr:`finish_reason` where the choice ends."""
        text = self._advance(token_id)
        return TokenEvent(self.index, token_id, text, self.finish_reason, logprob, self.stop_sequence)

    def close(self) -> None:
        """Free the detokeniser's state. Idempotent."""
        try:
            self._text.close()
        except GuestError as error:  # the guest's instance is gone, and this state with it
            _log.warning("text_state_lost", error=str(error))

    def _advance(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        self.sampler.accept(token_id)
        pushed = self._push_text(token_id)
        if pushed.end is SequenceEnd.STOP_STRING:
            self.finish_reason = FinishReason.STOP
            self.stop_sequence = self._find_stop(self.token_ids[self._num_prompt :])
            return pushed.text
        if pushed.end is SequenceEnd.STOP_TOKEN:
            self.finish_reason = FinishReason.STOP
            return pushed.text + self._text.flush()
        if self._is_complete(token_id):
            self.finish_reason = FinishReason.STOP
            return pushed.text + self._text.flush()
        if self.num_generated >= self._max_tokens:
            self.finish_reason = FinishReason.LENGTH
            return pushed.text + self._text.flush()
        return pushed.text

    def _is_complete(self, token_id: int) -> bool:
        """Advance in the grammar, if there is one; whether nothing can follow."""
        if self.matcher is None:
            return False
        self.matcher.accept(token_id)
        return self.matcher.is_complete

    def _push_text(self, token_id: int) -> PushResult:
        """Push to the detokeniser, rebuilding it once if its guest instance is gone.

        A trap in one request drops the guest instance that all requests share. Whoever comes next replays its own
        tokens into a fresh one; the request that traps again on its own tokens is the one that fails.
        """
        try:
            return self._text.push(token_id)
        except GuestTrap:
            self._text = self._open_text()
            for earlier in self.token_ids[self._num_prompt : -1]:
                self._text.push(earlier)
            return self._text.push(token_id)


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request with its prompt tokenised. Owned by the engine's step loop."""

    request: EngineRequest
    arrival: int  # order of submission; kept over a preemption
    prompt: tuple[int, ...]
    max_tokens: int  # completion tokens of each choice, cut to the context
    choices: list[Choice]
    num_cached: int | None = None  # prompt tokens taken over instead of computed, when it first ran
    marks: dict[str, int] = field(default_factory=dict)  # of the first token, until it was emitted

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def service_order(self) -> tuple[bool, int]:
        """Sort key: interactive before batch, then order of arrival."""
        return (self.request.priority is not Priority.INTERACTIVE, self.arrival)

    @property
    def unfinished(self) -> list[Choice]:
        return [choice for choice in self.choices if not choice.is_finished]

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), sum(choice.num_generated for choice in self.choices), self.num_cached or 0)

    def close(self) -> None:
        """Free every choice's detokeniser. Idempotent."""
        for choice in self.choices:
            choice.close()


def describe_logprob(logprobs: Logprobs, token_id: int, token_bytes: Callable[[int], bytes]) -> TokenLogprob:
    """The log-probability entry of the sampled ``token_id``."""
    top = tuple(TopLogprob(token, token_bytes(token), logprob) for token, logprob in logprobs.top)
    return TokenLogprob(token_id, token_bytes(token_id), logprobs.chosen, top)
