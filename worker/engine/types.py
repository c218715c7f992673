"""What goes into and comes out of the engine thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduler.contract.errors import ErrorInfo
from scheduler.contract.messages import SamplingParams, TokenEvent, Usage
from scheduler.contract.states import Priority


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request handed to the engine.

    ``emitted`` holds, for each choice, the token ids that an earlier run already logged: they are replayed into KV
    cache and detokeniser without being emitted again, and sampling goes on at the next position.
    """

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    num_choices: int = 1
    priority: Priority = Priority.INTERACTIVE
    parse_special: bool = True
    add_special: bool = True  # False where the prompt's text already holds the begin-of-sequence token
    emitted: tuple[tuple[int, ...], ...] = ()
    tenant: str = ""  # keys and values are shared between requests of one tenant only


@dataclass(frozen=True, slots=True)
class EncodeRequest:
    """One request for vectors handed to the engine.

    ``emitted`` holds the token counts of inputs whose vectors an earlier run already logged; they are not encoded
    again. ``dimensions`` 0 means all.
    """

    request_id: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int = 0
    priority: Priority = Priority.INTERACTIVE
    parse_special: bool = True
    emitted: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A text to be tokenised, or token ids whose text is wanted. ``num_emitted`` token ids are logged already."""

    request_id: str
    given: str | tuple[int, ...]
    add_special: bool = True
    parse_special: bool = True
    num_emitted: int = 0


#: Whatever an engine is asked for.
AnyRequest = EngineRequest | EncodeRequest | TextRequest


@dataclass(frozen=True, slots=True)
class EncodedInput:
    """The vector of one input of a request, float32 little-endian."""

    index: int
    num_tokens: int
    vector: bytes


@dataclass(slots=True)
class RequestStep:
    """What one engine step did for one request.

    ``finished`` is set once, on the last one; then ``usage`` or ``error`` is final. ``marks`` (mono ns) holds
    TOKENISED, PREFILLED and SAMPLED of the first token on the step that produced it.
    """

    request_id: str
    events: list[TokenEvent] = field(default_factory=list)
    vectors: list[EncodedInput] = field(default_factory=list)
    sampled_mono_ns: int = 0
    marks: dict[str, int] = field(default_factory=dict)
    finished: bool = False
    usage: Usage = field(default_factory=Usage)
    error: ErrorInfo | None = None
