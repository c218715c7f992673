"""Calibrated int8: runs the float32 model over a text once, and rounds each matrix to what the text makes it read.

The program is the guest's own, run by the CPU backend's program runner over the source's tensors; a matrix is rounded
when its first product is due, with the activations that product reads, and is then done with. So memory is the model
in float32, the activations of 2,048 tokens in one layer, and the int8 matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import structlog

from guests.abi import Opcode
from guests.program import decode_program
from guests.runtime import GuestEngine
from guests.text import GuestText
from worker.backends.cores import count_usable_cores
from worker.backends.cpu_attention_scratch import AttentionScratch, SequenceShare
from worker.backends.cpu_binding import StepTokens
from worker.backends.cpu_linear import Staging
from worker.backends.cpu_program import CpuProgram
from worker.backends.kv_blocks import KvBlocks, skip_tokens
from worker.backends.protocol import KV_BLOCK_TOKENS, BackendError, ModelPlan, SequenceInput, WeightTensor
from worker.build.error_feedback import quantize_with_feedback
from worker.build.errors import BuildError, MalformedModelError
from worker.build.guest_stage import StagedGuest
from worker.build.source import FloatArray, ModelSource
from worker.reports import read_memory_available_bytes

#: Chats, stories, manuals, code, tables and numbers in a few languages, written for this purpose.
DEFAULT_TEXT: Final = Path(__file__).with_name("calibration_text.txt")
#: Of the text, at most; in sequences of PIECE_TOKENS.
MAX_TOKENS: Final = 2048
PIECE_TOKENS: Final = 256
_TILE_TOKENS: Final = 128  # whole tiles: the runner pads nothing
#: Rounded so far, and in all; bytes.
OnProgress = Callable[[int, int], None]
#: Int8 matrices and their scales by the tensor's name.
Rounded = Mapping[str, tuple[npt.NDArray[np.int8], FloatArray]]

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Calibration:
    """``text`` to calibrate with. ``is_explicit``: somebody asked for this text, so that failing is an error."""

    text: str
    is_explicit: bool = True

    @classmethod
    def default(cls) -> Calibration:
        """With the text that ships."""
        return cls(DEFAULT_TEXT.read_text(encoding="utf-8"), is_explicit=False)


def calibrate(
    source: ModelSource, guest: StagedGuest, calibration: Calibration, on_progress: OnProgress | None = None
) -> Rounded:
    """The matrices of ``source`` that multiply, rounded for what ``calibration``'s text makes them read. Blocks: 20 s
    for 135 M parameters on two cores.

    Where the text was not asked for and it cannot be done, that is logged, and nothing is rounded.

    Raises:
        BuildError: too little memory or text, or a guest whose program cannot be run here.
        MalformedModelError: a value is not finite.
    """
    try:
        return _calibrate(source, guest, calibration.text, on_progress)
    except MalformedModelError:
        raise
    except (BackendError, BuildError) as error:
        if calibration.is_explicit:
            raise BuildError(f"cannot calibrate: {error}") from error
        _log.warning("int8_not_calibrated", reason=str(error))
        return {}


def _calibrate(source: ModelSource, guest: StagedGuest, text: str, on_progress: OnProgress | None) -> Rounded:
    needed_bytes = sum(4 * int(np.prod(tensor.shape)) for tensor in source.tensors) * 3 // 2
    available_bytes = read_memory_available_bytes()
    if needed_bytes > available_bytes:
        raise BuildError(
            f"it takes {needed_bytes} bytes of memory, {available_bytes} are free; build where there is more, or with "
            "--calibrate none"
        )
    if guest.initialised.tensors:
        raise BuildError("the guest makes tensors of its own")
    token_ids = _tokenize(guest, text)
    plan = _make_plan(source, guest)
    run = _CalibrationRun(plan, on_progress)
    run.run(token_ids)
    return run.rounded


def _tokenize(guest: StagedGuest, text: str) -> list[int]:
    with GuestEngine() as engine:
        engine.start_ticker()
        module = engine.compile(guest.initialised.baked_wasm)
        tokenizer = GuestText(module, seed=0)
        try:
            token_ids = tokenizer.tokenize(text, add_special=False, parse_special=True)
        finally:
            tokenizer.close()
            module.close()
    num_tokens = min(len(token_ids), MAX_TOKENS) // _TILE_TOKENS * _TILE_TOKENS
    if num_tokens == 0:
        raise BuildError(f"the text has {len(token_ids)} tokens: expected at least {_TILE_TOKENS}")
    return list(token_ids[:num_tokens])


def _make_plan(source: ModelSource, guest: StagedGuest) -> ModelPlan:
    handles = guest.initialised.tensor_handles
    tensors = {tensor.name: tensor for tensor in source.tensors}
    weights = []
    for name in handles:
        data = tensors[name].read()
        if not np.isfinite(data).all():
            raise MalformedModelError(f"tensor {name} holds values that are infinite or not a number")
        weights.append(WeightTensor(name, data))
    config = source.config
    prefill = decode_program(guest.programs.prefill, num_tensors=len(handles))
    return ModelPlan(
        prefill,
        prefill,
        tuple(weights),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
    )


@dataclass(slots=True)
class _CalibrationRun:
    """One step over all pieces of the text."""

    plan: ModelPlan
    on_progress: OnProgress | None
    rounded: dict[str, tuple[npt.NDArray[np.int8], FloatArray]] = field(default_factory=dict)
    done_bytes: int = 0
    total_bytes: int = 0

    def run(self, token_ids: list[int]) -> None:
        plan = self.plan
        piece_tokens = min(PIECE_TOKENS, plan.context_length)
        blocks = KvBlocks(plan.num_layers, plan.num_kv_heads, plan.head_dim, plan.context_length)
        attention = AttentionScratch(count_usable_cores())
        shares: list[SequenceShare] = []
        weights = {
            handle: _CalibratedWeight(plan.tensors[handle], self)
            for handle in {op.tensors[0] for op in plan.prefill.operations if op.opcode is Opcode.LINEAR}
        }
        self.total_bytes = sum(weight.data.size for weight in weights.values())
        program = CpuProgram(plan.prefill, plan, dict(weights), StepTokens(shares, attention, memory=blocks))
        pieces = [tuple(token_ids[at : at + piece_tokens]) for at in range(0, len(token_ids), piece_tokens)]
        piece_blocks = -(-piece_tokens // KV_BLOCK_TOKENS)
        blocks.open(piece_blocks * len(pieces))
        inputs = tuple(
            SequenceInput(tuple(range(index * piece_blocks, (index + 1) * piece_blocks)), 0, piece)
            for index, piece in enumerate(pieces)
        )
        positions: list[int] = []
        for piece, runs in zip(pieces, blocks.find_runs(inputs), strict=True):
            shares.append(SequenceShare(runs, skip_tokens(runs, 0), len(positions), len(piece), 0))
            positions += range(len(piece))
        try:
            with np.errstate(over="ignore"):  # see bind_silu_mul
                program.run(token_ids, positions, list(range(len(token_ids))))
        finally:
            attention.close()
            blocks.close()

    def round_matrix(self, name: str, data: FloatArray, activations: FloatArray) -> None:
        """Round ``data`` ``[N, K]`` for ``activations`` ``[K, T]``."""
        self.rounded[name] = quantize_with_feedback(data, activations @ activations.T)
        self.done_bytes += data.size
        if self.on_progress is not None:
            self.on_progress(self.done_bytes, self.total_bytes)


class _Columns:
    """Activations as they are."""

    def __init__(self) -> None:
        self.columns: Any = None  # [K, T]

    def bind_stage(self, source: FloatArray) -> Callable[[], None]:
        def stage() -> None:
            self.columns = source

        return stage


class _CalibratedWeight:
    """A float32 matrix that is rounded with its first product."""

    def __init__(self, tensor: WeightTensor, run: _CalibrationRun) -> None:
        self.data: FloatArray = tensor.data
        self._name = tensor.name
        self._run = run

    def describe_staging(self, num_tokens: int) -> Hashable:
        return "columns"

    def make_staging(self, shape: tuple[int, int]) -> Staging:
        return _Columns()

    def bind(self, staging: Any, out: FloatArray) -> Callable[[], None]:
        def multiply() -> None:
            if self._name not in self._run.rounded:
                self._run.round_matrix(self._name, self.data, staging.columns)
            if len(out) != self._run.plan.vocab_size:  # nobody reads the logits, and they are large
                np.matmul(self.data, staging.columns, out)

        return multiply
