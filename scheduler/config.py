"""The scheduler's settings: one YAML file, environment overrides, and errors that name the field and the remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from scheduler.contract.config_file import (
    AgentSection,
    ConfigDocument,
    GatewaySection,
    LoggingSection,
    TracingSection,
    read_document,
    section_variables,
)
from scheduler.contract.environment import read_positive_float
from scheduler.contract.states import ParkPolicy
from scheduler.tenants import TenantPolicy

GIB: Final = 1024**3
DEFAULT_IDLE_TIMEOUT_S: Final = 300.0
DEFAULT_UNHEARD_GRACE_S: Final = 30.0
_DAY_WINDOW: Final = re.compile(r"((?:[01]\d|2[0-3]):[0-5]\d)-((?:[01]\d|2[0-3]):[0-5]\d)")


class ModelPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one model is woken and put to sleep.

    An interactive request that would wait longer than ``max_wait_s`` for its turn is refused. ``max_running``
    sequences share a worker's batch. ``kv_budget_bytes`` bounds a worker's KV cache. A ``pinned`` model keeps a
    worker and is never scaled to zero. ``park_after_s`` is for backends that can park (T3); on others a worker stays
    hot until ``idle_timeout_s``. 0: never parked. ``park`` says what leaves the device then: ``drop`` (weights and KV
    blocks), ``keep`` (weights only), ``release`` (all, by the driver's checkpoint, where it has one).

    Lines of a batch wake the model, unless ``batch_wakes`` is off, and run within ``batch_window`` (local time, such as
    ``22:00-06:00``; empty: always), ``batch_in_flight`` at once. When none of them has been answered for
    ``batch_max_wait_s`` they take the order of interactive requests.
    """

    idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S
    max_workers: int = 1
    max_running: int = 64
    max_queued: int = 512
    max_wait_s: float = 120.0
    kv_budget_bytes: int = 2 * GIB
    drain_grace_s: float = 30.0
    pinned: bool = False
    park_after_s: float = 0.0
    park: ParkPolicy = ParkPolicy.DROP
    batch_wakes: bool = True
    batch_window: str = ""
    batch_in_flight: int = 16
    batch_max_wait_s: float = 1800.0


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a configuration file may say. ``memory_budget_bytes`` 0: 80 % of each node's memory. ``unheard_grace_s``:
    how long the requests of a gateway that died are run on for clients that come back."""

    defaults: ModelPolicy = ModelPolicy()
    models: dict[str, dict[str, Any]] = {}
    memory_budget_bytes: int = 0
    tenants: dict[str, TenantPolicy] = {}
    tenant_defaults: TenantPolicy = TenantPolicy()
    unheard_grace_s: float = DEFAULT_UNHEARD_GRACE_S
    gateway: GatewaySection = GatewaySection()
    agent: AgentSection = AgentSection()
    logging: LoggingSection = LoggingSection()
    tracing: TracingSection = TracingSection()

    def policy_of(self, model: str) -> ModelPolicy:
        """The defaults with the model's own settings over them. Validated at load."""
        own = self.models.get(model)
        if not own:
            return self.defaults
        return msgspec.convert({**msgspec.to_builtins(self.defaults), **own}, ModelPolicy)


def load_config(path: Path | None, env: Mapping[str, str] = os.environ) -> SchedulerConfig:
    """Settings from ``path`` (YAML; None: defaults), then GLOWPLUG_IDLE_TIMEOUT_S and GLOWPLUG_MAX_WORKERS over its
    ``defaults``.

    Raises:
        SettingsError: unreadable file, unknown or malformed field; the message names file, line, field and remedy.
    """
    config = SchedulerConfig() if path is None else _convert(read_document(path))
    overrides: dict[str, Any] = {
        "idle_timeout_s": read_positive_float("GLOWPLUG_IDLE_TIMEOUT_S", config.defaults.idle_timeout_s, env),
        "max_workers": int(read_positive_float("GLOWPLUG_MAX_WORKERS", config.defaults.max_workers, env)),
    }
    grace_s = read_positive_float("GLOWPLUG_UNHEARD_GRACE_S", config.unheard_grace_s, env)
    config = msgspec.structs.replace(config, unheard_grace_s=grace_s)
    return msgspec.structs.replace(config, defaults=msgspec.structs.replace(config.defaults, **overrides))


def _convert(document: ConfigDocument) -> SchedulerConfig:
    for section, struct in (("models", ModelPolicy), ("tenants", TenantPolicy)):
        entries = document.values.get(section)
        for name, given in entries.items() if isinstance(entries, dict) else ():
            # One by one, so that errors name the entry.
            document.convert({} if given is None else given, struct, (section, str(name)))
    section_variables(document)  # likewise
    config: SchedulerConfig = document.convert(document.values, SchedulerConfig)
    _check_policy(config.defaults, document, ("defaults",))
    for model in config.models:
        _check_policy(config.policy_of(model), document, ("models", model))
    _check_tenant(config.tenant_defaults, document, ("tenant_defaults",))
    for tenant, policy in config.tenants.items():
        _check_tenant(policy, document, ("tenants", tenant))
    if (config.gateway.tls_cert is None) != (config.gateway.tls_key is None):
        raise document.error(("gateway",), "tls_cert and tls_key go together: give both, or neither")
    for name in ("memory_budget_bytes", "unheard_grace_s"):
        if getattr(config, name) < 0:
            raise document.error((name,), f"{getattr(config, name)}: expected 0 or more")
    return config


#: Numbers of a policy for which 0 means something.
MAY_BE_ZERO: Final = frozenset({"park_after_s"})


def is_day_window(text: str) -> bool:
    """Whether ``text`` is empty or two different times of day, ``HH:MM-HH:MM``."""
    found = _DAY_WINDOW.fullmatch(text)
    return not text or (found is not None and found[1] != found[2])


def _check_policy(policy: ModelPolicy, document: ConfigDocument, where: tuple[str, ...]) -> None:
    if not is_day_window(policy.batch_window):
        message = f'"{policy.batch_window}": expected local times such as "22:00-06:00", or nothing'
        raise document.error((*where, "batch_window"), message)
    for field in ModelPolicy.__struct_fields__:
        value = getattr(policy, field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if field in MAY_BE_ZERO and value < 0:
            raise document.error((*where, field), f"{value:g}: expected 0 (never) or more")
        if field not in MAY_BE_ZERO and not value > 0:
            raise document.error((*where, field), f"{value:g}: expected a positive number")


def _check_tenant(policy: TenantPolicy, document: ConfigDocument, where: tuple[str, ...]) -> None:
    if not policy.weight > 0:
        raise document.error((*where, "weight"), f"{policy.weight:g}: expected a positive number")
    for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        if getattr(policy, field) < 0:
            raise document.error((*where, field), f"{getattr(policy, field)}: expected 0 (unlimited) or more")
