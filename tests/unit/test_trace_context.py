"""W3C trace context: what is taken from headers, what goes into the queue, who decides what is recorded."""

from __future__ import annotations

import random
import subprocess
import sys

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict
from opentelemetry.context import Context
from opentelemetry.sdk.trace import sampling
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from scheduler.contract import codec, job_queue
from scheduler.contract.config_file import TracingSection
from scheduler.contract.environment import SettingsError
from scheduler.contract.errors import ContractError
from scheduler.contract.messages import GenerateRequest
from scheduler.contract.trace_context import (
    MAX_TRACESTATE_CHARS,
    ParentSpan,
    TraceContext,
    parse,
    read_headers,
    read_tracestate,
)
from scheduler.gateway.request_span import begin_request_span, create_span_id, create_trace_id
from scheduler.gateway.tracing_settings import SAMPLERS, TracingSettings, read_tracing_settings
from tests.queue_fixtures import make_request

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (PARENT, 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f" {PARENT} ", 1),
        (f"00-{TRACE}-{SPAN}-ff", 3),  # only the flags that are known
        (f"cc-{TRACE}-{SPAN}-01-what-will-come", 1),  # a later version
        (f"cc-{TRACE}-{SPAN}-03", 3),
    ],
)
def test_valid_parents_are_read(header: str, flags: int) -> None:
    """Version 00, and the first four fields of later ones."""
    assert read_headers([header], []) == ParentSpan(TRACE, SPAN, flags)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        PARENT.upper(),
        PARENT + "-more",
        PARENT + "-",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-0g",
        f"00_{TRACE}_{SPAN}_01",
        PARENT + "\n",
        f"cc-{TRACE}-{SPAN}-01-" + "x" * 1000,
    ],
)
def test_anything_else_begins_a_new_trace(header: str) -> None:
    """What is not valid is no parent, and no error."""
    assert read_headers([header], []) is None


def test_two_parents_are_none() -> None:
    """A header that is there twice names nobody."""
    assert read_headers([PARENT, PARENT], []) is None
    assert read_headers([], ["a=b"]) is None


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (["rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"], "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        (["a=1 , b=2", "c@d=3"], "a=1,b=2,c@d=3"),
        (["a=1,,b=2"], "a=1,b=2"),
        ([""], ""),
        (["a"], ""),
        (["A=1"], ""),
        (["a=1,a=2"], ""),
        (["a=b=c"], ""),
        (["a=\x7f"], ""),
        ([",".join(f"k{i}=v" for i in range(33))], ""),
        (["a=" + "x" * MAX_TRACESTATE_CHARS], ""),
    ],
)
def test_tracestate_is_passed_on_or_left_out(headers: list[str], expected: str) -> None:
    """Lists of several headers are one list; a malformed or too long one is left out, its parent is not."""
    assert read_tracestate(headers) == expected
    assert read_headers([PARENT], headers) == ParentSpan(TRACE, SPAN, 1, expected)


@given(st.text(max_size=80), st.text(max_size=600))
def test_no_header_raises(traceparent: str, tracestate: str) -> None:
    """Whatever stands in them; what is read can be written again."""
    found = read_headers([traceparent], [tracestate])
    assert found is None or len(found.tracestate) <= MAX_TRACESTATE_CHARS


def test_the_queue_carries_the_context_within_bounds() -> None:
    """It survives the job's body; a longer one than the standard's is refused as no job at all."""
    context = TraceContext(PARENT, "a=1")
    request = make_request("r1", trace_context=context)
    again = job_queue.decode_job(job_queue.encode_job(request, 1))
    assert parse(again.trace_context) == ParentSpan(TRACE, SPAN, 1, "a=1")
    assert codec.encode(make_request("r1")) == codec.encode(make_request("r1", trace_context=None))
    for long in (TraceContext(PARENT + "-more"), TraceContext(PARENT, "a=" + "x" * MAX_TRACESTATE_CHARS)):
        with pytest.raises(ContractError, match="length"):
            codec.decode(codec.encode(make_request("r1", trace_context=long)), GenerateRequest)
    assert parse(TraceContext("nonsense")) is None
    assert parse(None) is None


def headers_of(**headers: str) -> CIMultiDict[str]:
    return CIMultiDict(headers)


def test_without_tracing_a_context_passes_through_unchanged() -> None:
    """The gateway adds no span, so what the client named is what the worker gets; without one there is nothing."""
    given_headers = headers_of(traceparent=PARENT, tracestate="a=1")
    span = begin_request_span(make_mocked_request("POST", "/", headers=given_headers), None)
    assert span is not None
    assert not span.is_recorded
    assert span.make_context("") == TraceContext(PARENT, "a=1")
    assert begin_request_span(make_mocked_request("POST", "/"), None) is None
    assert begin_request_span(make_mocked_request("POST", "/", headers=headers_of(traceparent="x")), None) is None


