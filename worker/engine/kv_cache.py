"""The KV cache of an engine: which blocks a choice has, what it takes over instead of computing, what it leaves.

A prompt's beginning is taken over from three places, all in whole blocks of 16 tokens but the last: blocks that an
earlier sequence of the same tenant computed (prompt or completion alike), blocks that hold a primed prefix of the
snapshot (everybody's, restored at first use), and the mapped prefix itself for the tokens behind its last full block.
At least the last token is always computed, since only computing gives logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from worker.backends.protocol import KV_BLOCK_TOKENS, BoundModel, FloatArray, Parkable
from worker.engine.block_pool import BlockPool
from worker.engine.prefixes import PrefixIndex
from worker.engine.sequence import Choice, RunningRequest


@dataclass(frozen=True, slots=True)
class _Match:
    """What a sequence need not compute: ``blocks`` of the pool, then the rest of ``primed`` beyond them."""

    blocks: list[int]
    primed: FloatArray | None
    primed_keys: list[bytes]

    @property
    def num_primed(self) -> int:
        return 0 if self.primed is None else int(self.primed.shape[3])


class KvCache:
    """Blocks for the engine's choices within ``budget_bytes``, to the byte. Engine thread only."""

    def __init__(
        self, bound: BoundModel, budget_bytes: int, prefixes: PrefixIndex, *, prefix_caching: bool = True
    ) -> None:
        self.block_bytes = bound.kv_block_bytes
        self.pool = BlockPool(budget_bytes // self.block_bytes)
        self.num_prompt_tokens = 0  # of admitted sequences
        self.num_cached_tokens = 0  # of these, taken over
        self._bound = bound
        self._prefixes = prefixes
        self._prefix_caching = prefix_caching
        bound.open_kv(self.pool.num_blocks)
        if isinstance(bound, Parkable):
            bound.watch_kv(self.pool.forget)  # what was kept is computed anew, or restored from the mapped prefix

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks that running choices hold."""
        return self.pool.num_used * self.block_bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes of blocks that nobody holds and that are kept for prompts to come."""
        return self.pool.num_cached * self.block_bytes

    def has_room(self, request: RunningRequest, *, num_spare_blocks: int) -> bool:
        """Whether every unfinished choice's tokens so far find room, with ``num_spare_blocks`` left over."""
        leader, *followers = request.unfinished
        matched = self._match(request, leader).blocks
        needed = count_blocks(len(leader.token_ids)) - len(matched) + sum(map(self.pool.is_cached, matched))
        needed += sum(self._count_own(request, choice) for choice in followers)
        return needed + num_spare_blocks <= self.pool.num_available

    def open(self, request: RunningRequest) -> None:
        """Give every unfinished choice its blocks; the first one computes the prompt for all.

        Requires: :meth:`has_room`. On failure some choices may have blocks: :meth:`close` each.

        Raises:
            BackendError: the backend refused a prefix.
            MemoryError: there was no room.
        """
        leader, *followers = request.unfinished
        match = self._match(request, leader)
        self.pool.share(match.blocks)
        leader.blocks = list(match.blocks)
        last = match.blocks[-1] if match.blocks else None
        leader.blocks += self._allocate(count_blocks(len(leader.token_ids)) - len(match.blocks), last)
        leader.block_table = tuple(leader.blocks)
        leader.num_computed = len(match.blocks) * KV_BLOCK_TOKENS
        leader.num_remembered = len(match.blocks)
        self._restore_primed(leader, match)
        for choice in followers:
            choice.awaits_prefix = len(request.prompt) > 1
            choice.blocks = self._allocate(self._count_own(request, choice), None)
            choice.block_table = tuple(choice.blocks)
        if request.num_cached is None:  # after a preemption it finds its own blocks, which says nothing of the cache
            self.num_prompt_tokens += len(request.prompt)
            self.num_cached_tokens += min(leader.num_computed, len(request.prompt))

    def try_grow(self, choice: Choice, *, num_ahead: int = 0) -> bool:
        """Have blocks for all tokens of a choice and ``num_ahead`` more; False, and no change, where there are none."""
        missing = count_blocks(len(choice.token_ids) + num_ahead) - len(choice.blocks)
        if missing <= 0:
            return True
        blocks = self.pool.allocate(missing, after=choice.blocks[-1])
        if blocks is None:
            return False
        choice.blocks += blocks
        choice.block_table = tuple(choice.blocks)
        return True

    def hand_on(self, request: RunningRequest, leader: Choice, followers: Iterable[Choice]) -> None:
        """Give choices that wait for it the prompt but its last token: full blocks are shared, the rest is copied,
        because each writes its own tokens behind it in the step that follows."""
        num_tokens = len(request.prompt) - 1
        num_shared, num_rest = divmod(num_tokens, KV_BLOCK_TOKENS)
        shared, copies = leader.blocks[:num_shared], []
        for choice in followers:
            self.pool.share(shared)
            if num_rest:
                copies.append((leader.blocks[num_shared], choice.blocks[0]))
            choice.blocks = shared + choice.blocks
            choice.block_table = tuple(choice.blocks)
            choice.keys = leader.keys[:num_shared]
            choice.num_remembered = num_shared
            choice.num_computed = num_tokens
            choice.awaits_prefix = False
        if copies:
            self._bound.copy_blocks(copies)

    def remember(self, request: RunningRequest, choice: Choice) -> None:
        """Keep the blocks that the latest step filled for prompts to come. O(1) but where a block became full."""
        num_full = choice.num_computed // KV_BLOCK_TOKENS
        if num_full == choice.num_remembered or not self._prefix_caching:
            return
        self._extend_keys(request, choice, num_full)
        for index in range(choice.num_remembered, num_full):
            self.pool.remember(choice.blocks[index], choice.keys[index])
        choice.num_remembered = num_full

    def close(self, choice: Choice) -> None:
        """Take a choice's blocks back. Idempotent."""
        if choice.blocks:
            self._bound.release_blocks(self.pool.release(choice.blocks))
        choice.blocks = []
        choice.block_table = ()
        choice.num_computed = choice.num_remembered = 0
        choice.awaits_prefix = False

    def fits_alone(self, num_prompt_tokens: int, max_tokens: int, num_choices: int) -> bool:
        """Whether a request finds room where it has the cache for itself."""
        return count_request_blocks(num_prompt_tokens, max_tokens, num_choices) <= self.pool.num_blocks

    def _allocate(self, num_blocks: int, after: int | None) -> list[int]:
        blocks = self.pool.allocate(num_blocks, after=after)
        if blocks is None:
            raise MemoryError(f"{num_blocks} KV blocks for an admitted request, {self.pool.num_available} available")
        return blocks

    def _count_own(self, request: RunningRequest, follower: Choice) -> int:
        """Blocks of a choice that gets the prompt from the first one, without those that they share."""
        return count_blocks(len(follower.token_ids)) - (len(request.prompt) - 1) // KV_BLOCK_TOKENS

    def _match(self, request: RunningRequest, leader: Choice) -> _Match:
        primed = self._prefixes.find(request.prompt)
        num_primed_blocks = 0 if primed is None else primed.shape[3] // KV_BLOCK_TOKENS
        blocks: list[int] = []
        primed_keys: list[bytes] = []
        if not self._prefix_caching:
            return _Match(blocks, primed, primed_keys)
        token_ids = leader.token_ids
        for index in range(num_primed_blocks):
            parent = primed_keys[-1] if primed_keys else self.pool.make_root("primed")
            primed_keys.append(self.pool.extend_key(parent, _block_tokens(token_ids, index)))
        for index in range((len(token_ids) - 1) // KV_BLOCK_TOKENS):
            self._extend_keys(request, leader, index + 1)
            found = self.pool.find(leader.keys[index])
            if found is None and index < num_primed_blocks:
                found = self.pool.find(primed_keys[index])
            if found is None:
                break
            blocks.append(found)
        return _Match(blocks, primed, primed_keys)

    def _restore_primed(self, leader: Choice, match: _Match) -> None:
        """Fill the blocks behind the shared ones from the mapped prefix, and keep the full ones for everybody."""
        first = len(match.blocks)
        if match.primed is None or match.num_primed <= first * KV_BLOCK_TOKENS:
            return
        table = leader.block_table[first : count_blocks(match.num_primed)]
        self._bound.restore_prefix(table, match.primed[:, :, :, first * KV_BLOCK_TOKENS :])
        for index in range(first, len(match.primed_keys)):
            self.pool.remember(leader.blocks[index], match.primed_keys[index])
        leader.num_computed = match.num_primed
        leader.num_remembered = match.num_primed // KV_BLOCK_TOKENS

    def _extend_keys(self, request: RunningRequest, choice: Choice, num_blocks: int) -> None:
        keys = choice.keys
        for index in range(len(keys), num_blocks):
            parent = keys[-1] if keys else self.pool.make_root(f"tenant {request.request.tenant}")
            keys.append(self.pool.extend_key(parent, _block_tokens(choice.token_ids, index)))


def count_blocks(num_tokens: int) -> int:
    """Blocks that hold ``num_tokens`` tokens."""
    return -(-num_tokens // KV_BLOCK_TOKENS)


def count_request_blocks(num_prompt_tokens: int, max_tokens: int, num_choices: int) -> int:
    """The most blocks that a request ever holds: the prompt's full blocks once, the rest for each choice. The last
    sampled token is never computed."""
    num_shared = (num_prompt_tokens - 1) // KV_BLOCK_TOKENS
    return num_shared + num_choices * (count_blocks(max(num_prompt_tokens + max_tokens - 1, 1)) - num_shared)


def _block_tokens(token_ids: Sequence[int], index: int) -> Sequence[int]:
    return token_ids[index * KV_BLOCK_TOKENS : (index + 1) * KV_BLOCK_TOKENS]
