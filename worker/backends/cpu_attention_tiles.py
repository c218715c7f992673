"""Attention of many queries over many keys in bf16, tile by tile, for processors with a matrix unit.

Queries, keys, values and weights are rounded to bf16, sums are float32, as attention kernels of GPUs do. A tile of keys
is scored, weighed and summed before the next one comes: scores stay in the core's own cache, and memory stays the same
at any length. Weights are relative to the largest score of the first tile, which the product of the later ones
subtracts as it goes; float32 has room for scores up to 88 above it. Beyond, the maximum is followed from tile to tile.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numkong
import numpy as np
import numpy.typing as npt

from worker.backends.cpu_buffers import round_into, transpose_into, wrap_array
from worker.backends.kv_blocks import Runs, cut_runs
from worker.backends.protocol import FloatArray

# Any: the stub of dots_packed lacks ``threads``.
_dots_packed: Final[Any] = numkong.dots_packed
_dots_pack: Final[Any] = numkong.dots_pack

#: Keys of a tile. With 384 rows of queries its scores take 768 KiB.
TILE_KEYS: Final = 512
#: Tokens of a task; a view's end and a window's beginning differ by less than a tile within it.
TASK_TOKENS: Final = 128

#: Sets to -inf what the queries must not see of keys ``[first, last)`` (positions) in a tile ``[G, tokens, keys]``.
Mask = Callable[[FloatArray, int, int], None]
_SHIFTS: Final = 2  # columns behind a query
_Bits = npt.NDArray[np.uint16]


class TileMemory:
    """What the tiles of one thread are computed in; grown on demand."""

    def __init__(self) -> None:
        self._floats: dict[str, FloatArray] = {}
        self._halves: dict[str, npt.NDArray[Any]] = {}

    def floats(self, name: str, num_rows: int, width: int) -> FloatArray:
        """An uninitialised array of that shape; the previous one of that name is overwritten."""
        flat = self._floats.get(name)
        if flat is None or flat.size < num_rows * width:
            flat = self._floats[name] = np.empty(num_rows * width, np.float32)
        return flat[: num_rows * width].reshape(num_rows, width)

    def halves(self, name: str, num_rows: int, width: int) -> npt.NDArray[Any]:
        """The same of bf16 numbers."""
        flat = self._halves.get(name)
        if flat is None or flat.size < num_rows * width:
            flat = self._halves[name] = np.empty(num_rows * width, ml_dtypes.bfloat16)
        return flat[: num_rows * width].reshape(num_rows, width)


def attend_tiles(
    queries: FloatArray,
    out: FloatArray,
    keys_values: tuple[FloatArray, FloatArray],
    runs: Runs,
    first_key: int,
    mask: Mask,
    memory: TileMemory,
) -> None:
    """Attention of one head's scaled ``queries`` ``[G, Dh, T]`` into ``out`` of that shape.

    Keys and values are ``[rows, Dh]``; those of ``runs`` are meant, and ``first_key`` is the position of the first.
    Requires: each query sees one of the first :data:`TILE_KEYS` keys.
    """
    sweep = _Sweep(queries, keys_values, runs, first_key, mask, memory)
    with np.errstate(over="ignore", invalid="ignore"):
        total = sweep.sum_tiles(follows_maximum=False)
    if not np.isfinite(total).all():  # a score lies 88 above the largest of the first tile
        total = sweep.sum_tiles(follows_maximum=True)
    group, head_dim, num_tokens = queries.shape
    weighted = total[:, :head_dim]
    np.divide(weighted, total[:, head_dim:], weighted)
    out[...] = weighted.reshape(group, num_tokens, head_dim).transpose(0, 2, 1)


class _Sweep:
    """One head's queries on their way over the keys."""

    def __init__(
        self,
        queries: FloatArray,
        keys_values: tuple[FloatArray, FloatArray],
        runs: Runs,
        first_key: int,
        mask: Mask,
        memory: TileMemory,
    ) -> None:
        group, self._head_dim, num_tokens = queries.shape
        self._num_rows = group * num_tokens
        self._tile_shape = group, num_tokens
        self._keys, self._values = keys_values
        self._runs = runs
        self._first_key = first_key
        self._mask = mask
        self._memory = memory
        # Behind each query what is subtracted from its scores, in two parts: the product then subtracts for nothing.
        self._queries = memory.halves("queries", self._num_rows, self._head_dim + _SHIFTS)
        rows = queries.transpose(0, 2, 1).reshape(self._num_rows, self._head_dim)
        self._queries[:, : self._head_dim] = round_into(memory.halves("rows", *rows.shape), rows)

    def sum_tiles(self, *, follows_maximum: bool) -> FloatArray:
        """Weighted sums of values, and behind them those of weights, ``[G * T, Dh + 1]``; valid until the next sweep.

        Weights are relative to the largest score of the first tile, or, if it ``follows_maximum``, of all so far.
        """
        num_keys = sum(end - begin for begin, end in self._runs)
        memory, width = self._memory, self._head_dim + 1
        total, part = memory.floats("total", self._num_rows, width), memory.floats("part", self._num_rows, width)
        total[...] = 0
        self._queries[:, self._head_dim :] = 0
        largest: FloatArray | None = None
        for first in range(0, num_keys, TILE_KEYS):
            last = min(first + TILE_KEYS, num_keys)
            runs = cut_runs(self._runs, first, last)
            scores = self._score(runs, first, last)
            if largest is None or follows_maximum:
                highest = np.maximum.reduce(scores, -1, keepdims=True)
                higher = highest if largest is None else np.maximum(largest, highest)
                if largest is not None:
                    np.multiply(total, np.exp(largest - higher), total)
                largest = higher
                np.subtract(scores, largest, scores)
                if not follows_maximum:
                    self._shift(largest)
            np.exp(scores, scores)
            weights = round_into(memory.halves("weights", *scores.shape), scores)
            _dots_packed(wrap_array(weights), self._pack_values(runs), out=wrap_array(part), threads=1)
            np.add(total, part, total)
        return total

    def _shift(self, largest: FloatArray) -> None:
        """Subtract ``largest`` ``[G * T, 1]`` from the scores of the tiles to come."""
        coarse = largest.astype(ml_dtypes.bfloat16)
        self._queries[:, self._head_dim : self._head_dim + 1] = coarse
        self._queries[:, self._head_dim + 1 :] = largest - coarse.astype(np.float32)

    def _score(self, runs: Runs, first: int, last: int) -> FloatArray:
        """Masked scores ``[G * T, keys]``."""
        keys = self._memory.halves("keys", last - first, self._head_dim + _SHIFTS)
        keys[:, : self._head_dim] = self._gather(self._keys, runs)
        keys[:, self._head_dim :] = -1
        scores = self._memory.floats("scores", self._num_rows, last - first)
        packed = _dots_pack(wrap_array(keys))
        _dots_packed(wrap_array(self._queries), packed, out=wrap_array(scores), threads=1)
        tile = scores.reshape(*self._tile_shape, last - first)
        self._mask(tile, self._first_key + first, self._first_key + last)
        return scores

    def _pack_values(self, runs: Runs) -> Any:
        """Values as columns, and a column of ones behind them: its product is the sum of the weights as rounded."""
        rows = self._gather(self._values, runs)
        columns = self._memory.halves("columns", self._head_dim + 1, len(rows))
        bits: _Bits = columns.view(np.uint16)
        transpose_into(bits[: self._head_dim], rows.view(np.uint16))
        columns[self._head_dim] = 1
        return _dots_pack(wrap_array(columns))

    def _gather(self, source: FloatArray, runs: Runs) -> npt.NDArray[Any]:
        """Rows of ``source`` in bf16, one after the other; valid until the next call."""
        rows = self._memory.halves("rows", sum(end - begin for begin, end in runs), self._head_dim)
        first = 0
        for begin, end in runs:
            round_into(rows[first : first + end - begin], source[begin:end])
            first += end - begin
        return rows
