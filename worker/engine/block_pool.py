"""Who holds which KV block: reference counts, free blocks, and full blocks kept for prompts to come.

One owner, the engine's step loop. A block is in one of three states:

======== ========= ==================================================================
from     to        when
======== ========= ==================================================================
free     in use    allocated
in use   in use    shared or released, as long as somebody holds it
in use   cached    released by its last holder, and its content is known by a key
in use   free      released by its last holder, and its content is nobody's
cached   in use    a prompt begins with its content
cached   free      evicted, least recently used first, because free blocks ran out
======== ========= ==================================================================

The key of a full block stands for all tokens up to its end, and for the partition they belong to: equal keys mean
equal content. Keys are keyed BLAKE3 digests under a secret of the pool, so that nobody can construct two prompts that
meet in one key.
"""

from __future__ import annotations

import secrets
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from blake3 import blake3

#: Free blocks left behind the last block of a sequence that may still grow, where the gap is large enough, so that its
#: blocks stay neighbours.
_HEADROOM_BLOCKS = 32
#: Blocks evicted at a time: a chain's end then becomes one gap, and its new owner's blocks are neighbours.
_EVICTED_BLOCKS = 8


class BlockPoolIntegrityError(Exception):
    """The pool's books do not agree; the message says where."""


class BlockPool:
    """Blocks 0 to ``num_blocks - 1``. Costs nothing for a block that was never used.

    Invariant: every block is free, cached or in use, never two of them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._secret = secrets.token_bytes(32)
        self._gaps = _Gaps(num_blocks)
        self._references: dict[int, int] = {}  # of blocks in use
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return self._gaps.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content may serve a prompt to come."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`allocate` can give."""
        return self.num_free + self.num_cached

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._references)

    # --- keys ---

    def make_root(self, partition: str) -> bytes:
        """The key that a partition's chains of blocks begin with."""
        return blake3(partition.encode(), key=self._secret).digest()

    def extend_key(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """Key of a full block with ``token_ids`` behind the block of key ``parent``."""
        return blake3(parent + array("I", token_ids).tobytes(), key=self._secret).digest()

    def find(self, key: bytes) -> int | None:
        """The block with that content."""
        return self._block_of.get(key)

    def remember(self, block: int, key: bytes) -> None:
        """Say what a block in use holds, for prompts to come. Without effect where its content or it is known."""
        if block in self._references and block not in self._key_of and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    # --- blocks ---

    def is_cached(self, block: int) -> bool:
        """Whether nobody holds the block and its content is kept."""
        return block in self._cached

    def allocate(self, num_blocks: int, *, after: int | None = None) -> list[int] | None:
        """``num_blocks`` blocks held once, neighbours where possible, the first one behind ``after``; None, and no
        change, if there are not as many. Cached blocks are evicted where free ones do not suffice."""
        if num_blocks > self.num_available:
            return None
        if num_blocks > self.num_free:
            self._evict(max(num_blocks - self.num_free, min(_EVICTED_BLOCKS, self.num_cached)))
        blocks: list[int] = []
        while len(blocks) < num_blocks:
            wanted = (blocks[-1] if blocks else after) if blocks or after is not None else None
            missing = num_blocks - len(blocks)
            if wanted is not None and self._gaps.contains(wanted + 1):
                taken = self._gaps.take(wanted + 1, missing)
            else:
                taken = self._gaps.take(self._choose_start(missing), missing)
            blocks += taken
        self._references.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more; cached ones come back into use.

        Raises:
            BlockPoolIntegrityError: one is free.
        """
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
                self._references[block] = 1
            elif block in self._references:
                self._references[block] += 1
            else:
                raise BlockPoolIntegrityError(f"block {block} is free and cannot be shared")

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Hold a sequence's blocks once less; those that became free.

        The later blocks of a sequence are evicted before the earlier ones, which more prompts have in common.

        Raises:
            BlockPoolIntegrityError: one is not in use.
        """
        freed: list[int] = []
        for block in reversed(blocks):
            references = self._references.get(block, 0)
            if references == 0:
                raise BlockPoolIntegrityError(f"block {block} is released and nobody holds it")
            if references > 1:
                self._references[block] = references - 1
                continue
            del self._references[block]
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._gaps.give(block)
                freed.append(block)
        return freed

    def forget(self) -> None:
        """The contents of all blocks are gone: keep none for prompts to come.

        Raises:
            BlockPoolIntegrityError: some are in use.
        """
        if self._references:
            raise BlockPoolIntegrityError(f"{self.num_used} blocks are in use and their contents are gone")
        self._evict(self.num_cached)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Check the books against ``held``: every holder's blocks, one after the other.

        Raises:
            BlockPoolIntegrityError: they do not agree.
        """
        expected: dict[int, int] = {}
        for block in held:
            expected[block] = expected.get(block, 0) + 1
        if expected != self._references:
            raise BlockPoolIntegrityError(f"held {expected}, counted {self._references}")
        if not self._key_of.keys() >= self._cached.keys() or self._cached.keys() & self._references.keys():
            raise BlockPoolIntegrityError("a cached block has no key, or is in use")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise BlockPoolIntegrityError("keys and blocks do not match")
        if not self._key_of.keys() <= self._cached.keys() | self._references.keys():
            raise BlockPoolIntegrityError("a free block has a key")
        self._gaps.check_integrity([*self._cached, *self._references], self.num_blocks)

    def _evict(self, num_blocks: int) -> None:
        for _ in range(num_blocks):
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self._gaps.give(block)
        self.num_evictions += num_blocks

    def _choose_start(self, num_blocks: int) -> int:
        """Where a new stretch of blocks begins: in the longest gap, with room for whoever ends before it to grow."""
        begin, end = self._gaps.find_longest()
        if begin - 1 in self._references:
            begin += max(0, min(_HEADROOM_BLOCKS, (end - begin - num_blocks) // 2))
        return begin


class _Gaps:
    """Free blocks as sorted stretches ``[begin, end)`` that do not touch each other."""

    def __init__(self, num_blocks: int) -> None:
        self.num_free = num_blocks
        self._begins = [0] if num_blocks else []
        self._ends = [num_blocks] if num_blocks else []

    def contains(self, block: int) -> bool:
        index = bisect_right(self._begins, block) - 1
        return index >= 0 and block < self._ends[index]

    def find_longest(self) -> tuple[int, int]:
        """The longest stretch; the first of several. Requires: there is one."""
        index = max(range(len(self._begins)), key=lambda i: self._ends[i] - self._begins[i])
        return self._begins[index], self._ends[index]

    def take(self, block: int, num_blocks: int) -> list[int]:
        """Up to ``num_blocks`` blocks from ``block``, which is free, to the end of its stretch."""
        index = bisect_right(self._begins, block) - 1
        begin, end = self._begins[index], self._ends[index]
        last = min(block + num_blocks, end)
        remains = [(begin, block), (last, end)]
        self._begins[index : index + 1] = [left for left, right in remains if left < right]
        self._ends[index : index + 1] = [right for left, right in remains if left < right]
        self.num_free -= last - block
        return list(range(block, last))

    def give(self, block: int) -> None:
        """Add a block that is not free."""
        index = bisect_left(self._begins, block)
        touches_left = index > 0 and self._ends[index - 1] == block
        touches_right = index < len(self._begins) and self._begins[index] == block + 1
        if touches_left and touches_right:
            self._ends[index - 1] = self._ends.pop(index)
            del self._begins[index]
        elif touches_left:
            self._ends[index - 1] = block + 1
        elif touches_right:
            self._begins[index] = block
        else:
            self._begins.insert(index, block)
            self._ends.insert(index, block + 1)
        self.num_free += 1

    def check_integrity(self, taken: Sequence[int], num_blocks: int) -> None:
        """Check that the stretches are whole and that they and ``taken`` are all blocks.

        Raises:
            BlockPoolIntegrityError: they are not.
        """
        edges = [edge for stretch in zip(self._begins, self._ends, strict=True) for edge in stretch]
        if edges != sorted(set(edges)) or any(self.contains(block) for block in taken):
            raise BlockPoolIntegrityError(f"free stretches {edges} and taken blocks overlap")
        num_free = sum(end - begin for begin, end in zip(self._begins, self._ends, strict=True))
        if num_free != self.num_free or num_free + len(taken) != num_blocks or (edges and edges[-1] > num_blocks):
            raise BlockPoolIntegrityError(f"{num_free} free and {len(taken)} taken blocks of {num_blocks}")
