"""Restore: from a verified manifest and sealed memory to a model that can serve, in milliseconds.

In two parts. :func:`prepare_model` does all that is the same for every worker: the zygote does it once for each
snapshot, and its workers inherit the result. :meth:`PreparedModel.resume` instantiates the guest with a seed of its
own, in the worker.

Nothing is read or copied here. Weights become views of the sealed file, the guest is mapped copy-on-write out of its
own sealed file with its init already done, and the programs are decoded. What is verified where: the agent verified
manifest and blobs; this module checks that the memory it was handed is sealed and of the stated size, and that the
compiled guest was made for this environment, before any of it is used.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from guests.compile import guest_identity
from guests.runtime import GuestEngine, GuestModule
from guests.text import GuestText
from snapshots.filling import map_verified
from snapshots.manifest import GUEST_TENSORS, POST_PROCESSOR, PRIMED_PREFIXES, Manifest, TensorEntry, verify_identity
from snapshots.mapping import MappedBytes, map_sealed
from worker.backends.encoder_protocol import EncoderPlan
from worker.backends.protocol import ModelPlan
from worker.engine.post_processing import PostProcessedText
from worker.engine.text import TextModel
from worker.loaded_model import LoadedEncoder, LoadedModel
from worker.mapped_prefixes import MappedPrefixes
from worker.model_plan import decode_programs, make_plan, order_of_use, resolve_handles, view_tensors
from worker.spawn_order import SpawnedFds

if TYPE_CHECKING:
    from worker.post_processor import PreparedPostProcessor


class PreparedModel:
    """A model without its guest's state: weights mapped and viewed, programs decoded, the guest's code loaded.

    May be forked: it has no thread and no state of its own. Closed by its owner, or by the model it resumed to.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: ModelPlan | EncoderPlan,
        module: GuestModule,
        weights: MappedBytes,
        use_order: tuple[TensorEntry, ...],
        primed: MappedPrefixes,
        guest_tensors: MappedBytes | None = None,
        post_processor: PreparedPostProcessor | None = None,
    ) -> None:
        """Takes over all that can be closed; made by :func:`prepare_model`."""
        self.name = manifest.name
        self.snapshot_id = manifest.snapshot_id
        self.plan: ModelPlan | EncoderPlan | None = plan  # None: closed
        self._eos_token_ids = manifest.card.eos_token_ids
        self._module = module
        self.weights = weights
        self.use_order = use_order
        self._primed = primed
        self._guest_tensors = guest_tensors
        self._post_processor = post_processor

    def set_inherited(self, inherited: bool) -> None:
        """Whether children forked from now on have its memory mapped; see :meth:`MappedBytes.set_inherited`.

        Raises:
            MappingError: the kernel refused.
        """
        self.weights.set_inherited(inherited)
        self._primed.set_inherited(inherited)
        if self._guest_tensors is not None:
            self._guest_tensors.set_inherited(inherited)

    def resume(self, seed: int) -> RestoredModel:
        """The model with a guest of its own; ``seed`` goes to its ``gp_resume``. Call once; this object belongs to the
        result then.

        Raises:
            GuestError: the guest cannot be resumed; this object stays the caller's.
            RuntimeError: closed.
        """
        if self.plan is None:
            raise RuntimeError("this prepared model is closed")
        text = GuestText(self._module, seed)
        if isinstance(self.plan, EncoderPlan):
            return RestoredModel(LoadedEncoder(self.name, self.snapshot_id, self.plan, text), text, self)
        index = self._primed.index
        shown: TextModel = text
        if self._post_processor is not None:
            try:
                shown = PostProcessedText(text, self._post_processor.resume(seed))
            except BaseException:
                text.close()
                raise
        open_text = partial(GuestText, self._module, seed)
        loaded = LoadedModel(self.name, self.snapshot_id, self.plan, shown, self._eos_token_ids, index, open_text)
        return RestoredModel(loaded, text, self)

    def close(self) -> None:
        """Free the guest's code and unmap the weights. Idempotent.

        Requires: no array of the plan is referenced elsewhere.

        Raises:
            MappingError: a weight is still referenced; the guest is freed, the weights stay mapped.
        """
        self.plan = None
        self._module.close()
        if self._post_processor is not None:
            self._post_processor.close()
        self._primed.close()
        if self._guest_tensors is not None:
            self._guest_tensors.close()
        self.weights.close()


