"""One step on the backend: what each choice takes part with, and what was sampled for it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from worker.backends.protocol import BoundModel, SequenceInput
from worker.backends.sampling_rows import SampledToken, SamplingRow
from worker.engine.batch import Share
from worker.engine.grammar import GrammarMatcher, Grammars, TokenMask
from worker.engine.kv_cache import KvCache
from worker.engine.sequence import Choice, RunningRequest
from worker.engine.speculation import MAX_STEP_DRAFT_TOKENS, PromptLookup


@dataclass(slots=True)
class Turn:
    """A choice's part in a step.

    ``drafted`` are guesses behind its last token. ``sampled`` has, where logits were wanted, a token for the position
    behind the last token and for the one behind each guess that its grammar lets through; or ``error`` says why none.
    """

    request: RunningRequest
    choice: Choice
    share: Share
    drafted: tuple[int, ...] = ()
    sampled: list[SampledToken] = field(default_factory=list)
    error: Exception | None = None

    def describe_input(self) -> SequenceInput:
        """What the backend computes of the choice."""
        choice, start = self.choice, self.choice.num_computed
        token_ids = tuple(choice.token_ids[start : start + self.share.num_tokens]) + self.drafted
        return SequenceInput(choice.block_table, start, token_ids, self.num_logits)

    def make_rows(self, first_row: int, masks: Sequence[TokenMask] | None) -> list[SamplingRow]:
        """How its tokens are drawn from the rows of logits from ``first_row`` on; ``masks`` are its grammar's."""
        sampler, drafted = self.choice.sampler, self.drafted
        if masks is None:
            return [sampler.make_row(first_row + i, after=drafted[:i]) for i in range(1 + len(drafted))]
        return [sampler.make_row(first_row + i, allowed=mask, after=drafted[:i]) for i, mask in enumerate(masks)]

    @property
    def num_logits(self) -> int:
        return 1 + len(self.drafted) if self.share.wants_logits else 0


def draft_ahead(turns: Sequence[Turn], kv: KvCache, max_draft_tokens: int) -> None:
    """Guess tokens ahead for the decodes among ``turns``, where KV blocks are to be had for them."""
    left = MAX_STEP_DRAFT_TOKENS
    for turn in turns:
        choice = turn.choice
        if choice.num_pending != 1 or not turn.share.wants_logits:
            continue
        if choice.drafter is None:
            choice.drafter = PromptLookup(choice.token_ids, max_draft_tokens)
        drafted = choice.drafter.draft(min(left, choice.num_left - 1))
        if drafted and kv.try_grow(choice, num_ahead=len(drafted)):
            turn.drafted = drafted
            left -= len(drafted)


def run_turns(bound: BoundModel, grammars: Grammars, turns: Sequence[Turn]) -> int:
    """Compute and sample ``turns``, filling in their results; the instant (mono ns) at which the logits were there.

    Masks of grammars are computed on another thread while the device works.

    Raises:
        Exception: the device failed; nothing was sampled.
    """
    masked: list[int] = []
    wanted: list[tuple[GrammarMatcher, Sequence[int]]] = []
    for index, turn in enumerate(turns):
        if turn.choice.matcher is not None and turn.share.wants_logits:
            masked.append(index)
            wanted.append((turn.choice.matcher, turn.drafted))
    pending = grammars.begin_masks(wanted) if wanted else None
    bound.step(tuple(turn.describe_input() for turn in turns))
    computed_mono_ns = time.monotonic_ns()
    masks = dict(zip(masked, pending.result(), strict=True)) if pending is not None else {}
    _sample(bound, turns, masks)
    return computed_mono_ns


def _sample(bound: BoundModel, turns: Sequence[Turn], masks: Mapping[int, list[TokenMask] | Exception]) -> None:
    """Draw all tokens of the step in one call; ``masks`` by index of the turn."""
    rows: list[SamplingRow] = []
    owners: list[Turn] = []
    first_row = 0
    for index, turn in enumerate(turns):
        if not turn.share.wants_logits:
            continue
        found = masks.get(index)
        if isinstance(found, Exception):
            turn.error = found
        else:
            made = turn.make_rows(first_row, found)
            rows += made
            owners += [turn] * len(made)
        first_row += turn.num_logits
    for turn, sampled in zip(owners, bound.sample(rows), strict=True):
        turn.sampled.append(sampled)
