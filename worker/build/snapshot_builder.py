"""From a model source to a signed snapshot in the store.

Order, so that nothing half made is ever visible: the guest is initialised and compiled first (whatever it refuses,
it refuses before a byte is written), then the weights are streamed into the store tensor by tensor, then the guest's
blobs and the primed prefixes, and the signed manifest last. Blobs of a build that died have no manifest; the store's
garbage collection removes them, and its next opening sweeps the temporary files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from guests.errors import GuestError
from guests.llama_assets import (
    CONFIG_ASSET,
    TOKENIZER_ASSET,
    LlamaConfig,
    TokenizerKind,
    TokenizerSpec,
    pack_config,
    pack_tokenizer,
)
from snapshots.blob_writer import BlobWriter
from snapshots.block_types import BLOCK_TYPES
from snapshots.dtypes import array_type
from snapshots.keyring import KeyRing
from snapshots.manifest import NAME, SnapshotCard
from snapshots.store import SnapshotStore
from snapshots.weights_file import TensorSpec, WeightsLayout, plan_weights, write_weights
from worker.build.block_weights import choose_block_type, read_block_rows, require_blocks
from worker.build.calibration import Calibration, Rounded, calibrate
from worker.build.encoder_snapshot import make_encoder_card, pack_encoder_assets
from worker.build.encoder_source import ImportedEncoder
from worker.build.errors import BuildError, MalformedModelError
from worker.build.further_sections import NO_SECTIONS, FurtherSections
from worker.build.guest_stage import stage_guest
from worker.build.priming import Priming
from worker.build.quantize import (
    INT4_GROUP,
    WeightFormat,
    quantize_groups_to_int4,
    quantize_rows,
    quantize_rows_to_fp8,
    round_to_bfloat16,
)
from worker.build.report import BuildReport
from worker.build.snapshot_assembly import BuildOutput, StoredWeights, assemble_snapshot
from worker.build.source import FloatArray, ModelSource, SourceTensor
from worker.build.weight_layout import ROPE_TENSOR
from worker.tensor_names import SCALE_SUFFIX

#: The part of a worker's private memory that does not depend on the model: interpreter, guest, scratch.
WORKER_BASE_BYTES: Final = 96 * 1024 * 1024
#: KV cache that the card's estimate includes: this many sequences of this many tokens (fewer where the context ends).
ESTIMATED_SEQUENCES: Final = 8
ESTIMATED_SEQUENCE_TOKENS: Final = 2048
KV_ITEM_BYTES: Final = 4  # float32 keys and values
SPACE_MARK: Final = "\u2581".encode()
DTYPES: Final = {
    WeightFormat.BF16: "BF16",
    WeightFormat.F32: "F32",
    WeightFormat.INT8: "I8",
    WeightFormat.FP8: "F8_E4M3",
    WeightFormat.INT4: "U8",
}
#: Formats that no CPU backend but the reference reads.
_OF_GPUS: Final = frozenset({WeightFormat.FP8, WeightFormat.INT4, WeightFormat.GGUF})
#: Those that make two arrays of a block: the weights as stored, and their scales.
_QUANTISERS: Final[dict[str, Callable[[FloatArray], tuple[npt.NDArray[Any], npt.NDArray[Any]]]]] = {
    "I8": quantize_rows,
    "F8_E4M3": quantize_rows_to_fp8,
    "U8": quantize_groups_to_int4,
}
#: Matrices that 4 bits cost most: a lookup reads few bytes of the first, and every token's choice hangs on the second.
_NEVER_INT4: Final = frozenset({"embed.weight", "lm_head.weight"})

#: Called with bytes done and bytes in all while weights are written.
OnProgress = Callable[[int, int], None]


def build_snapshot(
    source: ModelSource | ImportedEncoder,
    name: str,
    store: SnapshotStore,
    keyring: KeyRing,
    *,
    weight_format: WeightFormat = WeightFormat.BF16,
    encrypt: bool = False,
    with_verity: bool = False,
    guest_wasm: bytes | None = None,
    priming: Priming | None = None,
    further: FurtherSections = NO_SECTIONS,
    calibration: Calibration | None = None,
    on_progress: OnProgress | None = None,
) -> BuildReport:
    """Build ``source`` as snapshot ``name``; an older one of that name is replaced when all is done. Blocks.

    ``encrypt`` encrypts every blob with the ring's newest encryption key, so that no plain byte of it reaches the disk.
    ``with_verity`` signs each file's fs-verity digest, and turns fs-verity on where it is offered.

    ``guest_wasm`` takes the place of the guest that ships for such models. ``priming`` says which prefixes to compute;
    None: none. ``calibration`` rounds a decoder's int8 matrices for a text (see
    :mod:`~worker.build.calibration`); None: each weight to the nearest.

    Memory: one tensor in its stored format, and blocks of 32 MiB of float32; with priming, the weights once; with
    calibration, one and a half times the weights in float32.

    Raises:
        BuildError: the source's files fail, its weights are no numbers, the guest refuses the model, or what was to
            be primed cannot be.
        SnapshotError: the store or the key ring refuses.
    """
    started_s = time.monotonic()
    validate_name(name)
    is_encoder = isinstance(source, ImportedEncoder)
    if weight_format in _OF_GPUS:
        priming = _adapt_to_gpus(weight_format, priming, is_encoder=is_encoder)
    if weight_format is WeightFormat.GGUF and not isinstance(source, ImportedEncoder):
        require_blocks(source)
    further.validate_for(encodes=is_encoder)
    tensor_names = [tensor.name for tensor in source.tensors]
    guest = stage_guest(guest_wasm, _pack_assets(source), tensor_names, encodes=is_encoder)
    layout = plan_weights([spec for tensor in source.tensors for spec in _specs(tensor, weight_format)])
    rounded: Rounded = {}
    if calibration is not None and weight_format is WeightFormat.INT8 and not isinstance(source, ImportedEncoder):
        rounded = calibrate(source, guest, calibration, on_progress)
    output = BuildOutput(store, keyring, encrypt=encrypt, with_verity=with_verity)
    with output.add_blob() as writer:
        _write_weights(source, writer, layout, weight_format, rounded, on_progress)
    vector_size = source.config.hidden_size if isinstance(source, ImportedEncoder) else 0
    weights = StoredWeights(writer.ref, layout.entries, _make_card(source, weight_format), vector_size)
    manifest = assemble_snapshot(name, weights, guest, output, further=further, priming=priming)
    return BuildReport.of(
        manifest,
        weight_format=weight_format,
        num_parameters=sum(math.prod(tensor.shape) for tensor in source.tensors if tensor.name != ROPE_TENSOR),
        wall_s=time.monotonic() - started_s,
    )


def validate_name(name: str) -> None:
    """Check a snapshot's name before any work is done for it.

    Raises:
        BuildError: not a name.
    """
    if not NAME.fullmatch(name):
        raise BuildError(
            f"snapshot name {name[:140]!r}: expected a letter or digit, then up to 127 of letters, digits and ._-"
        )


def _adapt_to_gpus(weight_format: WeightFormat, priming: Priming | None, *, is_encoder: bool) -> Priming | None:
    """What to prime, by the backend that reads such weights without a GPU.

    Raises:
        BuildError: encoders do not run on GPUs.
    """
    if is_encoder:
        raise BuildError(f"{weight_format.value} weights are for GPUs, and encoders run on the CPU: use int8")
    return priming if priming is None or priming.backend != "numkong" else replace(priming, backend="numpy")


def _pack_assets(source: ModelSource | ImportedEncoder) -> dict[str, bytes]:
    """What the guest reads at init.

    Raises:
        BuildError: the configuration or the tokeniser cannot be packed.
    """
    if isinstance(source, ImportedEncoder):
        return pack_encoder_assets(source)
    try:
        return {CONFIG_ASSET: pack_config(source.config), TOKENIZER_ASSET: pack_tokenizer(source.tokenizer)}
    except GuestError as error:
        raise BuildError(f"the guest refuses this model: {error}") from error


def _specs(tensor: SourceTensor, weight_format: WeightFormat) -> list[TensorSpec]:
    """Stored tensors of one source tensor: itself, and its scales where it is quantised."""
    if not tensor.is_matrix:
        return [TensorSpec(tensor.name, "F32", tensor.shape)]
    if weight_format is WeightFormat.GGUF:
        return [TensorSpec(tensor.name, choose_block_type(tensor) or "BF16", tensor.shape)]
    if weight_format is WeightFormat.INT4:
        rows, width = tensor.shape
        if width % INT4_GROUP == 0 and tensor.name not in _NEVER_INT4:
            scales = TensorSpec(tensor.name + SCALE_SUFFIX, "F16", (rows, width // INT4_GROUP))
            return [TensorSpec(tensor.name, "U8", (rows, width // 2)), scales]
        weight_format = WeightFormat.INT8
    specs = [TensorSpec(tensor.name, DTYPES[weight_format], tensor.shape)]
    if weight_format in (WeightFormat.INT8, WeightFormat.FP8):
        specs.append(TensorSpec(tensor.name + SCALE_SUFFIX, "F32", tensor.shape[:1]))
    return specs


def _write_weights(
    source: ModelSource | ImportedEncoder,
    writer: BlobWriter,
    layout: WeightsLayout,
    weight_format: WeightFormat,
    rounded: Rounded,
    on_progress: OnProgress | None,
) -> None:
    def stored_tensors() -> Iterator[npt.NDArray[Any]]:
        for tensor in source.tensors:
            yield from rounded[tensor.name] if tensor.name in rounded else _convert(tensor, weight_format)
            if on_progress is not None:
                on_progress(writer.size_bytes, layout.size_bytes)

    write_weights(writer, layout, stored_tensors())


def _convert(tensor: SourceTensor, weight_format: WeightFormat) -> list[npt.NDArray[Any]]:
    """The arrays of :func:`_specs`, filled block by block.

    Raises:
        MalformedModelError: a value is not finite.
    """
    specs = _specs(tensor, weight_format)
    types = [array_type(spec.dtype, spec.shape) for spec in specs]
    arrays = [np.empty(shape, dtype) for dtype, shape in types]
    row = 0
    if specs[0].dtype in BLOCK_TYPES:
        for stored in read_block_rows(tensor):
            arrays[0][row : row + len(stored)] = stored
            row += len(stored)
        return arrays
    for block in tensor.row_blocks():
        if not np.isfinite(block).all():
            raise MalformedModelError(f"tensor {tensor.name} holds values that are infinite or not a number")
        rows = slice(row, row + len(block))
        quantise = _QUANTISERS.get(specs[0].dtype)
        if quantise is not None:
            arrays[0][rows], arrays[1][rows] = quantise(block)
        elif specs[0].dtype == "BF16":
            arrays[0][rows] = round_to_bfloat16(block)
        else:
            arrays[0][rows] = block
        row = rows.stop
    return arrays


def _make_card(source: ModelSource | ImportedEncoder, weight_format: WeightFormat) -> SnapshotCard:
    if isinstance(source, ImportedEncoder):
        return make_encoder_card(source, weight_format.value)
    config = source.config
    return SnapshotCard(
        architecture=source.architecture,
        weight_format=weight_format.value,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        max_token_bytes=_longest_token_bytes(source.tokenizer),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        worker_bytes=_estimate_worker_bytes(config),
        eos_token_ids=tuple(source.tokenizer.eos_ids),
        chat_template=source.chat_template,
        bos_token=source.special_texts.bos_token,
        eos_token=source.special_texts.eos_token,
    )


def _longest_token_bytes(tokenizer: TokenizerSpec) -> int:
    if tokenizer.kind is TokenizerKind.SENTENCEPIECE_BPE:
        return max(len(token.replace(SPACE_MARK, b" ")) for token in tokenizer.tokens)
    return max(len(token) for token in tokenizer.tokens)


def _estimate_worker_bytes(config: LlamaConfig) -> int:
    """Private memory of a worker under moderate load: KV cache of a few sequences, and what every worker takes."""
    tokens = ESTIMATED_SEQUENCES * min(config.context_length, ESTIMATED_SEQUENCE_TOKENS)
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * KV_ITEM_BYTES
    return WORKER_BASE_BYTES + tokens * token_bytes
