"""Models that a zygote holds ready: restored and bound once, as far as that is the same for every worker.

A worker forked from it inherits decoded programs, views of mapped weights, the guest's code and prebound steps; what
is left to do is to instantiate the guest and to start threads. Preparing is cut into pieces of some milliseconds,
which the zygote does while no order waits.

A worker takes over what was prepared only if it was prepared from the very same memory files and manifest that its
order names, and for the same backend; in any other case it restores the model itself, as it does after a failure.
Weights of other models are not in its address space.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import structlog

from guests.runtime import GuestEngine
from scheduler.contract import codec
from snapshots.errors import SnapshotError
from snapshots.manifest import Manifest
from worker.backends.choice import make_backend
from worker.backends.encoder_protocol import BoundEncoder
from worker.backends.protocol import Backend, BoundModel
from worker.engine.step_loop import bind_plan
from worker.restore import PreparedModel, prepare_model
from worker.spawn_order import ModelPrepared, PrepareFailed, PrepareModel, SpawnedFds, SpawnOrder

#: The wake that sealed a snapshot has the cores to itself for this long.
PREPARE_DELAY_S: Final = 0.3
#: Step sizes bound ahead, the largest first: it decides how large the buffers are that all share. One token is a
#: decode step; 256 is what the engine prefills at once.
STEP_TOKENS: Final = (256, 1, *range(32, 256, 16))

#: glibc's; another C library has none, and other habits.
_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)


@dataclass(slots=True)
class InheritedModel:
    """What a worker starts with."""

    backend: Backend
    model: PreparedModel
    bound: BoundModel | BoundEncoder


@dataclass(frozen=True, slots=True)
class _Key:
    """What must be equal in order and preparation. Files are known by (device, inode): sealed, so of one content."""

    snapshot_id: str
    manifest: bytes
    backend: str
    num_threads: int
    files: tuple[tuple[int, int], ...]


class _Preparation:
    """One snapshot's. ``steps`` is None when there is nothing left to do."""

    def __init__(self, message: PrepareModel, fds: SpawnedFds, guest_engine: GuestEngine) -> None:
        self.key = _Key(message.snapshot_id, message.manifest, message.backend, message.num_threads, _identify(fds))
        self.due_mono_s = time.monotonic() + PREPARE_DELAY_S
        self.elapsed_s = 0.0
        self.steps: Iterator[None] | None = self._prepare(guest_engine)
        self.result: InheritedModel | None = None  # set by the first steps; usable from then on
        self._model: PreparedModel | None = None
        self._fds: SpawnedFds | None = fds.duplicate()

    def _prepare(self, guest_engine: GuestEngine) -> Iterator[None]:
        key, fds = self.key, self._fds
        assert fds is not None  # closed only after the steps
        manifest: Manifest = codec.decode(key.manifest, Manifest)
        yield
        model = self._model = prepare_model(manifest, fds, guest_engine)
        model.set_inherited(False)
        yield
        backend = make_backend(key.backend, key.num_threads)
        if model.plan is None or not backend.binds_before_fork:
            return
        bound = bind_plan(backend, model.plan)
        self.result = InheritedModel(backend, model, bound)
        for num_tokens in STEP_TOKENS:
            yield
            bound.prepare_step(num_tokens)

    def close(self) -> None:
        """Unmap. Idempotent."""
        self.steps = None
        self.close_files()
        result, self.result = self.result, None
        model, self._model = self._model, None
        if result is not None:
            result.bound.close()
        del result
        if model is not None:
            try:
                model.close()
            except SnapshotError:  # an array in a reference cycle: see the collector's view of it
                gc.unfreeze()
                gc.collect()
                gc.freeze()
                _close_or_keep(model)

    def close_files(self) -> None:
        """The mappings keep the memory."""
        fds, self._fds = self._fds, None
        if fds is not None:
            fds.close()


