"""Guessing tokens ahead without a second model: a text often repeats what stood in it before.

*Prompt lookup*: the last few tokens are searched for earlier in prompt and completion, and what followed them there is
the draft (Source: Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, arXiv:2304.04487). One step computes the
logits behind every drafted token at once.

**Exact.** Each position is sampled from its own logits with its own random number, as without drafts, and a drafted
token is kept only where the sampled one equals it; the first that differs is kept in its place. So given equal logits
the text is the very same, whatever was drafted, for greedy and for random sampling, and the rule for a draft of
certain tokens (accept with their probability, else draw from the rest; Leviathan et al. 2023, arXiv:2211.17192)
holds without a second draw. Logits of a wider step may differ in their last bits: see :mod:`worker.engine.sampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: How many last tokens are looked up, the longest first: shorter ones repeat by chance.
NGRAM_TOKENS: Final = (4, 3, 2)
FIRST_DRAFT_TOKENS: Final = 3
#: After so many drafts in a row of which nothing was kept, drafting rests, each time twice as long.
MAX_MISSES: Final = 2
MAX_REST_TOKENS: Final = 64
#: Drafted tokens of all sequences in one step: beyond, a step costs more than the tokens it may save.
MAX_STEP_DRAFT_TOKENS: Final = 32


class PromptLookup:
    """Drafts for one sequence. ``token_ids`` is its owner's list of prompt and completion, which only grows.

    The draft's length follows what was kept: it doubles up to ``max_draft_tokens`` while all of it is, and shrinks to
    what was. Memory: one entry for each n-gram, O(tokens).
    """

    def __init__(self, token_ids: Sequence[int], max_draft_tokens: int) -> None:
        self._token_ids = token_ids
        self._max_draft_tokens = max_draft_tokens
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> index behind its latest occurrence
        self._num_indexed = 0  # n-grams that end before this index are in `_ends`
        self._length = min(FIRST_DRAFT_TOKENS, max_draft_tokens)
        self._num_misses = 0
        self._rest_tokens = 0  # 0: not resting
        self._rests_until = 0  # a length of token_ids

    def draft(self, limit: int) -> tuple[int, ...]:
        """Up to ``limit`` tokens that may come next; empty where nothing is known, or while drafting rests."""
        token_ids = self._token_ids
        num_tokens = len(token_ids)
        limit = min(limit, self._length)
        if limit <= 0 or num_tokens < self._rests_until:
            return ()
        self._index()
        for size in NGRAM_TOKENS:
            end = self._ends.get(tuple(token_ids[num_tokens - size :])) if num_tokens > size else None
            if end is not None:
                drafted = list(token_ids[end : end + limit])
                while len(drafted) < limit:  # the text repeats itself with a period shorter than the draft
                    drafted.append(drafted[-(num_tokens - end)])
                return tuple(drafted)
        return ()

    def observe(self, num_drafted: int, num_kept: int) -> None:
        """Learn how a draft went. Call after the kept tokens were appended."""
        if num_drafted == 0:
            return
        if num_kept > 0:
            self._num_misses = self._rest_tokens = 0
            self._length = min(2 * num_kept if num_kept == num_drafted else num_kept + 1, self._max_draft_tokens)
            return
        self._length = max(self._length // 2, 1)
        self._num_misses += 1
        if self._num_misses >= MAX_MISSES:
            self._num_misses = 0
            self._rest_tokens = min(max(2 * self._rest_tokens, 4), MAX_REST_TOKENS)
            self._rests_until = len(self._token_ids) + self._rest_tokens

    def _index(self) -> None:
        """Take in the n-grams that something follows already."""
        token_ids = self._token_ids
        for end in range(max(self._num_indexed, NGRAM_TOKENS[-1]), len(token_ids)):
            for size in NGRAM_TOKENS:
                if end >= size:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._num_indexed = len(token_ids)
