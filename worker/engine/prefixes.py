"""Primed prefixes: keys and values that came with the snapshot, found by the token ids of a prompt.

Keys and values of a token depend on the tokens before it and on nothing behind it, so a prompt may take over as many
tokens as it has in common with a primed prefix, all of it or only its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from worker.backends.protocol import FloatArray

#: Fewer tokens in common are computed: a copy would save nothing that can be measured.
MIN_SHARED_TOKENS: Final = 4


@dataclass(frozen=True, slots=True)
class PrimedPrefixArray:
    """A prefix: its token ids, and a read-only view ``[layers, 2, kv heads, tokens, head_dim]`` float32."""

    token_ids: tuple[int, ...]
    keys_values: FloatArray


@dataclass(slots=True)
class _Node:
    """A token of one or more prefixes. ``prefix`` is one that runs through here."""

    prefix: PrimedPrefixArray
    children: dict[int, _Node] = field(default_factory=dict)


class PrefixIndex:
    """A trie over the token ids of all primed prefixes. Made once, in O(tokens); immutable afterwards."""

    def __init__(self, prefixes: Iterable[PrimedPrefixArray] = ()) -> None:
        self._roots: dict[int, _Node] = {}
        self.num_prefixes = 0
        for prefix in prefixes:
            self.num_prefixes += 1
            level = self._roots
            for token_id in prefix.token_ids:
                node = level.get(token_id)
                if node is None:
                    node = level[token_id] = _Node(prefix)
                level = node.children

    def find(self, token_ids: Sequence[int]) -> FloatArray | None:
        """Keys and values of the longest beginning of ``token_ids`` that a prefix shares: a view of that many tokens.

        At least the last of ``token_ids`` is left to compute, since only computing gives logits. None where less than
        :data:`MIN_SHARED_TOKENS` are shared. O(tokens shared).
        """
        level, found, num_shared = self._roots, None, 0
        for index in range(len(token_ids) - 1):
            node = level.get(token_ids[index])
            if node is None:
                break
            level, found, num_shared = node.children, node.prefix, index + 1
        if found is None or num_shared < MIN_SHARED_TOKENS:
            return None
        return found.keys_values[:, :, :, :num_shared]
