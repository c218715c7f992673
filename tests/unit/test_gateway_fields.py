"""Request fields: strict types, explicit ranges, errors that name the field; nothing is clamped."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import SamplingParams
from scheduler.gateway.field_reader import FieldReader
from scheduler.gateway.sampling_fields import read_chat_logprobs, read_completion_logprobs, read_sampling
from tests.gateway_fixtures import make_card


def read(body: dict[str, Any]) -> SamplingParams:
    return read_sampling(FieldReader(body), make_card(), default_max_tokens=77, num_top_logprobs=None)


def test_absent_and_null_fields_give_openai_defaults() -> None:
    """``null`` is what OpenAI's clients send for a field that was left out."""
    for body in ({}, dict.fromkeys(["temperature", "top_p", "seed", "stop", "max_tokens", "logit_bias", "top_k"])):
        found = read(body)
        assert (found.temperature, found.top_p, found.top_k, found.max_tokens, found.stop) == (1.0, 1.0, 0, 77, ())
        assert found.logit_bias == {}
        assert 0 <= found.seed < 2**63


def test_two_requests_without_a_seed_get_different_seeds() -> None:
    """A drawn seed is random."""
    assert read({}).seed != read({}).seed


def test_every_given_value_arrives_unchanged() -> None:
    """Values at and inside the limits are taken as they are."""
    found = read(
        {
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 40,
            "min_p": 0.05,
            "seed": -5,
            "stop": ["a", "b"],
            "max_completion_tokens": 9,
            "frequency_penalty": -2,
            "presence_penalty": 2,
            "repetition_penalty": 1.1,
            "logit_bias": {"5": -100, "999": 1.5},
            "min_tokens": 3,
            "ignore_eos": True,
        }
    )
    assert found == SamplingParams(
        seed=-5,
        max_tokens=9,
        temperature=0.0,
        top_p=0.5,
        top_k=40,
        min_p=0.05,
        frequency_penalty=-2.0,
        presence_penalty=2.0,
        repetition_penalty=1.1,
        logit_bias={5: -100.0, 999: 1.5},
        stop=("a", "b"),
        min_tokens=3,
        ignore_eos=True,
    )


def test_minus_one_switches_top_k_off_and_zero_top_p_keeps_one_token() -> None:
    """vLLM's -1 means off; a nucleus of probability 0 still holds the most likely token."""
    assert read({"top_k": -1}).top_k == 0
    assert 0 < read({"top_p": 0}).top_p < 1e-6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", True),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("seed", 2**63),
        ("seed", 1.0),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", [1]),
        ("stop", "x" * 257),
        ("max_tokens", 0),
        ("max_tokens", "10"),
        ("max_tokens", 2049),
        ("max_completion_tokens", -1),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -3),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1000": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "a"}),
        ("logit_bias", [1]),
        ("logit_bias", {"١": 1}),
        ("min_tokens", 78),
        ("ignore_eos", 1),
    ],
)
def test_a_wrong_type_or_range_is_a_400_that_names_the_field(field: str, value: object) -> None:
    """The error's ``param`` is the field, and its message begins with it."""
    with pytest.raises(GlowplugError) as caught:
        read({field: value})
    assert caught.value.info.code is ErrorCode.INVALID_REQUEST
    assert caught.value.info.param == field
    assert caught.value.info.message.startswith(field)


def test_contradicting_limits_are_refused_and_equal_ones_are_not() -> None:
    """Neither limit silently wins over the other."""
    assert read({"max_tokens": 5, "max_completion_tokens": 5}).max_tokens == 5
    with pytest.raises(GlowplugError, match="contradicts"):
        read({"max_tokens": 5, "max_completion_tokens": 6})


def test_logprobs_in_both_forms() -> None:
    """Chat has a switch and a number, legacy completions only a number."""
    assert read_chat_logprobs(FieldReader({})) is None
    assert read_chat_logprobs(FieldReader({"logprobs": True})) == 0
    assert read_chat_logprobs(FieldReader({"logprobs": True, "top_logprobs": 20})) == 20
    assert read_completion_logprobs(FieldReader({"logprobs": 0})) == 0
    for reader, body in (
        (read_chat_logprobs, {"top_logprobs": 3}),
        (read_chat_logprobs, {"logprobs": True, "top_logprobs": 21}),
        (read_chat_logprobs, {"logprobs": 5}),
        (read_completion_logprobs, {"logprobs": True}),
        (read_completion_logprobs, {"logprobs": 21}),
    ):
        with pytest.raises(GlowplugError):
            reader(FieldReader(body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["temperature", "top_k", "seed", "stop", "logit_bias", "max_tokens", "ignore_eos"]), JSON)
def test_any_json_value_is_taken_or_refused_by_name(field: str, value: object) -> None:
    """No JSON value of a field raises anything but the 400 that names it."""
    param: str | None = field
    try:
        read({field: value})
    except GlowplugError as error:
        param = error.info.param
    assert param == field
