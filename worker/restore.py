"""Restore: from a verified manifest and sealed memory to a model that can serve, in milliseconds.

Nothing is read or copied here. Weights become views of the sealed file, the guest is mapped copy-on-write out of its
own sealed file with its init already done, and the programs are decoded. What is verified where: the agent verified
manifest and blobs; this module checks that the memory it was handed is sealed and of the stated size, and that the
compiled guest was made for this environment, before any of it is used.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from guests.abi import NO_TENSOR, Opcode, ProgramKind
from guests.compile import guest_identity
from guests.program import Program, decode_program
from guests.runtime import GuestEngine, GuestModule
from guests.text import GuestText
from snapshots.dtypes import NUMPY_DTYPES
from snapshots.errors import ManifestMalformed
from snapshots.manifest import Manifest, TensorEntry, verify_identity
from snapshots.mapping import MappedBytes, map_sealed
from worker.backends.protocol import ModelPlan, WeightTensor
from worker.loaded_model import LoadedModel
from worker.tensor_names import SCALE_SUFFIX


class RestoredModel:
    """A restored model and what must be freed behind it. Owned by the worker's slot loop."""

    def __init__(
        self,
        loaded: LoadedModel,
        text: GuestText,
        module: GuestModule,
        weights: MappedBytes,
        use_order: tuple[TensorEntry, ...],
    ) -> None:
        """Takes over ``text``, ``module`` and ``weights``; made by :func:`restore_model`."""
        self._loaded: LoadedModel | None = loaded
        self._text = text
        self._module = module
        self._weights = weights
        self._use_order = use_order

    @property
    def loaded(self) -> LoadedModel:
        """The model. Its arrays are views into the mapping that :meth:`close` unmaps.

        Raises:
            RuntimeError: closed.
        """
        if self._loaded is None:
            raise RuntimeError("this restored model is closed")
        return self._loaded

    def populate(self, stop: threading.Event | None = None) -> None:
        """Enter the weights' pages in this process's page table, in order of use, so that no step faults.

        Run it on its own thread, beside the first prefill; it releases the GIL. ``stop`` ends it early, which
        :meth:`close` needs the caller to have done (join the thread first).
        """
        for entry in self._use_order:
            if stop is not None and stop.is_set():
                return
            self._weights.populate(entry.offset, entry.size_bytes)

    def close(self) -> None:
        """Free the guest and unmap the weights. Idempotent.

        Requires: the bound model is closed and no array of :attr:`loaded` is referenced elsewhere.

        Raises:
            MappingError: a weight is still referenced; the guest is freed, the weights stay mapped.
        """
        self._loaded = None
        self._text.close()
        self._module.close()
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prepare_restore() -> None:
    """Do once, before workers are forked, what each restore would otherwise do first: look up this environment."""
    guest_identity()


def restore_model(
    manifest: Manifest, weights_fd: int, guest_fd: int, guest_engine: GuestEngine, seed: int
) -> RestoredModel:
    """The model of ``manifest``, out of sealed memory.

    Requires: ``manifest`` was verified; the descriptors hold its weights and compiled guest, verified. They stay the
    caller's and may be closed afterwards. ``seed`` goes to the guest's ``gp_resume``. On failure nothing stays mapped.

    Raises:
        Incompatible: the compiled guest was made for another environment; the message says how to rebuild.
        MappingError: a descriptor is not sealed, or not of the manifest's size.
        ManifestMalformed: the manifest's tensors contradict each other.
        ProgramError: a program does not decode.
        GuestError: the guest cannot be loaded or resumed.
    """
    verify_identity(manifest, guest_identity())
    prefill, decode = _decode_programs(manifest)
    stored = _resolve_handles(manifest)
    with ExitStack() as undo:
        weights = map_sealed(weights_fd, manifest.weights.size_bytes)
        undo.callback(weights.close)
        module = _load_guest(manifest, guest_fd, guest_engine)
        undo.callback(module.close)
        text = GuestText(module, seed)
        undo.pop_all()
    # Views come last: one that lived in an exception's frames would keep the mapping from being closed.
    tensors = _view_tensors(stored, weights)
    card = manifest.card
    plan = ModelPlan(
        prefill,
        decode,
        tensors,
        num_layers=card.num_layers,
        num_kv_heads=card.num_kv_heads,
        head_dim=card.head_dim,
        vocab_size=card.vocab_size,
        context_length=card.context_length,
    )
    loaded = LoadedModel(manifest.name, manifest.snapshot_id, plan, text, card.eos_token_ids)
    return RestoredModel(loaded, text, module, weights, _order_of_use(manifest, prefill))


