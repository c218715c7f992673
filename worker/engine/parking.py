"""Parks an idle model (T4 to T3) and brings it back before the next step. Only where the backend can."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import structlog

from worker.backends.protocol import BoundModel
from worker.engine.mailbox import Mail, Mailbox


@runtime_checkable
class Parkable(Protocol):
    """A bound model that can leave its device and come back."""

    def park(self, *, keeps_kv: bool = False) -> None:
        """Return the weights' device memory; the host's copy stays."""

    def unpark(self) -> None:
        """Begin to bring them back; steps wait for what they need of them."""


class IdleParking:
    """Waits for mail on behalf of an engine and parks its model meanwhile. Engine thread only.

    KV blocks stay on the device: their prefixes are the next request's, and they are counted in the model's budget.
    """

    def __init__(self, bound: BoundModel, park_after_s: float, on_parked: Callable[[bool], None]) -> None:
        """``park_after_s`` 0: never. ``on_parked`` hears, on this thread, of each parking (True) and return (False)."""
        self._model = bound if isinstance(bound, Parkable) and park_after_s > 0 else None
        self._park_after_s = park_after_s
        self._on_parked = on_parked
        self._is_parked = False

    def wait_collect(self, mailbox: Mailbox) -> Mail:
        """As :meth:`Mailbox.wait_collect`. A model that was parked is on its way back when this returns requests.

        Raises:
            BackendError: it cannot come back: somebody else has the memory.
        """
        if self._model is not None and not self._is_parked:
            begin_s = time.monotonic()
            mail = mailbox.wait_collect(self._park_after_s)
            if not mail.is_empty or time.monotonic() - begin_s < self._park_after_s:
                return mail
            self._park(self._model)
        mail = mailbox.wait_collect()
        if self._model is not None and self._is_parked and mail.requests:
            self._model.unpark()
            self._is_parked = False
            self._on_parked(False)
        return mail

    def _park(self, model: Parkable) -> None:
        begin_s = time.monotonic()
        model.park(keeps_kv=True)
        self._is_parked = True
        structlog.get_logger().info("model_parked", elapsed_ms=round((time.monotonic() - begin_s) * 1000, 2))
        self._on_parked(True)
