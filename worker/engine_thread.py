"""The engine thread of a worker: warms the device, restores the model, then runs the engine until it is stopped.

Nothing is freed at its end: the process exits right after, and the kernel returns maps and memory faster than we would.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import Final, Protocol

import structlog

from guests.errors import GuestError, GuestIncompatible
from guests.runtime import GuestEngine
from scheduler.contract import codec
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.states import ParkPolicy, Tier
from scheduler.contract.telemetry import Mark
from snapshots.errors import Incompatible, SnapshotError
from snapshots.manifest import Manifest
from worker.backends.choice import make_backend
from worker.backends.encoder_protocol import BoundEncoder
from worker.backends.protocol import Backend, BackendError, BackendFull, BoundModel
from worker.device_release import connect_release
from worker.engine.parking import IdleParking
from worker.engine.step_loop import StepLoop, bind_plan, make_step_loop
from worker.engine.types import RequestStep
from worker.kernel_images import read_kernels
from worker.prepared_models import InheritedModel
from worker.restore import PreparedModel, RestoredModel, prepare_model
from worker.spawn_order import SpawnedFds, SpawnOrder

#: Wasmtime wants 512 KiB of C stack for the guest and as much again for the host below it.
STACK_BYTES: Final = 16 * 1024 * 1024
NAP_S: Final = 50e-6
#: A pool has started long before; a GPU takes longer, and gains nothing by it.
MAX_NAPS_S: Final = 0.03


class EngineListener(Protocol):
    """Hears of the engine thread, *on* that thread."""

    def on_ready(self, engine: StepLoop) -> None:
        """The model is restored and bound; the engine is about to run."""

    def on_ended(self, error: Exception | None) -> None:
        """The thread is about to end; None: it was stopped."""

    def on_steps(self, steps: list[RequestStep]) -> None:
        """See :class:`worker.engine.engine.Engine`."""

    def on_moved(self, tier: Tier) -> None:
        """The model has left the device (PARKED, RELEASED), or is on its way back (HOT)."""


class EngineThread:
    """Started before anything else of a worker, the event loop included; :meth:`attach` gives it its listener.

    It adds DEVICE_READY, MAPPED and RESTORED to ``marks`` before ``on_ready``; nobody else writes there meanwhile.
    """

    def __init__(
        self,
        order: SpawnOrder,
        fds: SpawnedFds,
        guest_engine: GuestEngine,
        marks: dict[str, int],
        inherited: InheritedModel | None = None,
        warm: Backend | None = None,
    ) -> None:
        """``inherited`` is what the zygote prepared of the order's model, if it did; ``warm`` the backend of a spare
        that has become this worker."""
        self.marks = marks
        self._inherited = inherited
        self._warm = warm
        self._order = order
        self._fds = fds
        self._guest_engine = guest_engine
        self._listener: EngineListener | None = None
        self._attached = threading.Event()
        self._is_warm = threading.Event()
        self._is_restored = threading.Event()
        self._engine: StepLoop | None = None
        self._parking: IdleParking | None = None
        self._restored: RestoredModel | None = None  # keeps the mapping alive as long as the process
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to restore."""
        threading.stack_size(STACK_BYTES)
        self._thread.start()

    def wait_restored(self, timeout_s: float) -> None:
        """Wait until the model is restored, or has failed to be; at most ``timeout_s``. Any thread but this one.

        First in naps: the kernel puts the first thread of a new pool of products on the core where this one spins for
        it, and finds out with its next tick (4 ms) or when a thread goes to sleep on another core.
        """
        naps_end_s = time.monotonic() + min(timeout_s, MAX_NAPS_S)
        while not self._is_warm.wait(NAP_S) and time.monotonic() < naps_end_s:
            pass
        self._is_restored.wait(timeout_s)

    def attach(self, listener: EngineListener) -> None:
        """Give the thread its listener; until then it restores in silence. Call once."""
        self._listener = listener
        self._attached.set()

    def stop(self) -> None:
        """Make the engine stop after its present step; a restore under way goes on, to nobody's use. Any thread."""
        if self._engine is not None:
            self._engine.stop()

    def park(self, is_parked: bool) -> None:
        """Park the model once nothing runs, or bring it back; without effect where it cannot. Any thread."""
        if self._parking is not None:
            self._parking.ask(is_parked)

    def _main(self) -> None:
        error: Exception | None = None
        try:
            engine = self._engine = self._restore()
            self._is_restored.set()
            self._wait_listener().on_ready(engine)
            engine.run()
        except Exception as failure:  # whatever it is, the slot must hear of it: a silent thread would hang the worker
            error = failure
            self._is_warm.set()
            self._is_restored.set()
        self._wait_listener().on_ended(error)

    def _wait_listener(self) -> EngineListener:
        self._attached.wait()
        if self._listener is None:
            raise RuntimeError("attached without a listener")
        return self._listener

    def _on_steps(self, steps: list[RequestStep]) -> None:
        self._wait_listener().on_steps(steps)

    def _on_moved(self, tier: Tier) -> None:
        self._wait_listener().on_moved(tier)

    def _restore(self) -> StepLoop:
        order = self._order
        model, bound = self._warm_and_map()
        self._guest_engine.start_ticker()  # first: without it no deadline holds, and resuming calls the guest
        restored = self._restored = model.resume(secrets.randbits(63))
        release = connect_release(order.release_address) if order.park is ParkPolicy.RELEASE else None
        self._parking = IdleParking(bound, order.park_after_s, self._on_moved, order.park, release)
        engine = make_step_loop(
            restored.model,
            bound,
            max_running=order.max_running,
            kv_budget_bytes=order.kv_budget_bytes,
            max_draft_tokens=order.draft_tokens,
            on_steps=self._on_steps,
            parking=self._parking,
        )
        self.marks[Mark.RESTORED] = time.monotonic_ns()
        threading.Thread(target=_populate, args=(restored,), name="populate", daemon=True).start()
        return engine

    def _warm_and_map(self) -> tuple[PreparedModel, BoundModel | BoundEncoder]:
        """The device ready, the model mapped and bound: taken over from the zygote, or done here."""
        order, fds, inherited = self._order, self._fds, self._inherited
        backend = self._warm if inherited is None else inherited.backend
        backend = backend or make_backend(order.backend, order.num_threads, self._read_kernels)
        backend.warm()
        self._is_warm.set()
        self.marks[Mark.DEVICE_READY] = time.monotonic_ns()
        if inherited is not None:
            model, bound = inherited.model, inherited.bound
        else:
            manifest: Manifest = codec.decode(order.manifest, Manifest)
            model = prepare_model(manifest, fds, self._guest_engine, may_be_filling=True)
            if not backend.waits_for_weights:
                model.weights.wait_verified(model.weights.size_bytes)
            if model.plan is None:
                raise RuntimeError("a model that was just prepared is closed")
            bound = bind_plan(backend, model.plan)
        self.marks[Mark.MAPPED] = time.monotonic_ns()
        return model, bound

    def _read_kernels(self, architectures: tuple[str, ...]) -> dict[str, bytes]:
        """Device code that the snapshot brings along; asked for by a device that what ships has none for."""
        return read_kernels(codec.decode(self._order.manifest, Manifest), self._fds, architectures)


def describe_failure(model: str, error: Exception) -> ErrorInfo:
    """What requests are told when their worker could not start."""
    match error:
        case Incompatible() | GuestIncompatible():
            code = ErrorCode.SNAPSHOT_INCOMPATIBLE
        case SnapshotError():
            code = ErrorCode.SNAPSHOT_CORRUPT
        case GuestError():
            code = ErrorCode.GUEST_FAILED
        case BackendFull():
            code = ErrorCode.OUT_OF_MEMORY
        case BackendError():
            code = ErrorCode.BACKEND_UNAVAILABLE
        case MemoryError():
            code = ErrorCode.OUT_OF_MEMORY
        case _:
            code = ErrorCode.WAKE_FAILED
    return ErrorInfo(code, f"model {model!r} could not be woken: {error or type(error).__name__}")


def _populate(restored: RestoredModel) -> None:
    try:
        restored.populate()
    except Exception as error:  # only a matter of speed: the pages come one by one then
        structlog.get_logger().warning("populate_failed", error=str(error))