def test_with_tracing_the_gateway_is_the_parent_of_what_follows() -> None:
    """A new trace where there was none; the client's where there was, under the gateway's span."""
    root = begin_request_span(make_mocked_request("POST", "/"), TracingSettings())
    assert root is not None
    assert root.is_recorded
    assert root.flags == 0b11
    assert root.make_context("") == TraceContext(f"00-{root.trace_id}-{root.span_id}-03")
    child = begin_request_span(
        make_mocked_request("POST", "/", headers=headers_of(traceparent=PARENT)), TracingSettings()
    )
    assert child is not None
    assert (child.trace_id, child.flags) == (TRACE, 1)
    own = create_span_id()
    assert child.make_context(own) == TraceContext(f"00-{TRACE}-{own}-01")
    silent = begin_request_span(
        make_mocked_request("POST", "/", headers=headers_of(traceparent=f"00-{TRACE}-{SPAN}-00")), TracingSettings()
    )
    assert silent is not None
    assert not silent.is_recorded
    assert silent.flags == 0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_samplers_decide_as_those_of_the_sdk(name: str, ratio: float) -> None:
    """Every service of a trace decides alike, so ours must be OpenTelemetry's decision."""
    theirs: sampling.Sampler = {
        "always_on": sampling.ALWAYS_ON,
        "always_off": sampling.ALWAYS_OFF,
        "traceidratio": sampling.TraceIdRatioBased(ratio),
        "parentbased_always_on": sampling.DEFAULT_ON,
        "parentbased_always_off": sampling.DEFAULT_OFF,
        "parentbased_traceidratio": sampling.ParentBasedTraceIdRatio(ratio),
    }[name]
    ours = TracingSettings(name, ratio)
    random.seed(7)
    for number in range(60):
        trace_id = f"{random.getrandbits(128) or 1:032x}"
        parent = None if number % 3 == 0 else ParentSpan(trace_id, SPAN, number % 2)
        context = Context()
        if parent is not None:
            remote = SpanContext(int(trace_id, 16), int(SPAN, 16), True, TraceFlags(parent.flags))
            context = set_span_in_context(NonRecordingSpan(remote), Context())
        expected = theirs.should_sample(context, int(trace_id, 16), "x").decision.is_sampled()
        assert ours.decide_sampled(trace_id, parent) is expected


def test_ids_are_of_the_right_form() -> None:
    """Lower-case hexadecimal, never all zero, as the standard wants them."""
    assert read_headers([f"00-{create_trace_id()}-{create_span_id()}-01"], []) is not None


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"},
    ],
)
def test_tracing_is_off_unless_an_endpoint_asks_for_it(env: dict[str, str]) -> None:
    """Neither a name nor a sampler turns it on; the standard's switches turn it off."""
    assert read_tracing_settings(env) is None


def test_the_standard_variables_are_read() -> None:
    """An endpoint, or the exporter's name, turns it on; a ratio alone is the default sampler's."""
    url = "http://a:4318"
    assert read_tracing_settings({"OTEL_TRACES_EXPORTER": "otlp"}) == TracingSettings()
    assert read_tracing_settings({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": url}) == TracingSettings()
    sampled = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_TRACES_SAMPLER_ARG": "0.25"}
    assert read_tracing_settings(sampled) == TracingSettings(ratio=0.25)
    chosen = read_tracing_settings({**sampled, "OTEL_TRACES_SAMPLER": "traceidratio"})
    assert chosen == TracingSettings("traceidratio", 0.25)
    section = msgspec.json.schema(TracingSection)["$defs"]["TracingSection"]["properties"]["sampler"]
    assert {name for kind in section["anyOf"] for name in kind.get("enum", ())} == set(SAMPLERS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "expected otlp or none"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", "expected a URL such as"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "expected http/protobuf"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote", "expected one of always_on"),
        ("OTEL_TRACES_SAMPLER_ARG", "7", "expected a share from 0 to 1"),
        ("OTEL_TRACES_SAMPLER_ARG", "some", "expected a share from 0 to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_remedy(name: str, value: str, message: str) -> None:
    """Each error names the variable, what was seen and what was expected."""
    with pytest.raises(SettingsError, match=message) as caught:
        read_tracing_settings({"OTEL_TRACES_EXPORTER": "otlp", name: value})
    assert name in str(caught.value)


WITHOUT_EXTRA = """
import sys
for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter"):
    sys.modules[name] = None
from scheduler.__main__ import main
sys.exit(main(["gateway"]))
"""


def test_without_the_extra_the_error_says_what_to_install() -> None:
    """A gateway that is asked for traces and cannot make them does not start: exit code 78, and the remedy."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "PATH": "/usr/bin", "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRA], env={**env, "PYTHONPATH": ":".join(sys.path)}, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 78, done.stderr
    assert "pip install 'glowplug[otel]'" in done.stderr
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in done.stderr


def test_a_gateway_without_tracing_imports_none_of_it() -> None:
    """Neither the gateway nor a zygote has OpenTelemetry loaded: what is off costs nothing."""
    code = (
        "import sys,  scheduler.gateway.app, worker.request_runner\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
