"""The KV block pool: as a state machine against a plain model, neighbours, eviction order, and the engine over it."""

from __future__ import annotations

import pytest
from engine_fixtures import EngineHarness, greedy, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from llama_programs import TINY

from scheduler.contract.states import Priority
from worker.engine.block_pool import BlockPool, BlockPoolIntegrityError
from worker.engine.types import EngineRequest

BLOCK_BYTES = 16 * 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4


class PoolMachine(RuleBasedStateMachine):
    """A pool beside the plainest thing that could be right: lists of holders, and a dictionary of contents.

    A content is a number; the content of a block is forgotten by the model when the pool gives the block away.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_blocks = 12
        self.pool = BlockPool(self.num_blocks)
        self.holders: list[list[int]] = []
        self.content_of: dict[int, int] = {}  # of remembered blocks, which may be in use or cached
        self.idle: list[int] = []  # cached blocks, least recently used first

    def held(self) -> list[int]:
        return [block for holder in self.holders for block in holder]

    def key_of(self, content: int) -> bytes:
        return self.pool.extend_key(self.pool.make_root("tenant"), [content])

    @rule(num_blocks=st.integers(0, 6), after=st.none() | st.integers(0, 11))
    def allocate(self, num_blocks: int, after: int | None) -> None:
        """All or nothing; never a block that somebody holds; cached ones only where free ones do not suffice."""
        available = set(range(self.num_blocks)) - set(self.held())
        free = available - set(self.idle)
        blocks = self.pool.allocate(num_blocks, after=after)
        if num_blocks > len(available):
            assert blocks is None
            return
        assert blocks is not None
        assert len(blocks) == len(set(blocks)) == num_blocks
        assert set(blocks) <= available
        if num_blocks <= len(free):
            assert set(blocks) <= free
        num_evicted = len(self.idle) - self.pool.num_cached
        assert num_evicted >= max(0, num_blocks - len(free))
        for block in self.idle[:num_evicted]:  # the oldest, and no other
            del self.content_of[block]
        del self.idle[:num_evicted]
        if blocks:
            self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), content=st.integers(0, 9))
    def remember(self, data: st.DataObject, content: int) -> None:
        """A block has one content, a content one block: the first."""
        block = data.draw(st.sampled_from(self.held()))
        self.pool.remember(block, self.key_of(content))
        if block not in self.content_of and content not in self.content_of.values():
            self.content_of[block] = content

    @rule(content=st.integers(0, 9))
    def find_and_share(self, content: int) -> None:
        """What is remembered is found, and comes back into use when shared."""
        found = self.pool.find(self.key_of(content))
        assert found == next((block for block, known in self.content_of.items() if known == content), None)
        if found is not None:
            self.pool.share([found])
            self.holders.append([found])
            if found in self.idle:
                self.idle.remove(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """The last holder's blocks are free, unless their content is remembered; a chain's end is evicted first."""
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        freed = self.pool.release(holder)
        gone = [block for block in reversed(holder) if block not in self.held()]
        assert freed == [block for block in gone if block not in self.content_of]
        self.idle += [block for block in gone if block in self.content_of]

    @rule(block=st.integers(0, 11))
    def refuse_what_nobody_holds(self, block: int) -> None:
        """A free block cannot be shared, one that is not in use cannot be released."""
        if block not in self.held():
            with pytest.raises(BlockPoolIntegrityError):
                self.pool.release([block])
            if block not in self.idle:
                with pytest.raises(BlockPoolIntegrityError):
                    self.pool.share([block])

    @invariant()
    def books_agree(self) -> None:
        """Counts are the model's, and the pool's own check passes."""
        self.pool.check_integrity(self.held())
        assert self.pool.num_used == len(set(self.held()))
        assert self.pool.num_cached == len(self.idle)
        assert self.pool.num_free == self.num_blocks - len(set(self.held())) - len(self.idle)
        assert self.pool.num_available == self.pool.num_free + self.pool.num_cached


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_sequence_gets_neighbours_and_keeps_room_to_grow() -> None:
    """Blocks follow each other; a second sequence starts some way behind, so that the first one's stay neighbours."""
    pool = BlockPool(200)
    first = pool.allocate(3)
    second = pool.allocate(2)
    assert first == [0, 1, 2]
    assert second is not None
    assert second[1] == second[0] + 1 > 16
    for expected in range(3, 20):
        assert pool.allocate(1, after=expected - 1) == [expected]
    assert pool.allocate(1, after=second[-1]) == [second[-1] + 1]


