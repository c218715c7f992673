"""What the gateway knows of models and their state: cards and the scheduler's report, read from Redis and cached.

Listing models or asking for health reads this and never touches a worker, so neither wakes a model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.errors import ContractError, ErrorCode, GlowplugError
from scheduler.contract.messages import ModelCard, ModelStatus, StatusReport, Trace
from scheduler.contract.states import SlotState, Tier
from scheduler.gateway.errors import redis_within
from scheduler.gateway.identity import Identity
from scheduler.gateway.traces import compute_ttft_ms

REFRESH_EVERY_S: Final = 0.5
#: No card at all, where there were some: for so long the known ones count.
FORGOTTEN_GRACE_S: Final = 5.0
#: A server that has been away this long is not waited for: a restart is over sooner.
AWAY_S: Final = 1.0
AWAY_RETRY_AFTER_S: Final = 2
NO_NODE: Final = "no node agent has reported; start one with `glowplug agent`"
WAKE_WEIGHT: Final = 0.3  # of the newest measurement
MAX_NAMES_IN_ERROR: Final = 20


class ModelDirectory:
    """Cards by name and the newest status report. Event loop only; written only by :meth:`refresh`.

    ``on_card`` is called for each card that is new or has changed. It must not raise.
    """

    def __init__(
        self,
        redis: Redis,
        redis_limit_s: float,
        on_card: Callable[[ModelCard], None],
        cut_off_for_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._redis = redis
        self._cut_off_for_s = cut_off_for_s
        self._on_card = on_card
        self._redis_limit_s = redis_limit_s
        self._cards: dict[str, ModelCard] = {}
        self._raw_cards: dict[bytes, bytes] = {}
        self._status: StatusReport | None = None
        self._status_by_model: dict[str, ModelStatus] = {}
        self._wake_ms: dict[str, float] = {}
        self._refreshed_mono_s = -REFRESH_EVERY_S
        self._seen_cards_mono_s = -FORGOTTEN_GRACE_S
        self._refreshing = asyncio.Lock()
        self._log = structlog.get_logger()

    @property
    def cards(self) -> dict[str, ModelCard]:
        """Cards as of the last refresh; read only."""
        return self._cards

    @property
    def status(self) -> StatusReport | None:
        """The scheduler's report as of the last refresh; None when it has expired."""
        return self._status

    def status_of(self, model: str) -> ModelStatus | None:
        return self._status_by_model.get(model)

    def is_hot(self, model: str) -> bool:
        """Whether a worker was ready for ``model`` at the last report (advisory)."""
        found = self._status_by_model.get(model)
        return found is not None and found.tier is Tier.HOT and SlotState.READY in found.state

    def describe_cold(self, model: str) -> str:
        """Why nothing runs ``model``, with the remedy, as far as the last report tells; empty where it does not."""
        status = self._status
        if status is None:
            return "no scheduler reports; start one with `glowplug scheduler`"
        if not status.nodes:
            return NO_NODE
        if all(node.node_id in status.drained_nodes for node in status.nodes):
            return "every node is drained; let one work again with `glowplug undrain NODE`"
        row = self.status_of(model)
        return (row.error or "") if row is not None else ""

    def on_wake_measured(self, trace: Trace) -> None:
        """Learn how long a wake of this model takes (moving average), for the estimates given to those who wait."""
        seen_ms = compute_ttft_ms(trace)
        if trace.cold_tier is not None and seen_ms > 0:
            before_ms = self._wake_ms.get(trace.model)
            self._wake_ms[trace.model] = (
                seen_ms if before_ms is None else before_ms + WAKE_WEIGHT * (seen_ms - before_ms)
            )

    def estimate_wake_ms(self, model: str, waited_ms: float) -> int:
        """Milliseconds left until the first token of a wake that began ``waited_ms`` ago; -1 when not known."""
        total_ms = self._wake_ms.get(model)
        return -1 if total_ms is None else max(0, round(total_ms - waited_ms))

    def invalidate(self) -> None:
        """The next reader refreshes: an event said that cards or workers changed."""
        self._refreshed_mono_s = -REFRESH_EVERY_S

    async def get_card(self, name: str, identity: Identity) -> ModelCard:
        """The card of ``name``, which may serve and which ``identity`` may see.

        What it may not see takes the same way, to the same error, as what does not exist.

        Raises:
            GlowplugError: unknown model, or one whose snapshot was refused (that refusal).
        """
        await self.ensure_fresh()
        card = self.find_card(name, identity)
        if card is None:
            await self.refresh()  # published since the last refresh?
            card = self.find_card(name, identity)
        if card is None:
            visible = sorted(filter(identity.may_see, self._cards))
            known = ", ".join(visible[:MAX_NAMES_IN_ERROR]) or "none; build one with `glowplug build`"
            raise GlowplugError(
                ErrorCode.MODEL_NOT_FOUND, f'no model "{name}" here; known models: {known}', param="model"
            )
        if card.refused is not None:
            raise refusal_of(card.refused.code, card.refused.message, card.refused.retry_after_s)
        return card

    def find_card(self, name: str, identity: Identity) -> ModelCard | None:
        """The card of ``name`` as of the last refresh; None when it does not exist for ``identity``."""
        return self._cards.get(name) if identity.may_see(name) else None

    async def ensure_fresh(self) -> None:
        """Refresh if the cache is older than half a second; one refresh at a time."""
        if time.monotonic() - self._refreshed_mono_s < REFRESH_EVERY_S:
            return
        async with self._refreshing:
            if time.monotonic() - self._refreshed_mono_s >= REFRESH_EVERY_S:
                await self.refresh()

    async def refresh(self) -> None:
        """Read cards and status now, in one round trip.

        Raises:
            GlowplugError: Redis does not answer (503); at once where it has been away for a while.
        """
        if (away_s := self._cut_off_for_s()) > AWAY_S:
            raise GlowplugError(
                ErrorCode.BACKEND_UNAVAILABLE,
                f"the queue's server has been away for {away_s:.0f} s; try again",
                retry_after_s=AWAY_RETRY_AFTER_S,
            )
        pipeline: Any = self._redis.pipeline(transaction=False)
        async with redis_within(self._redis_limit_s, "reading the models"), pipeline:
            pipeline.hgetall(keys.MODELS)
            pipeline.get(keys.STATUS)
            raw_cards, raw_status = await pipeline.execute()
        self._take_cards(raw_cards)
        self._take_status(raw_status)
        self._refreshed_mono_s = time.monotonic()

    def _take_cards(self, raw_cards: dict[bytes, bytes]) -> None:
        now_mono_s = time.monotonic()
        if raw_cards:
            self._seen_cards_mono_s = now_mono_s
        elif now_mono_s - self._seen_cards_mono_s < FORGOTTEN_GRACE_S:
            return  # a server that restarted without its data; the agents publish again with their next heartbeat
        if raw_cards == self._raw_cards:
            return
        cards = {}
        for name, data in raw_cards.items():
            try:
                card: ModelCard = codec.decode(data, ModelCard)
            except ContractError as error:
                self._log.error("model_card_refused", model=name.decode("utf-8", "replace"), error=str(error))
                continue
            cards[card.name] = card
            if self._cards.get(card.name) != card:
                self._on_card(card)
        self._raw_cards, self._cards = raw_cards, cards

    def _take_status(self, data: bytes | None) -> None:
        status: StatusReport | None = None
        if data is not None:
            try:
                status = codec.decode(data, StatusReport)
            except ContractError as error:
                self._log.error("status_report_refused", error=str(error))
        self._status = status
        self._status_by_model = {} if status is None else {model.name: model for model in status.models}


def refusal_of(code: ErrorCode, message: str, retry_after_s: int | None) -> GlowplugError:
    """A refusal of the model itself, as the error of this request."""
    return GlowplugError(code, message, param="model", retry_after_s=retry_after_s)
