"""Admission: how long a queue may be, by number and by the time it would take, and when to come back.

The estimate is Little's law on what this gateway measures: a model's workers serve ``capacity`` requests at once, each
for ``service_s`` (from claim to last token, a moving average), so ``capacity / service_s`` end each second. A request
that would wait longer than ``max_wait_s`` for its turn is refused at once, in the same script that would queue it:
the wait becomes a queue length. Batch jobs wait as long as it takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.states import Priority
from scheduler.gateway.errors import MAX_RETRY_AFTER_S
from scheduler.gateway.settings import GatewaySettings
from scheduler.tenants import UNLIMITED, TenantPolicy

if TYPE_CHECKING:
    from scheduler.config import ModelPolicy, SchedulerConfig

DEFAULT_MAX_RUNNING: Final = 64
SERVICE_WEIGHT: Final = 0.2  # of the newest measurement
MIN_SERVICE_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class QueueLimit:
    """How many requests of a model may be queued or running before one more is refused, and why."""

    max_queued: int
    by_wait: bool
    capacity: int
    service_s: float | None

    def refuse(self, model: str, depth: int) -> GlowplugError:
        """The refusal of a request that found ``depth`` before it."""
        retry_after_s = decide_retry_after_s(depth, self)
        if self.by_wait and self.service_s is not None:
            wait_s = max(0, depth - self.capacity + 1) * self.service_s / self.capacity
            return GlowplugError(
                ErrorCode.OVERLOADED,
                f'"{model}" has {depth} requests queued or running, about {math.ceil(wait_s)} s of work before this '
                f"one: try again in {retry_after_s} s",
                retry_after_s=retry_after_s,
            )
        return GlowplugError(
            ErrorCode.QUEUE_FULL,
            f'model "{model}" has {depth} requests queued or running, the limit is {self.max_queued}: '
            f"try again in {retry_after_s} s",
            retry_after_s=retry_after_s,
        )


def decide_queue_limit(max_queued: int, capacity: int, service_s: float | None, max_wait_s: float) -> QueueLimit:
    """The shorter of both limits; only the number while nothing has been measured."""
    if service_s is None:
        return QueueLimit(max_queued, False, capacity, None)
    by_wait = capacity + math.floor(max_wait_s * capacity / service_s)
    return QueueLimit(min(max_queued, by_wait), by_wait < max_queued, capacity, service_s)


def decide_retry_after_s(depth: int, limit: QueueLimit) -> int:
    """Seconds until the queue is short enough, at the measured rate; 2 where nothing has been measured."""
    if limit.service_s is None:
        return 2
    too_many = max(1, depth - limit.max_queued + 1)
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(too_many * limit.service_s / limit.capacity)))


class Admission:
    """Policies of models and tenants, and what the models' workers have been measured to serve. Event loop only."""

    def __init__(self, settings: GatewaySettings, config: SchedulerConfig | None = None) -> None:
        self._settings = settings
        self._config = config
        self._service_s: dict[str, float] = {}

    def set_config(self, config: SchedulerConfig) -> None:
        """The configuration was read again; policies hold from the next request on."""
        self._config = config

    @property
    def has_quotas(self) -> bool:
        """Whether any tenant has one."""
        config = self._config
        return config is not None and any(one.has_quota for one in (config.tenant_defaults, *config.tenants.values()))

    def tenant_policy(self, tenant: str) -> TenantPolicy:
        """What ``tenant`` may use; unlimited where nothing is configured."""
        return UNLIMITED if self._config is None else self._config.tenants.get(tenant, self._config.tenant_defaults)

    def model_policy(self, model: str) -> ModelPolicy:
        """How ``model`` is woken, and when its batches run."""
        from scheduler.config import ModelPolicy  # YAML is not imported where no batch runs

        return ModelPolicy() if self._config is None else self._config.policy_of(model)

    def on_served(self, model: str, service_s: float) -> None:
        """A request of ``model`` ended well, ``service_s`` after a worker had claimed it."""
        measured_s, before_s = max(MIN_SERVICE_S, service_s), self._service_s.get(model)
        self._service_s[model] = measured_s if before_s is None else before_s + SERVICE_WEIGHT * (measured_s - before_s)

    def queue_limit(self, model: str, priority: Priority, num_workers: int) -> QueueLimit:
        """How long the queue of ``model`` may be for one more request of this class."""
        max_queued, max_running, max_wait_s = self._settings.max_queued, DEFAULT_MAX_RUNNING, self._settings.max_wait_s
        if self._config is not None:
            policy = self._config.policy_of(model)
            max_queued, max_running, max_wait_s = policy.max_queued, policy.max_running, policy.max_wait_s
        capacity = max_running * max(1, num_workers)
        service_s = None if priority is Priority.BATCH else self._service_s.get(model)
        return decide_queue_limit(max_queued, capacity, service_s, max_wait_s)
