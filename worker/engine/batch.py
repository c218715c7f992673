"""Which tokens one step computes: pure decisions over frozen views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Prompt tokens that one step may compute beside its decodes: bounds how long a running sequence waits.
PREFILL_TOKENS_PER_STEP: Final = 256


@dataclass(frozen=True, slots=True)
class SequenceView:
    """A running sequence as the decision sees it, in order of service (see :func:`decide_step`)."""

    index: int  # the caller's
    num_pending: int  # tokens not yet in the KV blocks; 1: a decode


@dataclass(frozen=True, slots=True)
class Share:
    """What a step computes of one sequence: its next ``num_tokens`` tokens."""

    index: int
    num_tokens: int
    wants_logits: bool  # the share reaches the sequence's last token


def decide_step(views: Sequence[SequenceView], *, prefill_tokens: int = PREFILL_TOKENS_PER_STEP) -> list[Share]:
    """Shares of the next step: every decode, then prompt chunks in the order of ``views``.

    At most ``prefill_tokens`` prompt tokens are taken; the last prompt served may be cut, those behind it wait.
    """
    shares = [Share(view.index, 1, True) for view in views if view.num_pending == 1]
    left = prefill_tokens
    for view in views:
        if view.num_pending <= 1 or left <= 0:
            continue
        num_tokens = min(view.num_pending, left)
        shares.append(Share(view.index, num_tokens, num_tokens == view.num_pending))
        left -= num_tokens
    return shares
