"""The thread that lets call deadlines pass."""

from __future__ import annotations

import threading
from typing import Final

from guests import binding

TICK_MS: Final = 10  # resolution of call deadlines


def deadline_ticks(deadline_ms: int) -> int:
    """Ticks after which a call is interrupted, at least ``deadline_ms`` from now: the first may come at once."""
    return -(-deadline_ms // TICK_MS) + 1


class EpochTicker:
    """Advances the epoch of one engine. No thread survives fork: :meth:`start` it in the process that calls guests."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def start(self, engine: int) -> None:
        """Start the thread for a ``wasm_engine_t``, which must live until :meth:`stop`. Idempotent."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stop = threading.Event()
        self._thread = threading.Thread(target=_tick, args=(engine, self._stop), name="guest-epoch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()


def _tick(engine: int, stop: threading.Event) -> None:
    while not stop.wait(TICK_MS / 1000):
        binding.engine_increment_epoch(engine)
