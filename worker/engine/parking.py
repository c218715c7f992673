"""Parks an idle model and brings it back before the next step. Only where the backend can.

========== ========== =======================================================================================
from       to         when
========== ========== =======================================================================================
hot T4     parked T3  nothing runs: for ``park_after_s``, or when asked; KV blocks are kept or dropped by policy
parked     released   at once, by policy, where the driver takes the whole process off the device (T3r)
released   parked     work comes, or it is asked back: the driver fetches the process
parked     hot        then; weights are streamed from their sealed memory and verified like the first time
========== ========== =======================================================================================

A model is parked before its process is released: so the driver has no weights to store, and those that come back are
the sealed ones. What the driver refuses leaves it parked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from scheduler.contract.states import ParkPolicy, Tier
from worker.backends.encoder_protocol import BoundEncoder
from worker.backends.protocol import BackendError, BackendFull, BackendLost, BoundModel, Parkable
from worker.engine.mailbox import Mail, Mailbox

#: How long a parked model waits for room on its device, which others are asked to make, before its worker gives up.
RETURN_LIMIT_S: Final = 20.0
RETRY_S: Final = 0.05
#: Releases that the driver refused in a row, after which it is not asked again.
MAX_REFUSALS: Final = 3

_log = structlog.get_logger()


class ProcessRelease(Protocol):
    """Takes this process off its device, and brings it back. Blocks; nothing of the device may be used meanwhile."""

    def suspend(self) -> None:
        """Raises BackendError where it is refused, and the device is as it was; BackendLost where it is not."""

    def resume(self) -> None:
        """Raises BackendFull where there is no room now; BackendLost where it cannot come back."""


class IdleParking:
    """Waits for mail on behalf of an engine and parks its model meanwhile. Engine thread only, but for :meth:`ask`.

    KV blocks are dropped unless the policy keeps them: the pool is one allocation of the model's whole KV budget, which
    somebody else can use, while a prefix costs no more than its prefill (and a primed one not even that).
    """

    def __init__(
        self,
        bound: BoundModel | BoundEncoder,
        park_after_s: float = 0.0,
        on_moved: Callable[[Tier], None] = lambda _tier: None,
        policy: ParkPolicy = ParkPolicy.DROP,
        release: ProcessRelease | None = None,
    ) -> None:
        """``park_after_s`` 0: only when asked. ``on_moved`` hears, on this thread, where the model is now: HOT, PARKED
        or RELEASED. ``release`` is used by policy RELEASE; None: this machine has no such thing."""
        self._model = bound if isinstance(bound, Parkable) else None
        self._park_after_s = park_after_s
        self._on_moved = on_moved
        self._policy = policy
        self._release = release if policy is ParkPolicy.RELEASE else None
        self._num_refusals = 0
        self._tier = Tier.HOT
        self._wish: bool | None = None  # set by `ask`, taken by the engine's thread
        self._mailbox: Mailbox | None = None
        self._has_pending: Callable[[], bool] = lambda: False

    def ask(self, is_parked: bool) -> None:
        """Park as soon as nothing runs, or come back. Any thread; without effect on a model that cannot park."""
        self._wish = is_parked
        if self._mailbox is not None:
            self._mailbox.wake()

    def attach(self, has_pending: Callable[[], bool]) -> None:
        """``has_pending`` tells whether the engine, though it waits for mail, has requests (whose grammars are being
        compiled): then nothing is parked."""
        self._has_pending = has_pending

    def wait_collect(self, mailbox: Mailbox) -> Mail:
        """As :meth:`Mailbox.wait_collect`. A model that was parked is on its way back when this returns requests.

        Raises:
            BackendFull: it cannot come back: somebody else has the memory, and kept it for :data:`RETURN_LIMIT_S`.
            BackendLost: the device failed.
        """
        model, self._mailbox = self._model, mailbox
        if model is None:
            return mailbox.wait_collect()
        if self._tier is Tier.HOT:
            if self._has_pending():
                return mailbox.wait_collect()
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
        begin_s, before_bytes = time.monotonic(), model.read_free_bytes()
        self._wish = None
        keeps_kv = self._policy is ParkPolicy.KEEP
        # Locked pages would be locked anew by the driver when it fetches the process: not before a release.
        model.park(keeps_kv=keeps_kv, locks_source=self._release is None)
        free_bytes = model.read_free_bytes()
        tier = Tier.PARKED if self._release is None else self._try_release(model, self._release)
        _log.info(
            "model_parked",
            tier=tier.value,
            kv="kept" if keeps_kv else "dropped",
            freed_bytes=free_bytes - before_bytes,
            device_free_bytes=free_bytes,  # before a release, after which this process cannot ask
            elapsed_ms=_elapsed_ms(begin_s),
        )
        self._move(tier)

    def _try_release(self, model: Parkable, release: ProcessRelease) -> Tier:
        try:
            release.suspend()
        except BackendLost:
            raise
        except BackendError as error:
            self._num_refusals += 1
            _log.warning("release_refused", error=str(error), times=self._num_refusals, instead="T3")
            if self._num_refusals >= MAX_REFUSALS:
                self._release = None
            model.park(locks_source=True)
            return Tier.PARKED
        self._num_refusals = 0
        return Tier.RELEASED

    def _return(self, model: Parkable, mailbox: Mailbox, mail: Mail) -> None:
        """Bring ``model`` back, waiting for room where there is none. What arrives meanwhile is added to ``mail``.
        A stop ends the wait; so does the limit where no request needs it."""
        begin_s = time.monotonic()
        while not mail.stop:
            try:
                self._fetch(model)
            except BackendFull:
                if time.monotonic() - begin_s > RETURN_LIMIT_S:
                    if mail.requests:
                        raise
                    _log.warning("model_stays_parked", waited_s=RETURN_LIMIT_S)
                    return
                mail.add(mailbox.wait_collect(RETRY_S))
                continue
            _log.info("model_returned", elapsed_ms=_elapsed_ms(begin_s))
            return

    def _fetch(self, model: Parkable) -> None:
        if self._tier is Tier.RELEASED and self._release is not None:
            begin_s = time.monotonic()
            self._release.resume()
            _log.info("process_fetched", elapsed_ms=_elapsed_ms(begin_s))
            self._move(Tier.PARKED)
        model.unpark()
        self._move(Tier.HOT)

    def _move(self, tier: Tier) -> None:
        self._tier = tier
        self._on_moved(tier)


def _elapsed_ms(begin_s: float) -> float:
    return round((time.monotonic() - begin_s) * 1000, 2)