def test_blocks_evicted_together_are_neighbours_again() -> None:
    """A cache that is full of one chain gives its end, in order, to a new sequence; the beginning stays."""
    pool = BlockPool(16)
    blocks = pool.allocate(16)
    assert blocks is not None
    key = pool.make_root("tenant")
    for block in blocks:
        key = pool.extend_key(key, [block])
        pool.remember(block, key)
    pool.release(blocks)
    assert pool.allocate(3) == [8, 9, 10]
    assert (pool.num_cached, pool.num_evictions) == (8, 8)


def test_keys_depend_on_parent_tokens_partition_and_pool() -> None:
    """Chains of different beginnings or partitions never meet, and no key is known outside its pool."""
    pool = BlockPool(4)
    roots = {pool.make_root(partition) for partition in ("", "a", "b")}
    keys = {pool.extend_key(root, tokens) for root in roots for tokens in ([1, 2], [2, 1], [1], [1, 2, 0])}
    assert len(roots | keys) == 3 + 12
    assert BlockPool(4).make_root("a") not in roots


def test_broken_books_are_noticed() -> None:
    """A block held twice and counted once, or lost, is an error."""
    pool = BlockPool(8)
    blocks = pool.allocate(2)
    assert blocks is not None
    for held in ([*blocks, blocks[0]], blocks[:1], [7, *blocks]):
        with pytest.raises(BlockPoolIntegrityError):
            pool.check_integrity(held)
    pool.check_integrity(blocks)


# --- the engine over the pool ---

SHARED = tuple(3 + i * 7 % 90 for i in range(40))
PROMPTS = [(*SHARED, 5, 6, 7), (*SHARED, 8), (*SHARED[:32], 9, 9), (11, 12, 13, 14), SHARED[:20], tuple(range(3, 80))]
SOLO: dict[tuple[int, int], list[list[int]]] = {}


def solo_tokens(prompt: int, num_choices: int) -> list[list[int]]:
    """What each choice gets on an engine of its own, without any cache."""
    if (prompt, num_choices) not in SOLO:
        alone = EngineHarness().complete(make_request("solo", PROMPTS[prompt], greedy(24, ignore_eos=True)))
        SOLO[prompt, num_choices] = [alone.token_ids()] * num_choices  # greedy: all choices are alike
    return SOLO[prompt, num_choices]


@settings(max_examples=40, deadline=None)
@given(
    script=st.lists(
        st.tuples(st.sampled_from(["join", "join", "batch", "cancel", "round", "round"]), st.integers(0, 11)),
        min_size=6,
        max_size=40,
    ),
    max_running=st.integers(1, 5),
    num_blocks=st.integers(8, 24),
)
def test_any_interleaving_with_shared_prefixes_leaves_solo_tokens_and_a_whole_pool(
    script: list[tuple[str, int]], max_running: int, num_blocks: int
) -> None:
    """Joins, leaves, cancels, preemptions, shared prefixes, several choices and tenants: each sequence's tokens are
    those of its solo run, the books agree after every round, and in the end every block is free or kept."""
    harness = EngineHarness(max_running=max_running, kv_budget_bytes=num_blocks * BLOCK_BYTES)
    requests: dict[str, tuple[int, int]] = {}
    cancelled: set[str] = set()
    for action, number in script:
        if action in ("join", "batch"):
            request_id = f"r{len(requests)}"
            requests[request_id] = (number % 6, 1 + number // 6)
            harness.submit(
                EngineRequest(
                    request_id,
                    PROMPTS[number % 6],
                    greedy(24, ignore_eos=True),
                    num_choices=1 + number // 6,
                    tenant="ab"[number % 2],
                    priority=Priority.BATCH if action == "batch" else Priority.INTERACTIVE,
                )
            )
        elif action == "cancel" and requests:
            request_id = list(requests)[number % len(requests)]
            if harness.outcomes[request_id].final is None:
                cancelled.add(request_id)
            harness.cancel(request_id)
        else:
            harness.run_round()  # checks the books
    harness.run_until_done()
    for request_id, (prompt, num_choices) in requests.items():
        outcome, expected = harness.outcomes[request_id], solo_tokens(prompt, num_choices)
        assert outcome.final is not None
        if outcome.final.error is not None and request_id not in cancelled:
            assert "KV memory" in outcome.final.error.message
            continue
        for choice in range(num_choices):
            found = outcome.token_ids(choice)
            assert found == expected[choice][: len(found)] if request_id in cancelled else expected[choice]
    statistics = harness.engine.statistics()
    assert statistics.kv_used_bytes == 0
    assert statistics.kv_total_bytes == num_blocks * BLOCK_BYTES
    assert statistics.kv_cached_bytes <= statistics.kv_total_bytes
