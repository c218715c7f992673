"""Tokens chosen on the device: logits stay there, a few numbers a row come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.backends import cuda_kernels as kernels
from worker.backends.cuda.device import Device, Place, Stream, align
from worker.backends.cuda.transfers import Transfers
from worker.backends.cuda.workspace import Workspace
from worker.backends.cuda_kernels import SAMPLING_ROW
from worker.backends.sampling_rows import NO_CHOICE, Logprobs, SampledToken, SamplingRow


@dataclass(slots=True)
class _Lists:
    """Ids with values, and masks, of all rows one behind the other."""

    ids: list[npt.NDArray[Any]] = field(default_factory=list)
    values: list[npt.NDArray[Any]] = field(default_factory=list)
    masks: list[npt.NDArray[np.uint32]] = field(default_factory=list)
    count: int = 0

    def add(self, ids: npt.NDArray[Any], values: npt.NDArray[Any] | None) -> tuple[int, int]:
        begin, self.count = self.count, self.count + len(ids)
        self.ids.append(ids)
        self.values.append(np.zeros(len(ids), np.float32) if values is None else values)
        return begin, self.count

    def add_mask(self, mask: npt.NDArray[np.uint32] | None) -> int:
        if mask is None:
            return -1
        self.masks.append(mask)
        return len(self.masks) - 1


class DeviceSampler:
    """Samples from logits on the device. Engine thread only."""

    def __init__(
        self,
        device: Device,
        stream: Stream,
        transfers: Transfers,
        synchronise: Callable[[], None],
        vocab_size: int,
    ) -> None:
        """``synchronise`` waits for the stream."""
        self._device = device
        self._stream = stream
        self._transfers = transfers
        self._workspace = Workspace(device, synchronise)
        self._vocab_size = vocab_size

    @property
    def num_bytes(self) -> int:
        """Bytes of scratch memory on the device."""
        return self._workspace.num_bytes

    def close(self) -> None:
        """Free its scratch memory. Requires: nothing queued touches it. Idempotent."""
        self._workspace.close()

    def sample(self, logits: Place, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One token for each of ``rows`` out of ``logits`` float32 ``[R, V]``. Blocks until they are known."""
        if not rows:
            return []
        num_top = max((row.num_top_logprobs for row in rows if row.num_top_logprobs is not None), default=None)
        # results: tokens, log-probability of each, then ids and values of the best
        num_results = len(rows) * (2 + 2 * (num_top or 0))
        results = self._workspace.take("sampled", 4 * num_results)
        tokens = results.part(0, 4 * len(rows))
        row_indices = self._launch_choice(logits, rows, tokens)
        if num_top is not None:
            self._launch_logprobs(logits, rows, num_top, results, row_indices)
            found = self._transfers.receive(results)
        else:
            found = self._transfers.receive(tokens)
        return self._read(found.view(np.int32), rows, num_top)

    def _launch_choice(self, logits: Place, rows: Sequence[SamplingRow], tokens: Place) -> Place:
        """Queue the draw; the rows of logits as the device has them."""
        indices = np.array([row.row for row in rows], np.int32)
        row_indices = self._workspace.take("sampled-rows", indices.nbytes)
        self._transfers.send_array(row_indices, indices)
        if all(_is_plain_greedy(row) for row in rows):
            launch = kernels.argmax_rows(tokens, logits, row_indices, num_rows=len(rows), vocab_size=self._vocab_size)
            self._device.launch(launch, self._stream)
            return row_indices
        lists = _Lists()
        table = np.array([_describe(row, lists) for row in rows], SAMPLING_ROW)
        parts = [
            table.view(np.uint8),
            np.concatenate([*lists.ids, np.zeros(1)]).astype(np.int32).view(np.uint8),
            np.concatenate([*lists.values, np.zeros(1)]).astype(np.float32).view(np.uint8),
            np.concatenate([*lists.masks, np.zeros(1, np.uint32)]).view(np.uint8),
        ]
        starts = np.cumsum([0] + [align(part.nbytes) for part in parts])
        area = self._workspace.take("sampling-rows", int(starts[-1]))
        pinned = self._transfers.take_in(area.num_bytes)
        for start, part in zip(starts, parts, strict=False):
            pinned[start : start + part.nbytes] = part
        self._transfers.send(area, pinned)
        places = [area.part(int(start), part.nbytes) for start, part in zip(starts, parts, strict=False)]
        scratch = self._workspace.take("sampling-scores", 4 * len(rows) * self._vocab_size)
        launch = kernels.sample_rows(tokens, scratch, logits, *places, num_rows=len(rows), vocab_size=self._vocab_size)
        self._device.launch(launch, self._stream)
        return row_indices

    def _launch_logprobs(
        self, logits: Place, rows: Sequence[SamplingRow], num_top: int, results: Place, row_indices: Place
    ) -> None:
        part = 4 * len(rows)
        launch = kernels.top_logprobs(
            results.part(part, part),
            results.part(2 * part, part * num_top),
            results.part(2 * part + part * num_top, part * num_top),
            logits,
            row_indices,
            results.part(0, part),
            num_rows=len(rows),
            vocab_size=self._vocab_size,
            num_top=min(num_top, self._vocab_size),
        )
        self._device.launch(launch, self._stream)

    def _read(
        self, found: npt.NDArray[np.int32], rows: Sequence[SamplingRow], num_top: int | None
    ) -> list[SampledToken]:
        count = len(rows)
        tokens = [int(token) for token in found[:count]]
        if num_top is None:
            return [SampledToken(token) for token in tokens]
        chosen = found[count : 2 * count].view(np.float32)
        ids = found[2 * count : (2 + num_top) * count].reshape(count, num_top)
        values = found[(2 + num_top) * count : (2 + 2 * num_top) * count].view(np.float32).reshape(count, num_top)
        sampled = []
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            logprobs = None
            if row.num_top_logprobs is not None and token != NO_CHOICE:
                kept = slice(0, min(row.num_top_logprobs, self._vocab_size))
                best = zip(ids[index, kept].tolist(), values[index, kept].tolist(), strict=True)
                logprobs = Logprobs(float(chosen[index]), tuple(best))
            sampled.append(SampledToken(token, logprobs))
        return sampled


def _is_plain_greedy(row: SamplingRow) -> bool:
    return (
        row.temperature <= 0
        and row.allowed is None
        and not len(row.bias_ids)
        and (row.repetition_penalty == 1 or not len(row.seen_ids))
        and not len(row.counted_ids)
    )


def _describe(row: SamplingRow, lists: _Lists) -> tuple[float, ...]:
    """One record of :data:`SAMPLING_ROW`."""
    seen = lists.add(row.seen_ids if row.repetition_penalty != 1 else row.seen_ids[:0], None)
    counted = lists.add(row.counted_ids, row.counts)
    bias = lists.add(row.bias_ids, row.bias_values)
    return (
        *(row.uniform, row.top_p, row.temperature, row.min_p, row.repetition_penalty),
        *(row.frequency_penalty, row.presence_penalty),
        *(row.row, row.top_k, lists.add_mask(row.allowed)),
        *(*seen, *counted, *bias),
    )
