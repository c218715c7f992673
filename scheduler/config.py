"""The scheduler's settings: one YAML file, environment overrides, and errors that name the field and the remedy."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from scheduler.contract.environment import SettingsError, read_positive_float
from scheduler.tenants import TenantPolicy

GIB: Final = 1024**3
DEFAULT_IDLE_TIMEOUT_S: Final = 300.0
DEFAULT_UNHEARD_GRACE_S: Final = 30.0
MAX_CONFIG_BYTES: Final = 1024 * 1024


class ModelPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one model is woken and put to sleep.

    An interactive request that would wait longer than ``max_wait_s`` for its turn is refused.
    ``max_running`` sequences share a worker's batch. ``kv_budget_bytes`` bounds a worker's KV cache.
    """

    idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S
    max_workers: int = 1
    max_running: int = 64
    max_queued: int = 512
    max_wait_s: float = 120.0
    kv_budget_bytes: int = 2 * GIB
    drain_grace_s: float = 30.0


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the scheduler. ``memory_budget_bytes`` 0: 80 % of each node's memory. ``unheard_grace_s``: how long
    the requests of a gateway that died are run on for clients that come back."""

    defaults: ModelPolicy = ModelPolicy()
    models: dict[str, dict[str, Any]] = {}
    memory_budget_bytes: int = 0
    tenants: dict[str, TenantPolicy] = {}
    tenant_defaults: TenantPolicy = TenantPolicy()
    unheard_grace_s: float = DEFAULT_UNHEARD_GRACE_S

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
        SettingsError: unreadable file, unknown or malformed field; the message names it.
    """
    raw: Any = {}
    if path is not None:
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise SettingsError(
                    f"{path}: {path.stat().st_size} bytes; a configuration is at most {MAX_CONFIG_BYTES}"
                )
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise SettingsError(f"{path}: not valid YAML: {error}") from error
    try:
        config = msgspec.convert(raw, SchedulerConfig)
        for model in config.models:
            _check_policy(config.policy_of(model), f"models.{model}")
    except msgspec.ValidationError as error:
        raise SettingsError(f"{path}: {error}{_suggest(str(error))}") from error
    _check_policy(config.defaults, "defaults")
    for name, tenant in (("tenant_defaults", config.tenant_defaults), *config.tenants.items()):
        _check_tenant(tenant, name)
    overrides: dict[str, Any] = {
        "idle_timeout_s": read_positive_float("GLOWPLUG_IDLE_TIMEOUT_S", config.defaults.idle_timeout_s, env),
        "max_workers": int(read_positive_float("GLOWPLUG_MAX_WORKERS", config.defaults.max_workers, env)),
    }
    grace_s = read_positive_float("GLOWPLUG_UNHEARD_GRACE_S", config.unheard_grace_s, env)
    config = msgspec.structs.replace(config, unheard_grace_s=grace_s)
    return msgspec.structs.replace(config, defaults=msgspec.structs.replace(config.defaults, **overrides))


def _check_policy(policy: ModelPolicy, where: str) -> None:
    for field in ModelPolicy.__struct_fields__:
        value = getattr(policy, field)
        if not value > 0:
            raise SettingsError(f"{where}.{field}: {value}: expected a positive number")


def _check_tenant(policy: TenantPolicy, where: str) -> None:
    if not policy.weight > 0:
        raise SettingsError(f"tenants.{where}.weight: {policy.weight}: expected a positive number")
    for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        if getattr(policy, field) < 0:
            raise SettingsError(f"tenants.{where}.{field}: {getattr(policy, field)}: expected 0 (unlimited) or more")


def _suggest(message: str) -> str:
    """`` (did you mean ...?)`` for an unknown field, else nothing."""
    known = (*ModelPolicy.__struct_fields__, *TenantPolicy.__struct_fields__, *SchedulerConfig.__struct_fields__)
    parts = message.split("`")
    if "unknown field" not in message or len(parts) < 2:
        return ""
    close = difflib.get_close_matches(parts[1], known, n=1)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known)})"
