"""From a verified manifest to what a backend binds: programs decoded, weights viewed where they are mapped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from guests.abi import NO_TENSOR, Opcode, ProgramKind
from guests.program import Program, decode_program
from snapshots.block_types import BLOCK_TYPES
from snapshots.dtypes import array_type
from snapshots.errors import ManifestMalformed
from snapshots.manifest import Manifest, TensorEntry
from snapshots.mapping import MappedBytes
from worker.backends.encoder_protocol import EncoderPlan
from worker.backends.protocol import ModelPlan, WeightBlob, WeightTensor
from worker.tensor_names import SCALE_SUFFIX

#: Types that need scales, as messages call them.
_QUANTISED: Final = {"I8": "int8", "F8_E4M3": "fp8", "U8": "int4"}
#: The kernels take so many neighbouring weights at a time.
INT4_GROUP_MULTIPLE: Final = 32


def make_plan(
    manifest: Manifest, programs: tuple[Program, ...], tensors: tuple[WeightTensor, ...], weights: MappedBytes
) -> ModelPlan | EncoderPlan:
    """What a backend binds."""
    card = manifest.card
    if programs[0].kind is ProgramKind.ENCODE:
        return EncoderPlan(
            programs[0],
            tensors,
            vocab_size=card.vocab_size,
            context_length=card.context_length,
            vector_size=manifest.vector_size,
        )
    prefill, decode = programs
    return ModelPlan(
        prefill,
        decode,
        tensors,
        num_layers=card.num_layers,
        num_kv_heads=card.num_kv_heads,
        head_dim=card.head_dim,
        vocab_size=card.vocab_size,
        context_length=card.context_length,
        blob=WeightBlob(
            weights.array(np.uint8, (weights.size_bytes,)),
            manifest.weights.chunk_bytes,
            manifest.weights.chunk_digests,
            None if weights.is_whole else weights.wait_verified,
        ),
    )


def decode_programs(manifest: Manifest) -> tuple[Program, ...]:
    """Prefill and decode, or encode alone."""
    recorded = manifest.programs
    stored = {ProgramKind.PREFILL: recorded.prefill, ProgramKind.DECODE: recorded.decode}
    if manifest.vector_size > 0:
        stored = {ProgramKind.ENCODE: recorded.encode}
    programs = []
    for kind, data in stored.items():
        program = decode_program(data, num_tensors=len(manifest.tensor_handles))
        if program.kind is not kind:
            name = kind.name.lower()
            raise ManifestMalformed(f"the {name} program of the manifest is a {program.kind.name} program")
        programs.append(program)
    return tuple(programs)


def resolve_handles(manifest: Manifest) -> list[tuple[TensorEntry, TensorEntry | None]]:
    """The stored tensor behind each handle, with the entry of its scales where it is quantised.

    Raises:
        ManifestMalformed: quantised without scales that fit.
    """
    entries = {entry.name: entry for entry in (*manifest.tensors, *manifest.guest_tensors)}
    resolved = []
    for name in manifest.tensor_handles:
        entry = entries[name]  # the manifest was validated: every handle names a tensor
        scale = entries.get(name + SCALE_SUFFIX) if entry.dtype in _QUANTISED else None
        if entry.dtype in _QUANTISED:
            _require_scales(entry, scale)
        resolved.append((entry, scale))
    return resolved


def _require_scales(entry: TensorEntry, scale: TensorEntry | None) -> None:
    """
    Raises:
        ManifestMalformed: they are not there, or of another type or shape than the weights need.
    """
    if entry.dtype != "U8":
        if scale is None or scale.dtype != "F32" or scale.shape != entry.shape[:1]:
            raise ManifestMalformed(
                f"tensor {entry.name!r} is {_QUANTISED[entry.dtype]} and has no float32 scales "
                f"of shape {entry.shape[:1]}"
            )
        return
    width = 2 * entry.shape[-1]
    if (
        len(entry.shape) != 2
        or scale is None
        or scale.dtype != "F16"
        or len(scale.shape) != 2
        or scale.shape[0] != entry.shape[0]
        or width % scale.shape[1]
        or width // scale.shape[1] % INT4_GROUP_MULTIPLE
    ):
        raise ManifestMalformed(
            f"tensor {entry.name!r} is int4 and has no float16 scales of {entry.shape[0]} rows, one for "
            f"each group of a multiple of {INT4_GROUP_MULTIPLE} of {width} weights"
        )


def view_tensors(
    manifest: Manifest,
    stored: list[tuple[TensorEntry, TensorEntry | None]],
    weights: MappedBytes,
    made: MappedBytes | None,
) -> tuple[WeightTensor, ...]:
    """One weight for each handle: views, with the scales beside int8 matrices."""
    mapped = weights.array(np.uint8, (weights.size_bytes,))
    own = mapped if made is None else made.array(np.uint8, (made.size_bytes,))
    made_names = {entry.name for entry in manifest.guest_tensors}
    # Of the blob that may still be filled in; what the guest made at init is sealed.
    last = None if weights.is_whole else max(entry.offset for entry, _ in stored if entry.name not in made_names)
    return tuple(
        WeightTensor(
            entry.name,
            _view(entry, own if entry.name in made_names else mapped),
            None if scale is None else _view(scale, mapped),
            None
            if last is None or entry.name in made_names
            else _make_wait(weights, entry, scale, entry.offset == last),
            entry.dtype if entry.dtype in BLOCK_TYPES else "",
        )
        for entry, scale in stored
    )


def _make_wait(
    weights: MappedBytes, entry: TensorEntry, scale: TensorEntry | None, is_last: bool
) -> Callable[[], None]:
    """Waits for one tensor; for the last one, until the whole blob is verified, so that no first step ends before."""
    end_bytes = max(part.offset + part.size_bytes for part in (entry, scale) if part is not None)
    return partial(weights.wait_verified, weights.size_bytes if is_last else end_bytes)


def _view(entry: TensorEntry, mapped: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """A read-only view, 1 us: one call, in which NumPy checks the bounds. Alignment was checked with the manifest."""
    dtype, shape = array_type(entry.dtype, entry.shape)
    return np.ndarray(shape, dtype, buffer=mapped, offset=entry.offset)


def order_of_use(manifest: Manifest, first: Program) -> tuple[TensorEntry, ...]:
    """Tensors in the order of ``first``. Embedding tables come last: a lookup reads a few of their rows."""
    entries = {entry.name: entry for entry in manifest.tensors}
    ordered: dict[str, None] = {}
    tables: dict[str, None] = {}
    for operation in first.operations:
        place = tables if operation.opcode in (Opcode.EMBED, Opcode.POSITION_EMBED) else ordered
        for handle in operation.tensors:
            if handle != NO_TENSOR:
                place[manifest.tensor_handles[handle]] = None
    names = [name for name in ordered if name not in tables] + list(tables)
    with_scales = (candidate for name in names for candidate in (name, name + SCALE_SUFFIX))
    return tuple(entries[name] for name in with_scales if name in entries)