class RestoredModel:
    """A restored model and what must be freed behind it. Owned by the worker's slot loop."""

    def __init__(self, loaded: LoadedModel | LoadedEncoder, text: GuestText, prepared: PreparedModel) -> None:
        """Takes over ``text`` and ``prepared``; made by :meth:`PreparedModel.resume`."""
        self._loaded: LoadedModel | LoadedEncoder | None = loaded
        self._text = text
        self._prepared = prepared

    @property
    def model(self) -> LoadedModel | LoadedEncoder:
        """The model. Its arrays are views into the mapping that :meth:`close` unmaps.

        Raises:
            RuntimeError: closed.
        """
        if self._loaded is None:
            raise RuntimeError("this restored model is closed")
        return self._loaded

    @property
    def loaded(self) -> LoadedModel:
        """:attr:`model`, of one that generates.

        Raises:
            RuntimeError: closed, or an encoder.
        """
        model = self.model
        if isinstance(model, LoadedEncoder):
            raise RuntimeError("this restored model is an encoder")
        return model

    @property
    def encoder(self) -> LoadedEncoder:
        """:attr:`model`, of an encoder.

        Raises:
            RuntimeError: closed, or a model that generates.
        """
        model = self.model
        if not isinstance(model, LoadedEncoder):
            raise RuntimeError("this restored model is no encoder")
        return model

    def populate(self, stop: threading.Event | None = None) -> None:
        """Enter the weights' pages in this process's page table, in order of use, so that no step faults.

        Run it on its own thread, beside the first prefill; it releases the GIL. ``stop`` ends it early, which
        :meth:`close` needs the caller to have done (join the thread first).
        """
        for entry in self._prepared.use_order:
            if stop is not None and stop.is_set():
                return
            self._prepared.weights.wait_verified(entry.offset + entry.size_bytes)
            self._prepared.weights.populate(entry.offset, entry.size_bytes)

    def close(self) -> None:
        """Free the guest and unmap the weights. Idempotent.

        Requires: the bound model is closed and no array of :attr:`loaded` is referenced elsewhere.

        Raises:
            MappingError: a weight is still referenced; the guest is freed, the weights stay mapped.
        """
        self._loaded = None
        self._text.close()
        self._prepared.close()

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
    manifest: Manifest, weights_fd: int, guest_fd: int, guest_engine: GuestEngine, seed: int, *further_fds: int
) -> RestoredModel:
    """The model of ``manifest``, out of sealed memory: :func:`prepare_model` and :meth:`PreparedModel.resume` in one.

    ``further_fds``: as :class:`SpawnedFds` has them.

    Raises:
        GuestError: the guest cannot be loaded or resumed.
        Exception: as :func:`prepare_model`. Nothing stays mapped.
    """
    prepared = prepare_model(manifest, SpawnedFds(weights_fd, guest_fd, *further_fds), guest_engine)
    try:
        return prepared.resume(seed)
    except BaseException:
        prepared.close()
        raise


def prepare_model(
    manifest: Manifest, fds: SpawnedFds, guest_engine: GuestEngine, *, may_be_filling: bool = False
) -> PreparedModel:
    """The model of ``manifest``, out of sealed memory, before its guest has a state.

    Requires: ``manifest`` was verified; the descriptors hold its blobs, verified. They stay the
    caller's and may be closed afterwards. Starts no thread. On failure nothing stays mapped. ``may_be_filling``: the
    weights may be such that are still being verified; the plan's tensors then say when they can be read.

    Raises:
        Incompatible: the compiled guest was made for another environment; the message says how to rebuild.
        MappingError: a descriptor is not sealed, or not of the manifest's size.
        ManifestMalformed: the manifest's tensors contradict each other.
        ProgramError: a program does not decode.
        GuestError: the guest cannot be loaded.
    """
    verify_identity(manifest, guest_identity())
    programs = decode_programs(manifest)
    stored = resolve_handles(manifest)
    with ExitStack() as undo:
        map_weights = map_verified if may_be_filling else map_sealed
        weights = map_weights(fds.weights_fd, manifest.weights.size_bytes)
        undo.callback(weights.close)
        primed = MappedPrefixes(manifest, fds.find(PRIMED_PREFIXES, manifest.worker_roles))
        undo.callback(primed.close)
        made = _map_guest_tensors(manifest, fds)
        if made is not None:
            undo.callback(made.close)
        module = _load_guest(manifest, fds.guest_fd, guest_engine)
        post_processor = _load_post_processor(manifest, fds)
        undo.pop_all()
    # Views come last: one that lived in an exception's frames would keep the mapping from being closed.
    plan = make_plan(manifest, programs, view_tensors(manifest, stored, weights, made), weights)
    return PreparedModel(
        manifest, plan, module, weights, order_of_use(manifest, programs[0]), primed, made, post_processor
    )


def _load_post_processor(manifest: Manifest, fds: SpawnedFds) -> PreparedPostProcessor | None:
    if POST_PROCESSOR not in manifest.blobs:
        return None
    from worker.post_processor import PreparedPostProcessor  # 50 ms, which only such models take

    return PreparedPostProcessor(manifest, fds)


def _map_guest_tensors(manifest: Manifest, fds: SpawnedFds) -> MappedBytes | None:
    """What the guest made at init; None: nothing.

    Raises:
        MappingError: it did, and there is no sealed memory of that size.
    """
    ref = manifest.blobs.get(GUEST_TENSORS)
    return None if ref is None else map_sealed(fds.find(GUEST_TENSORS, manifest.worker_roles), ref.size_bytes)


def _load_guest(manifest: Manifest, guest_fd: int, guest_engine: GuestEngine) -> GuestModule:
    """Deserialise native code, which nothing checks any more: so only out of memory that cannot change."""
    with map_sealed(guest_fd, manifest.guest_cwasm.size_bytes):  # checks seals and size
        return guest_engine.load(f"/proc/self/fd/{guest_fd}")
