"""Parks an idle model (T4 to T3) and brings it back before the next step. Only where the backend can."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

import structlog

from worker.backends.encoder_protocol import BoundEncoder
from worker.backends.protocol import BackendFull, BoundModel
from worker.engine.mailbox import Mail, Mailbox

#: How long a parked model waits for room on its device, which others are asked to make, before its worker gives up.
RETURN_LIMIT_S: Final = 20.0
RETRY_S: Final = 0.05

_log = structlog.get_logger()


@runtime_checkable
class Parkable(Protocol):
    """A bound model that can leave its device and come back."""

    def park(self, *, keeps_kv: bool = False) -> None:
        """Return the weights' device memory; the host's copy stays."""

    def unpark(self) -> None:
        """Begin to bring them back; steps wait for what they need of them."""


class IdleParking:
    """Waits for mail on behalf of an engine and parks its model meanwhile. Engine thread only, but for :meth:`ask`.

    KV blocks stay on the device: their prefixes are the next request's, and they are counted in the model's budget.
    """

    def __init__(
        self,
        bound: BoundModel | BoundEncoder,
        park_after_s: float = 0.0,
        on_parked: Callable[[bool], None] = lambda _is_parked: None,
    ) -> None:
        """``park_after_s`` 0: only when asked. ``on_parked`` hears, on this thread, of each parking (True) and return
        (False)."""
        self._model = bound if isinstance(bound, Parkable) else None
        self._park_after_s = park_after_s
        self._on_parked = on_parked
        self._is_parked = False
        self._wish: bool | None = None  # set by `ask`, taken by the engine's thread
        self._mailbox: Mailbox | None = None

    def ask(self, is_parked: bool) -> None:
        """Park as soon as nothing runs, or come back. Any thread; without effect on a model that cannot park."""
        self._wish = is_parked
        if self._mailbox is not None:
            self._mailbox.wake()

    def wait_collect(self, mailbox: Mailbox) -> Mail:
        """As :meth:`Mailbox.wait_collect`. A model that was parked is on its way back when this returns requests.

        Raises:
            BackendFull: it cannot come back: somebody else has the memory, and kept it for :data:`RETURN_LIMIT_S`.
            BackendLost: the device failed.
        """
        model, self._mailbox = self._model, mailbox
        if model is None:
            return mailbox.wait_collect()
        if not self._is_parked:
            if self._wish is not True:
                begin_s = time.monotonic()
                mail = mailbox.wait_collect(self._park_after_s or None)
                is_idle = self._park_after_s > 0 and time.monotonic() - begin_s >= self._park_after_s
                if not mail.is_empty or not (is_idle or self._wish):
                    return mail
            self._park(model)
        mail = mailbox.wait_collect()
        wish, self._wish = self._wish, None
        if mail.requests or wish is False:
            self._return(model, mailbox, mail)
        return mail

    def _park(self, model: Parkable) -> None:
        begin_s = time.monotonic()
        self._wish = None
        model.park(keeps_kv=True)
        self._is_parked = True
        _log.info("model_parked", elapsed_ms=round((time.monotonic() - begin_s) * 1000, 2))
        self._on_parked(True)

    def _return(self, model: Parkable, mailbox: Mailbox, mail: Mail) -> None:
        """Bring ``model`` back, waiting for room where there is none. What arrives meanwhile is added to ``mail``.
        A stop ends the wait; so does the limit where no request needs it."""
        begin_s = time.monotonic()
        while not mail.stop:
            try:
                model.unpark()
            except BackendFull:
                if time.monotonic() - begin_s > RETURN_LIMIT_S:
                    if mail.requests:
                        raise
                    _log.warning("model_stays_parked", waited_s=RETURN_LIMIT_S)
                    return
                mail.add(mailbox.wait_collect(RETRY_S))
                continue
            self._is_parked = False
            _log.info("model_returned", elapsed_ms=round((time.monotonic() - begin_s) * 1000, 2))
            self._on_parked(False)
            return
