"""Chat templates: the environment that authors expect, a sandbox that holds, errors that are 400s."""

from __future__ import annotations

import pytest

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.errors import ErrorCode, GlowplugError
from tests.gateway_fixtures import make_card


def render(template: str, *contents: str) -> str:
    messages = [{"role": "user", "content": content} for content in contents]
    return ChatTemplates().render(make_card(chat_template=template), messages)


def test_the_environment_that_template_authors_write_for() -> None:
    """Loop controls, tojson, special tokens, trimmed blocks, the generation tag, None for tools."""
    template = (
        "{{ bos_token }}\n"
        "{% for message in messages %}\n"
        "    {% if loop.index0 > 1 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ message | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{% if tools is none and documents is none %}{{ eos_token }}{% endif %}"
        "{{ strftime_now('%Y') | length }}"
    )
    rendered = '{"role": "user", "content": "é"}{"role": "user", "content": "<b>"}'
    assert render(template, "é", "<b>", "never") == f"<s>\n{rendered}</s>4"


def test_a_template_that_refuses_the_messages_is_a_400_with_its_words() -> None:
    """``raise_exception`` is how templates refuse an order of roles."""
    with pytest.raises(GlowplugError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}", "x")
    assert caught.value.info.code is ErrorCode.INVALID_REQUEST
    assert caught.value.info.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ messages[0].content / 2 }}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    """No way out to Python's internals, no change of the arguments, no endless range; a template's crash is a 400."""
    outcome: object = None
    try:
        outcome = render(template, "x")
    except GlowplugError as error:
        outcome = error.info.code
    assert outcome in ("", ErrorCode.INVALID_REQUEST)


def test_a_model_without_a_template_says_what_to_do() -> None:
    """Base models have none; the error names the other endpoint."""
    with pytest.raises(GlowplugError, match="/v1/completions") as caught:
        ChatTemplates().render(make_card(chat_template=None), [])
    assert caught.value.info.code is ErrorCode.INVALID_REQUEST


def test_a_template_that_does_not_compile_is_our_error_not_the_clients() -> None:
    """500: the snapshot holds it."""
    with pytest.raises(GlowplugError, match="line 1") as caught:
        render("{% if %}", "x")
    assert caught.value.info.code is ErrorCode.INTERNAL


def test_a_template_is_compiled_once() -> None:
    """Cards with the same template share the compiled one."""
    templates = ChatTemplates()
    assert templates.ensure_compiled(make_card("a")) is templates.ensure_compiled(make_card("b"))


def test_message_text_is_never_read_as_template() -> None:
    """User text that looks like Jinja stays text."""
    assert render("{{ messages[0].content }}", "{{ 7 * 7 }}{% raw %}") == "{{ 7 * 7 }}{% raw %}"