class PreparedModels:
    """All of a zygote's. Its one thread; in a child only :attr:`selected` is of use."""

    def __init__(self, guest_engine: GuestEngine) -> None:
        self._guest_engine = guest_engine
        self._preparations: dict[str, _Preparation] = {}  # by snapshot id, in order of arrival
        self.selected: InheritedModel | None = None  # what a child forked now takes over

    def begin(self, message: PrepareModel, fds: SpawnedFds) -> None:
        """Note that ``message`` is to be prepared; ``fds`` stay the caller's."""
        self.forget(message.snapshot_id)
        self._preparations[message.snapshot_id] = _Preparation(message, fds, self._guest_engine)

    def forget(self, snapshot_id: str) -> None:
        """Unmap a snapshot; nothing happens if it is not prepared."""
        preparation = self._preparations.pop(snapshot_id, None)
        if preparation is not None:
            preparation.close()
            _return_free_memory()

    def close_files(self) -> None:
        """In a child: let go of the files of preparations under way, so that it neither reads other models' weights nor
        keeps them in memory."""
        for preparation in self._preparations.values():
            preparation.close_files()

    def wait_ms(self) -> int | None:
        """Milliseconds until :meth:`step` has something to do; None: nothing is left."""
        dues = [preparation.due_mono_s for preparation in self._unfinished()]
        return max(0, math.ceil((min(dues) - time.monotonic()) * 1000)) if dues else None

    def step(self) -> ModelPrepared | PrepareFailed | None:
        """Do one piece of what is due; the answer that is to be sent then."""
        preparation = next((p for p in self._unfinished() if p.due_mono_s <= time.monotonic()), None)
        if preparation is None or preparation.steps is None:
            return None
        snapshot_id = preparation.key.snapshot_id
        failure = ""
        begin_s = time.monotonic()
        gc.disable()  # a collection would write to pages that children share
        try:
            next(preparation.steps)
        except StopIteration:
            preparation.steps = None
        except Exception as error:  # whatever it is: workers restore by themselves then, and report it if it persists
            failure = f"{type(error).__name__}: {error}"
        finally:
            gc.freeze()
            gc.enable()
        if failure:  # handled out here: the exception's frames would keep the mapping from being closed
            self.forget(snapshot_id)
            return PrepareFailed(snapshot_id, failure)
        preparation.elapsed_s += time.monotonic() - begin_s
        if preparation.steps is not None:
            return None
        preparation.close_files()
        _return_free_memory()
        return ModelPrepared(snapshot_id, round(preparation.elapsed_s * 1000, 2))

    def before_fork(self, order: SpawnOrder, fds: SpawnedFds) -> None:
        """Choose what a child for ``order`` inherits."""
        preparation = self._preparations.get(order.snapshot_id)
        if preparation is None or preparation.result is None:
            return
        key = _Key(order.snapshot_id, order.manifest, order.backend, order.num_threads, _identify(fds))
        if key == preparation.key:
            self.selected = preparation.result
            self.selected.model.set_inherited(True)

    def after_fork(self) -> None:
        """Undo that, in the parent."""
        selected, self.selected = self.selected, None
        if selected is not None:
            selected.model.set_inherited(False)

    def _unfinished(self) -> list[_Preparation]:
        return [preparation for preparation in self._preparations.values() if preparation.steps is not None]


def _close_or_keep(model: PreparedModel) -> None:
    """What is still in use somewhere stays mapped: a zygote that died of it would take all workers along."""
    try:
        model.close()
    except SnapshotError as error:
        structlog.get_logger().error("prepared_model_stays_mapped", snapshot_id=model.snapshot_id, error=str(error))


def _return_free_memory() -> None:
    """Give pages in the middle of malloc's heap back, 2 ms: else 8 MB more stay with every model that is prepared
    anew, and all of them are in every fork."""
    _malloc_trim(0)


def _identify(fds: SpawnedFds) -> tuple[tuple[int, int], ...]:
    stats = [os.fstat(fd) for fd in fds.all]
    return tuple((status.st_dev, status.st_ino) for status in stats)
