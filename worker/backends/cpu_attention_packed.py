"""Attention of a few queries over many keys in bf16, for processors with a matrix unit: keys are packed once a prompt.

A long prompt beside running streams is computed in small portions, so that the streams keep their pace. Each portion
sees all keys before it, and packing these for the matrix unit costs more than the products of so few queries. Packed
keys and values are therefore kept while their prompt is computed. What is not packed yet, or has no room, is attended
to in float32 where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ml_dtypes
import numkong
import numpy as np
import numpy.typing as npt

from worker.backends.cpu_buffers import round_into, transpose_into, wrap_array
from worker.backends.kv_blocks import Runs, cut_runs, skip_tokens
from worker.backends.protocol import FloatArray

# Any: the stub of dots_packed lacks ``threads``.
_dots_packed: Final[Any] = numkong.dots_packed
_dots_pack: Final[Any] = numkong.dots_pack

#: Keys that are packed together, as soon as all of them are there.
PACKED_KEYS: Final = 256
#: What a model keeps packed at most: 5,800 tokens of 30 layers with 3 heads of 64 for keys and values.
MAX_PACKED_BYTES: Final = 128 * 1024 * 1024

_Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class PackedTile:
    """:data:`PACKED_KEYS` keys and values of one layer, one matrix a head."""

    keys: list[Any]
    values: list[Any]

    @property
    def num_bytes(self) -> int:
        return sum(matrix.nbytes for matrix in (*self.keys, *self.values))


@dataclass(slots=True)
class _Prompt:
    """Tiles of one sequence, layer by layer, from its first key on. Its block table is held, so that no other object
    takes that identity."""

    block_table: Sequence[int]
    layers: dict[int, list[PackedTile]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(tile.num_bytes for tiles in self.layers.values() for tile in tiles)


class PackedPrompts:
    """Packed keys and values of the prompts that are being computed, at most ``max_bytes``; those that were used
    longest ago go first. Engine thread only."""

    def __init__(self, max_bytes: int = MAX_PACKED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._prompts: dict[int, _Prompt] = {}  # by identity of the block table; used last: at the end
        self._tile_bytes = 0  # of the latest tile: all of a model are alike
        self.num_bytes = 0

    def find(
        self, block_table: Sequence[int], start: int, layer: int, planes: FloatArray, runs: Runs
    ) -> list[PackedTile]:
        """Tiles of the first keys of a sequence, all of them before position ``start``; packs what is missing.

        ``planes`` ``[2 * Hkv, rows, Dh]`` holds the layer's keys and values, ``runs`` where those of the sequence lie.
        Requires: positions before ``start`` keep their contents as long as the block table is the same object.
        """
        prompt = self._prompts.pop(id(block_table), None)
        if prompt is None or prompt.block_table is not block_table:
            prompt = _Prompt(block_table)
        self._prompts[id(block_table)] = prompt
        tiles = prompt.layers.setdefault(layer, [])
        num_wanted = start // PACKED_KEYS
        while len(tiles) > num_wanted:  # written anew by this step
            self.num_bytes -= tiles.pop().num_bytes
        while len(tiles) < num_wanted:
            if not self._make_room(self._tile_bytes, prompt):
                break  # before anything is packed in vain: every portion comes here in every layer
            first = len(tiles) * PACKED_KEYS
            tile = _pack(planes, cut_runs(runs, first, first + PACKED_KEYS))
            self._tile_bytes = tile.num_bytes
            if not self._make_room(tile.num_bytes, prompt):
                break
            tiles.append(tile)
            self.num_bytes += tile.num_bytes
        return tiles

    def forget(self, block_table: Sequence[int]) -> None:
        """Forget a sequence, which is no prompt any more. Nothing happens where it is not known."""
        prompt = self._prompts.get(id(block_table))
        if prompt is not None and prompt.block_table is block_table:
            self._drop(prompt)

    def forget_blocks(self, blocks: Iterable[int]) -> None:
        """Forget the sequences that have one of these blocks, which are given back."""
        if self._prompts:
            released = frozenset(blocks)
            for prompt in [each for each in self._prompts.values() if not released.isdisjoint(each.block_table)]:
                self._drop(prompt)

    def clear(self) -> None:
        """Forget everything."""
        self._prompts.clear()
        self.num_bytes = 0

    def _drop(self, prompt: _Prompt) -> None:
        del self._prompts[id(prompt.block_table)]
        self.num_bytes -= prompt.num_bytes

    def _make_room(self, num_bytes: int, prompt: _Prompt) -> bool:
        """Whether ``num_bytes`` more find room, if need be that of others than ``prompt``."""
        while self.num_bytes + num_bytes > self._max_bytes:
            oldest = next(iter(self._prompts.values()))
            if oldest is prompt:
                return False
            self._drop(oldest)
        return True


class PackedDesk:
    """What the queries of one portion are computed in: buffers for ``num_rows`` queries a head, and NumKong's views of
    them, which would take longer to make than to use. Grown on demand; engine thread only."""

    def __init__(self, num_kv_heads: int, num_rows: int, head_dim: int) -> None:
        self.key = num_kv_heads, num_rows, head_dim
        self.queries = np.empty((num_kv_heads, num_rows, head_dim), ml_dtypes.bfloat16)
        self.query_tensors = [wrap_array(rows) for rows in self.queries]
        self.scores: FloatArray = np.empty((0, num_kv_heads, num_rows, PACKED_KEYS), np.float32)
        self.grow(1)

    def grow(self, num_tiles: int) -> None:
        """Have room for as many tiles; what was in the buffers is lost where they were too small."""
        if num_tiles <= len(self.scores):
            return
        num_kv_heads, num_rows, head_dim = self.key
        shape = num_tiles, num_kv_heads, num_rows
        self.scores = np.empty((*shape, PACKED_KEYS), np.float32)
        self.weights = np.empty((*shape, PACKED_KEYS), ml_dtypes.bfloat16)
        self.parts = np.empty((*shape, head_dim), np.float32)
        self.score_tensors = [[wrap_array(rows) for rows in tile] for tile in self.scores]
        self.weight_tensors = [[wrap_array(rows) for rows in tile] for tile in self.weights]
        self.part_tensors = [[wrap_array(rows) for rows in tile] for tile in self.parts]


def attend_packed(
    queries: FloatArray,
    out: FloatArray,
    planes: FloatArray,
    runs: Runs,
    tiles: Sequence[PackedTile],
    desk: PackedDesk,
    later: FloatArray,
) -> None:
    """Causal attention of the last ``T`` tokens of ``runs``: ``queries`` (scaled) and ``out`` are ``[Hkv, G, Dh, T]``.

    The first keys are those of ``tiles``, in bf16; the others are read in ``planes`` ``[2 * Hkv, rows, Dh]``, in
    float32. ``later`` ``[>= T, >= T]`` is -inf where a key, by row, is later than a query. Weights are summed before
    they are rounded.
    """
    num_kv_heads, group, head_dim, num_tokens = queries.shape
    by_row = queries.transpose(0, 1, 3, 2).reshape(num_kv_heads, group * num_tokens, head_dim)
    rows: FloatArray = np.ascontiguousarray(by_row)  # of one token it is a view
    desk.grow(len(tiles))
    round_into(desk.queries, rows)
    for tile, own in zip(tiles, desk.score_tensors, strict=False):
        for query, keys, scores in zip(desk.query_tensors, tile.keys, own, strict=True):
            _dots_packed(query, keys, out=scores, threads=1)
    rest = skip_tokens(runs, len(tiles) * PACKED_KEYS)
    last = _score_rest(rows, planes[:num_kv_heads], rest)
    last.reshape(num_kv_heads, group, num_tokens, -1)[..., -num_tokens:] += later[:num_tokens, :num_tokens].T
    packed = desk.scores[: len(tiles)]
    sums = _weigh(packed, last)
    result = _sum_rest(last, planes[num_kv_heads:], rest)
    if tiles:
        round_into(desk.weights[: len(tiles)], packed)
        for tile, own, parts in zip(tiles, desk.weight_tensors, desk.part_tensors, strict=False):
            for weights, values, part in zip(own, tile.values, parts, strict=True):
                _dots_packed(weights, values, out=part, threads=1)
        np.add(result, np.add.reduce(desk.parts[: len(tiles)], 0), result)
    np.divide(result, sums, result)
    out[...] = result.reshape(num_kv_heads, group, num_tokens, head_dim).transpose(0, 1, 3, 2)


def _weigh(packed: FloatArray, last: FloatArray) -> FloatArray:
    """Scores ``packed`` ``[tiles, Hkv, R, keys]`` and ``last`` ``[Hkv, R, keys]`` become weights; their sums
    ``[Hkv, R, 1]``."""
    largest = np.maximum.reduce(last, -1, keepdims=True)
    if len(packed):
        np.maximum(largest, np.maximum.reduce(np.maximum.reduce(packed, 0), -1, keepdims=True), out=largest)
        np.subtract(packed, largest, packed)
        np.exp(packed, packed)
    np.subtract(last, largest, last)
    np.exp(last, last)
    sums = np.add.reduce(last, -1, keepdims=True)
    if len(packed):
        np.add(sums, np.add.reduce(np.add.reduce(packed, 0), -1, keepdims=True), sums)
    return sums


def _score_rest(queries: FloatArray, keys: FloatArray, runs: Runs) -> FloatArray:
    """``[Hkv, R, keys]`` of ``queries`` ``[Hkv, R, Dh]`` with the ``runs`` of ``keys`` ``[Hkv, rows, Dh]``."""
    scores: FloatArray = np.empty((*queries.shape[:2], sum(end - begin for begin, end in runs)), np.float32)
    first = 0
    for begin, end in runs:
        np.matmul(queries, keys[:, begin:end].transpose(0, 2, 1), scores[..., first : first + end - begin])
        first += end - begin
    return scores


def _sum_rest(weights: FloatArray, values: FloatArray, runs: Runs) -> FloatArray:
    """``[Hkv, R, Dh]``: values that ``runs`` name, weighted."""
    result: FloatArray = np.zeros((*weights.shape[:2], values.shape[2]), np.float32)
    first = 0
    for begin, end in runs:
        np.add(result, np.matmul(weights[..., first : first + end - begin], values[:, begin:end]), result)
        first += end - begin
    return result


def _pack(planes: FloatArray, runs: Runs) -> PackedTile:
    """The keys and values of ``planes`` ``[2 * Hkv, rows, Dh]`` that ``runs`` name."""
    rounded = np.empty((len(planes), PACKED_KEYS, planes.shape[2]), ml_dtypes.bfloat16)
    first = 0
    for begin, end in runs:
        size = end - begin
        for plane, target in zip(planes, rounded, strict=True):
            round_into(target[first : first + size], plane[begin:end])
        first += size
    num_kv_heads = len(planes) // 2
    columns = np.empty((planes.shape[2], PACKED_KEYS), ml_dtypes.bfloat16)
    bits: _Bits = columns.view(np.uint16)
    tile = PackedTile([_dots_pack(wrap_array(keys)) for keys in rounded[:num_kv_heads]], [])
    for values in rounded[num_kv_heads:]:
        transpose_into(bits, values.view(np.uint16))
        tile.values.append(_dots_pack(wrap_array(columns)))
    return tile
