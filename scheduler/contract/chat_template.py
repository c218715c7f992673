"""Chat templates: Jinja in an immutable sandbox, with the environment that model authors write for.

Source: ``transformers.utils.chat_template_utils._compile_jinja_template`` (block trimming, loop controls, ``tojson``,
``raise_exception``, ``strftime_now``, the ``generation`` tag). Jinja is imported on first use: listening needs none.

Here because two must agree on it to the letter: the gateway renders prompts, and a build computes the keys and values
of what they will begin with.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import ModelCard

if TYPE_CHECKING:
    from jinja2 import Environment, Template

MAX_CACHED_TEMPLATES: Final = 64
MAX_TEMPLATE_CHARS: Final = 1024 * 1024
#: A rendered prompt may be this much longer than the messages (tags around each, a default system prompt).
MAX_RENDERED_CHARS: Final = 32 * 1024 * 1024
MAX_REASON_CHARS: Final = 300


class ChatTemplates:
    """Compiled templates by their source. Event loop only; the first use of a template compiles it."""

    def __init__(self) -> None:
        self._compiled: dict[str, Template] = {}
        self._takes_tools: dict[str, bool] = {}

    def ensure_compiled(self, card: ModelCard) -> Template:
        """The compiled template of ``card``, compiled at most once. About 10 ms for a large template, else a look-up.

        Raises:
            GlowplugError: the model has no chat template, or one that does not compile.
        """
        source = card.chat_template
        if source is None:
            raise GlowplugError(
                ErrorCode.INVALID_REQUEST,
                f'model "{card.name}" has no chat template; send its prompt to /v1/completions instead',
                param="messages",
            )
        found = self._compiled.get(source)
        if found is None:
            if len(self._compiled) >= MAX_CACHED_TEMPLATES:
                self._compiled.pop(next(iter(self._compiled)))
            found = self._compiled[source] = _compile(source, card.name)
        return found

    def takes_tools(self, card: ModelCard) -> bool:
        """Whether the template of ``card`` does anything with tools; False where there is no usable template."""
        source = card.chat_template
        if source is None or "tools" not in source:
            return False
        found = self._takes_tools.get(source)
        if found is None:
            if len(self._takes_tools) >= MAX_CACHED_TEMPLATES:
                self._takes_tools.pop(next(iter(self._takes_tools)))
            found = self._takes_tools[source] = _reads_tools(source)
        return found

    def render(
        self, card: ModelCard, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        """The prompt text for ``messages``, ending where the assistant's answer begins.

        ``tools`` are function definitions, for templates that take them.

        Raises:
            GlowplugError: no template (400), the template refuses the messages (400), or it does not compile (500).
        """
        template = self.ensure_compiled(card)
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in template.generate(
                messages=list(messages),
                add_generation_prompt=True,
                bos_token=card.bos_token or "",
                eos_token=card.eos_token or "",
                tools=None if tools is None else list(tools),
                documents=None,
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise _refused(f"the rendered prompt is longer than {MAX_RENDERED_CHARS} characters")
        except GlowplugError:
            raise
        except Exception as error:  # templates are data: whatever they raise is about these messages, never a crash
            raise _refused(str(error)[:MAX_REASON_CHARS] or type(error).__name__) from error
        return "".join(pieces)


def _refused(reason: str) -> GlowplugError:
    message = f"messages: the model's chat template refuses them: {reason}"
    return GlowplugError(ErrorCode.INVALID_REQUEST, message, param="messages")


def _reads_tools(source: str) -> bool:
    from jinja2 import TemplateError, meta

    if len(source) > MAX_TEMPLATE_CHARS:
        return False
    try:
        return "tools" in meta.find_undeclared_variables(_environment().parse(source))
    except TemplateError:
        return False


def _compile(source: str, model: str) -> Template:
    from jinja2 import TemplateSyntaxError

    if len(source) > MAX_TEMPLATE_CHARS:
        reason = f"{len(source)} characters; at most {MAX_TEMPLATE_CHARS} are accepted"
        raise GlowplugError(ErrorCode.INTERNAL, f'the chat template of "{model}" is too long: {reason}')
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise GlowplugError(
            ErrorCode.INTERNAL,
            f'the chat template of "{model}" does not compile: line {error.lineno}: {error.message}; '
            "fix tokenizer_config.json and build the snapshot again",
        ) from error


@functools.cache
def _environment() -> Environment:
    """The one sandbox, made on first use. Costs Jinja's import, about 45 ms of CPU."""
    import jinja2
    from jinja2 import ext, nodes, parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(ext.Extension):
        """``{% generation %}`` marks the assistant's words for training; when serving it only passes them through."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

        def parse(self, parser: parser.Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return time.strftime(format)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
