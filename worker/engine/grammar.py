"""Structured output: text that matches a JSON schema, a regular expression or a Lark grammar, token by token.

``llguidance`` compiles grammars and computes which tokens may come next. It is imported by the first request that asks
for a grammar (6 ms in a worker) and never on the way of a wake. Two threads of our own work beside the engine's: one
compiles, one computes the masks of the next tokens while the device runs the step whose logits they apply to.

A mask allows end-of-sequence tokens only where the text may end. Once nothing may follow, the choice is finished: no
step is spent on the end token.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import OutputGrammar
from scheduler.contract.states import GrammarKind
from worker.engine.grammar_vocabulary import GrammarVocabulary
from worker.engine.json_schema import bound_answers, prepare_schema
from worker.engine.text import TextModel

if TYPE_CHECKING:  # imported by the first request that needs it
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance._lib import JsonCompileOptions  # only its stub has the name

TokenMask = npt.NDArray[np.uint32]  # [ceil(V / 32)]

MAX_SOURCE_BYTES: Final = 64 * 1024
MAX_CACHED_GRAMMARS: Final = 32
MAX_MESSAGE_CHARS: Final = 400
#: Between tokens of JSON: what people write, but no endless run of blanks, into which small models fall.
JSON_WHITESPACE: Final = r"[ ]?|\n[ ]{0,32}"
#: Work of one compilation and of one mask; about 20 ms and 15 ms at the most.
INITIAL_LEXER_FUEL: Final = 1_000_000
STEP_LEXER_FUEL: Final = 200_000
STEP_MAX_ITEMS: Final = 50_000
MAX_LEXER_STATES: Final = 50_000
MAX_GRAMMAR_SYMBOLS: Final = 200_000


class GrammarMatcher:
    """Where one choice stands in its grammar. One thread at a time: the engine's, or the mask thread's for a step."""

    def __init__(self, matcher: LLMatcher, num_words: int, eos_token_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._num_words = num_words
        self._eos = frozenset(eos_token_ids)

    @property
    def is_complete(self) -> bool:
        """The text matches and nothing can follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def accept(self, token_id: int) -> None:
        """Advance by a token: sampled now, or replayed from an earlier run.

        Raises:
            GlowplugError: the grammar does not allow it here, or has become too complex.
        """
        if not self._matcher.consume_token(token_id):
            raise self._refusal()

    def compute_masks(self, drafted: Sequence[int] = ()) -> list[TokenMask]:
        """What may come next, and what behind each of ``drafted`` as far as the grammar lets them. The matcher stays
        where it is. 10 us for the common mask, 0.5 ms at the 99th percentile of JSON.

        Raises:
            GlowplugError: the grammar has become too complex.
        """
        masks = [self._compute_mask()]
        num_ahead = 0
        for token_id in drafted:
            if token_id in self._eos or self.is_complete or not self._matcher.try_consume_tokens([token_id]):
                break
            num_ahead += 1
            masks.append(self._compute_mask())
        if num_ahead:
            self._matcher.rollback(num_ahead)
        return masks

    def _compute_mask(self) -> TokenMask:
        mask = np.zeros(self._num_words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise self._refusal()
        return mask

    def _refusal(self) -> GlowplugError:
        return _refuse(f"the output grammar cannot go on: {self._matcher.get_error()}")


class Grammars:
    """Compiled grammars of one model, and the threads that work on them. Engine thread only, but for the futures.

    ``open_text`` opens a guest instance for the grammar threads; it is called once, by the first compilation that gets
    so far.
    """

    def __init__(
        self, open_text: Callable[[], TextModel] | None, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._open_text = open_text
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._lock = threading.Lock()  # of the cache: looked up by the engine, written by the compiler
        self._compiled: OrderedDict[OutputGrammar, LLMatcher] = OrderedDict()
        self._text: TextModel | None = None  # written by the compiling thread, as the next
        self._tokenizer: LLTokenizer | None = None
        self._compiler = ThreadPoolExecutor(1, "grammar-compile")  # starts no thread before it is used
        self._masks = ThreadPoolExecutor(1, "grammar-masks")

    def compile(self, grammar: OutputGrammar) -> Future[LLMatcher]:
        """Make :meth:`open_matcher` work for ``grammar``, off this thread. The future raises GlowplugError
        (INVALID_REQUEST, param ``response_format``) where it cannot be enforced, GuestError where the guest failed.
        """
        found = self._find(grammar)
        if found is None:
            return self._compiler.submit(self._compile, grammar)
        done: Future[LLMatcher] = Future()
        done.set_result(found)
        return done

    def open_matcher(self, grammar: OutputGrammar) -> GrammarMatcher:
        """A matcher at the beginning of ``grammar``. Compiles here if the cache has dropped it.

        Raises:
            GlowplugError: see :meth:`compile`.
        """
        template = self._find(grammar) or self._compile(grammar)
        return GrammarMatcher(template.deep_copy(), -(-self._vocab_size // 32), self._eos)

    def begin_masks(
        self, wanted: Sequence[tuple[GrammarMatcher, Sequence[int]]]
    ) -> Future[list[list[TokenMask] | Exception]]:
        """Compute masks of matchers, each with its drafted tokens, on the mask thread; see
        :meth:`GrammarMatcher.compute_masks`. The matchers must be left alone until the future is done."""
        return self._masks.submit(_compute_all, tuple(wanted))

    def close(self) -> None:
        """End the threads; what they were asked before is not waited for. Idempotent."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masks.shutdown(wait=False, cancel_futures=True)

    def _find(self, grammar: OutputGrammar) -> LLMatcher | None:
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
            return found

    def _compile(self, grammar: OutputGrammar) -> LLMatcher:
        from llguidance import LLMatcher, LLTokenizer

        if len(grammar.source.encode()) > MAX_SOURCE_BYTES:
            raise _refuse(f"the output grammar has more than {MAX_SOURCE_BYTES} bytes; make it smaller")
        if self._tokenizer is None:
            if self._open_text is None or not self._eos:
                raise _refuse("this model has no text or no end token: its output cannot be held to a grammar")
            self._text = self._text or self._open_text()
            vocabulary = GrammarVocabulary(self._text, self._vocab_size, self._eos)
            # Without slices it is built in half the time (50 ms, in which the GIL is held) and masks take as long.
            self._tokenizer = LLTokenizer(vocabulary, self._vocab_size, list(self._eos), [])  # type: ignore[arg-type]  # by attributes
        try:
            sources = _translate(grammar)
        except (ValueError, RecursionError) as error:
            raise _refuse(f"the output grammar does not parse: {error}") from None
        except OverflowError:
            raise _refuse(f"the output grammar has a number beyond {sys.float_info.max:.2g}") from None
        for source in sources:
            matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_make_limits())
            if not matcher.is_error():
                break
        else:
            raise _refuse(f"the output grammar cannot be enforced: {matcher.get_error()}")
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return matcher


def _compute_all(wanted: tuple[tuple[GrammarMatcher, Sequence[int]], ...]) -> list[list[TokenMask] | Exception]:
    computed: list[list[TokenMask] | Exception] = []
    for matcher, drafted in wanted:
        try:
            computed.append(matcher.compute_masks(drafted))
        except Exception as error:  # one request's failure must not reach the others: the engine ends that one
            computed.append(error)
    return computed


def _translate(grammar: OutputGrammar) -> list[str]:
    """What to compile: the first that can be enforced is meant."""
    from llguidance import LLMatcher

    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            defaults: JsonCompileOptions = {"whitespace_pattern": JSON_WHITESPACE}
            prepared = prepare_schema(grammar.source)
            # A schema may bring options of its own (``x-guidance``), but not the one that ignores keywords.
            return [
                LLMatcher.grammar_from_json_schema(schema, defaults, {"lenient": False})
                for schema in dict.fromkeys((bound_answers(prepared), prepared))
            ]
        case GrammarKind.REGEX:
            return [LLMatcher.grammar_from_regex(grammar.source)]
        case GrammarKind.LARK:
            return [LLMatcher.grammar_from_lark(grammar.source)]


def _make_limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=INITIAL_LEXER_FUEL,
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_MAX_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SYMBOLS,
        verbose_errors=False,
    )


def _refuse(message: str) -> GlowplugError:
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[:MAX_MESSAGE_CHARS] + "..."
    return GlowplugError(ErrorCode.INVALID_REQUEST, message, param="response_format")
