"""Whether and how requests are traced: OpenTelemetry's own variables, the ones we read ourselves checked here.

The exporter reads the others by itself: OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT, _COMPRESSION, _CERTIFICATE, OTEL_BSP_*,
OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES. Source: OpenTelemetry specification, "Environment Variable Specification".
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Final

import msgspec

from scheduler.contract.environment import SettingsError
from scheduler.contract.trace_context import ParentSpan

DISABLED: Final = "OTEL_SDK_DISABLED"
EXPORTER: Final = "OTEL_TRACES_EXPORTER"
ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_ENDPOINT: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SAMPLER: Final = "OTEL_TRACES_SAMPLER"
SAMPLER_ARG: Final = "OTEL_TRACES_SAMPLER_ARG"
DEFAULT_SAMPLER: Final = "parentbased_traceidratio"  # with ratio 1 the same as the specification's default
SAMPLERS: Final = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)
_ASKS_PARENT: Final = "parentbased_"
_MODULES: Final = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


class TracingSettings(msgspec.Struct, frozen=True):
    """Which requests are recorded: ``ratio`` of those without a parent; of the others, what the parent says, unless the
    sampler does not ask parents."""

    sampler: str = DEFAULT_SAMPLER
    ratio: float = 1.0

    def decide_sampled(self, trace_id: str, parent: ParentSpan | None) -> bool:
        """Whether a request of this trace is recorded. Source: OpenTelemetry specification, "TraceIdRatioBased"."""
        if parent is not None and self.sampler.startswith(_ASKS_PARENT):
            return parent.is_sampled
        match self.sampler.removeprefix(_ASKS_PARENT):
            case "always_on":
                return True
            case "always_off":
                return False
            case _:
                return int(trace_id[16:], 16) < round(self.ratio * 2**64)


def read_tracing_settings(env: Mapping[str, str] = os.environ) -> TracingSettings | None:
    """How to trace; None: nothing asks for it. On is what names an endpoint, or ``otlp`` as the exporter.

    Raises:
        SettingsError: a variable is malformed, or the extra ``otel`` is not installed.
    """
    asked_by = next((name for name in (TRACES_ENDPOINT, ENDPOINT, EXPORTER) if env.get(name)), None)
    if asked_by is None or (env.get(DISABLED) or "").lower() == "true":
        return None
    exporter = env.get(EXPORTER) or "otlp"
    if exporter == "none":
        return None
    if exporter != "otlp":
        raise SettingsError(f'{EXPORTER}="{exporter}": expected otlp or none')
    for name in (TRACES_ENDPOINT, ENDPOINT):
        if (url := env.get(name)) and not url.startswith(("http://", "https://")):
            raise SettingsError(f'{name}="{url[:80]}": expected a URL such as http://127.0.0.1:4318')
    for name in PROTOCOLS:
        if (protocol := env.get(name)) and protocol != "http/protobuf":
            raise SettingsError(f'{name}="{protocol[:40]}": expected http/protobuf, the only one that is offered')
    sampler = env.get(SAMPLER) or DEFAULT_SAMPLER
    if sampler not in SAMPLERS:
        raise SettingsError(f'{SAMPLER}="{sampler[:40]}": expected one of {", ".join(SAMPLERS)}')
    ratio = _read_ratio(env.get(SAMPLER_ARG))
    if not all(map(_is_installed, _MODULES)):
        raise SettingsError(
            f"{asked_by} asks for traces, which need the extra otel: pip install 'glowplug[otel]', or unset it"
        )
    return TracingSettings(sampler, ratio)


def _read_ratio(text: str | None) -> float:
    if not text:
        return 1.0
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 1.0:
        raise SettingsError(f'{SAMPLER_ARG}="{text[:40]}": expected a share from 0 to 1, e.g. 0.1')
    return ratio


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False