def _load_guest(manifest: Manifest, guest_fd: int, guest_engine: GuestEngine) -> GuestModule:
    """Deserialise native code, which nothing checks any more: so only out of memory that cannot change."""
    with map_sealed(guest_fd, manifest.guest_cwasm.size_bytes):  # checks seals and size
        return guest_engine.load(f"/proc/self/fd/{guest_fd}")


def _decode_programs(manifest: Manifest) -> tuple[Program, Program]:
    num_tensors = len(manifest.tensor_handles)
    prefill = decode_program(manifest.programs.prefill, num_tensors=num_tensors)
    decode = decode_program(manifest.programs.decode, num_tensors=num_tensors)
    for program, kind in ((prefill, ProgramKind.PREFILL), (decode, ProgramKind.DECODE)):
        if program.kind is not kind:
            raise ManifestMalformed(f"the {kind.name.lower()} program of the manifest is a {program.kind.name} program")
    return prefill, decode


def _resolve_handles(manifest: Manifest) -> list[tuple[TensorEntry, TensorEntry | None]]:
    """The stored tensor behind each handle, with the entry of its scales where it is int8.

    Raises:
        ManifestMalformed: int8 without scales that fit.
    """
    entries = {entry.name: entry for entry in manifest.tensors}
    resolved = []
    for name in manifest.tensor_handles:
        entry = entries[name]  # the manifest was validated: every handle names a tensor
        scale = entries.get(name + SCALE_SUFFIX) if entry.dtype == "I8" else None
        if entry.dtype == "I8" and (scale is None or scale.dtype != "F32" or scale.shape != entry.shape[:1]):
            raise ManifestMalformed(f"tensor {name!r} is int8 and has no float32 scales of shape {entry.shape[:1]}")
        resolved.append((entry, scale))
    return resolved


def _view_tensors(
    stored: list[tuple[TensorEntry, TensorEntry | None]], weights: MappedBytes
) -> tuple[WeightTensor, ...]:
    """One weight for each handle: views, with the scales beside int8 matrices."""
    mapped = weights.array(np.uint8, (weights.size_bytes,))
    return tuple(
        WeightTensor(entry.name, _view(entry, mapped), None if scale is None else _view(scale, mapped))
        for entry, scale in stored
    )


def _view(entry: TensorEntry, mapped: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """A read-only view, 1 us: one call, in which NumPy checks the bounds. Alignment was checked with the manifest."""
    return np.ndarray(entry.shape, NUMPY_DTYPES[entry.dtype], buffer=mapped, offset=entry.offset)


def _order_of_use(manifest: Manifest, prefill: Program) -> tuple[TensorEntry, ...]:
    """Tensors as a prefill reads them. Embedding tables come last: a lookup reads a few of their rows."""
    entries = {entry.name: entry for entry in manifest.tensors}
    ordered: dict[str, None] = {}
    tables: dict[str, None] = {}
    for operation in prefill.operations:
        place = tables if operation.opcode is Opcode.EMBED else ordered
        for handle in operation.tensors:
            if handle != NO_TENSOR:
                place[manifest.tensor_handles[handle]] = None
    names = [name for name in ordered if name not in tables] + list(tables)
    with_scales = (candidate for name in names for candidate in (name, name + SCALE_SUFFIX))
    return tuple(entries[name] for name in with_scales if name in entries)
