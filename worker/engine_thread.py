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
from scheduler.contract.telemetry import Mark
from snapshots.errors import Incompatible, SnapshotError
from snapshots.manifest import Manifest
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend, BackendError
from worker.engine.engine import Engine
from worker.engine.types import RequestStep
from worker.restore import RestoredModel, restore_model
from worker.spawn_order import SpawnedFds, SpawnOrder

#: Wasmtime wants 512 KiB of C stack for the guest and as much again for the host below it.
STACK_BYTES: Final = 16 * 1024 * 1024


class EngineListener(Protocol):
    """Hears of the engine thread, *on* that thread."""

    def on_ready(self, engine: Engine) -> None:
        """The model is restored and bound; the engine is about to run."""

    def on_ended(self, error: Exception | None) -> None:
        """The thread is about to end; None: it was stopped."""

    def on_steps(self, steps: list[RequestStep]) -> None:
        """See :class:`worker.engine.engine.Engine`."""


class EngineThread:
    """Started before anything else of a worker, the event loop included; :meth:`attach` gives it its listener.

    It adds DEVICE_READY, MAPPED and RESTORED to ``marks`` before ``on_ready``; nobody else writes there meanwhile.
    """

    def __init__(self, order: SpawnOrder, fds: SpawnedFds, guest_engine: GuestEngine, marks: dict[str, int]) -> None:
        self.marks = marks
        self._order = order
        self._fds = fds
        self._guest_engine = guest_engine
        self._listener: EngineListener | None = None
        self._attached = threading.Event()
        self._engine: Engine | None = None
        self._restored: RestoredModel | None = None  # keeps the mapping alive as long as the process
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to restore."""
        threading.stack_size(STACK_BYTES)
        self._thread.start()

    def attach(self, listener: EngineListener) -> None:
        """Give the thread its listener; until then it restores in silence. Call once."""
        self._listener = listener
        self._attached.set()

    def stop(self) -> None:
        """Make the engine stop after its present step; a restore under way goes on, to nobody's use. Any thread."""
        if self._engine is not None:
            self._engine.stop()

    def _main(self) -> None:
        error: Exception | None = None
        try:
            engine = self._engine = self._restore()
            self._wait_listener().on_ready(engine)
            engine.run()
        except Exception as failure:  # whatever it is, the slot must hear of it: a silent thread would hang the worker
            error = failure
        self._wait_listener().on_ended(error)

    def _wait_listener(self) -> EngineListener:
        self._attached.wait()
        if self._listener is None:
            raise RuntimeError("attached without a listener")
        return self._listener

    def _on_steps(self, steps: list[RequestStep]) -> None:
        self._wait_listener().on_steps(steps)

    def _restore(self) -> Engine:
        order = self._order
        backend = make_backend(order.backend, order.num_threads)
        backend.warm()
        self.marks[Mark.DEVICE_READY] = time.monotonic_ns()
        manifest: Manifest = codec.decode(order.manifest, Manifest)
        self._guest_engine.start_ticker()  # first: without it no deadline holds, and restoring calls the guest
        restored = self._restored = restore_model(
            manifest, self._fds.weights_fd, self._fds.guest_fd, self._guest_engine, seed=secrets.randbits(63)
        )
        threading.Thread(target=_populate, args=(restored,), name="populate", daemon=True).start()
        self.marks[Mark.MAPPED] = time.monotonic_ns()
        bound = backend.bind(restored.loaded.plan)
        engine = Engine(
            restored.loaded,
            bound,
            max_running=order.max_running,
            kv_budget_bytes=order.kv_budget_bytes,
            on_steps=self._on_steps,
        )
        self.marks[Mark.RESTORED] = time.monotonic_ns()
        return engine


def make_backend(name: str, num_threads: int) -> Backend:
    """The backend of that name.

    Raises:
        BackendError: unknown name.
    """
    if name == "numpy":
        return NumpyBackend()
    if name == "numkong":
        return NumKongBackend(num_threads)
    raise BackendError(f"backend {name!r} is not known: expected numkong or numpy")


def describe_failure(model: str, error: Exception) -> ErrorInfo:
    """What requests are told when their worker could not start."""
    match error:
        case Incompatible() | GuestIncompatible():
            code = ErrorCode.SNAPSHOT_INCOMPATIBLE
        case SnapshotError():
            code = ErrorCode.SNAPSHOT_CORRUPT
        case GuestError():
            code = ErrorCode.GUEST_FAILED
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
