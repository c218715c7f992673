"""Output grammars over a vocabulary of bytes and some words: masks, ends, limits, and schemas that are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from guests.errors import GuestContractError, GuestTrap
from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import OutputGrammar
from scheduler.contract.states import GrammarKind
from scheduler.gateway.tool_styles import ToolStyle, begins_unlike_calls, build_call_grammar
from worker.backends.host_sampling import list_allowed
from worker.benchmarks.schema_generator import generate_schema
from worker.engine.grammar import MAX_CACHED_GRAMMARS, MAX_SOURCE_BYTES, GrammarMatcher, Grammars
from worker.engine.grammar_vocabulary import GrammarVocabulary
from worker.engine.json_schema import MAX_DECIMALS, MAX_RECURSION, bound_answers, find_cycles, prepare_schema

EOS = 256
WORDS = [b"<eos>", b"<|user|>", b"true", b"false", b'":', b'", "', b"12", b"name", "größe".encode(), b"  "]
VOCAB = 256 + len(WORDS) + 5  # models round their vocabulary up


@dataclass
class WordText:
    """A tokeniser of 256 bytes, two special tokens, and words; text goes to single bytes. Counts its callers."""

    fails: bool = False
    num_tokenized: int = 0

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= 256 + len(WORDS):
            raise GuestContractError("gp_token_bytes failed")
        return bytes([token_id]) if token_id < 256 else WORDS[token_id - 256]

    def detokenize(self, token_ids: list[int], *, show_special: bool = False) -> str:
        shown = [token_id for token_id in token_ids if show_special or token_id not in (256, 257)]
        return b"".join(map(self.token_bytes, shown)).decode(errors="replace")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        self.num_tokenized += 1
        if self.fails:
            raise GuestTrap("unreachable executed")
        return list(text.encode())

    def open_sequence(
        self, stop: tuple[str, ...], *, ignore_stop_tokens: bool = False, keep_leading_space: bool = False
    ) -> Any:
        raise NotImplementedError("a grammar opens no sequence")


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    """Grammars over :class:`WordText`."""
    opened = Grammars(WordText, VOCAB, (EOS,))
    yield opened
    opened.close()


def by_schema(schema: Any) -> OutputGrammar:
    return OutputGrammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def regex(pattern: str) -> OutputGrammar:
    return OutputGrammar(GrammarKind.REGEX, pattern)


def open_matcher(grammars: Grammars, grammar: OutputGrammar) -> GrammarMatcher:
    grammars.compile(grammar).result(30)
    return grammars.open_matcher(grammar)


def allowed(matcher: GrammarMatcher) -> list[int]:
    return [int(token) for token in list_allowed(matcher.compute_masks()[0], VOCAB)]


def spell(text: str) -> list[int]:
    return list(text.encode())


def test_end_is_allowed_exactly_where_the_text_may_end(grammars: Grammars) -> None:
    """The end token is in the mask in accepting states only; what nothing can follow is complete without it."""
    matcher = open_matcher(grammars, regex("ab?|abcd"))
    assert allowed(matcher) == spell("a")
    matcher.accept(ord("a"))
    assert sorted(allowed(matcher)) == [ord("b"), EOS]
    matcher.accept(ord("b"))
    assert sorted(allowed(matcher)) == [ord("c"), EOS]
    matcher.accept(ord("c"))
    assert allowed(matcher) == spell("d")
    assert not matcher.is_complete
    matcher.accept(ord("d"))
    assert matcher.is_complete


@pytest.mark.parametrize("style", [ToolStyle.HERMES, ToolStyle.MISTRAL])
def test_calls_or_an_answer_of_a_schema(grammars: Grammars, style: ToolStyle) -> None:
    """Beside tools, ``response_format`` holds for what is no call: both texts fit, one that is neither does not."""
    answer = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    source = build_call_grammar(style, {"stop": {}}, several=True, answer=answer)
    call = f'{{"name": "stop", "{style.arguments_key}": {{}}}}'
    wrapped = {
        ToolStyle.HERMES: f"<tool_call>\n{call}\n</tool_call>",
        ToolStyle.MISTRAL: f"[{call}]",
    }
    assert begins_unlike_calls(style, answer)
    for text, fits in ((wrapped[style], True), ('{"n": 7}', True), ('{"m"', False), ("Hello", False)):
        matcher = open_matcher(grammars, OutputGrammar(GrammarKind.LARK, source))
        fitted = 0
        for token in spell(text):
            if token not in allowed(matcher):
                break
            matcher.accept(token)
            fitted += 1
        assert (fitted == len(text)) == fits, text
        assert not fits or EOS in allowed(matcher)


def test_tokens_of_several_characters_are_allowed_where_they_fit(grammars: Grammars) -> None:
    """A word token is in the mask wherever its bytes may follow; special tokens never are, whatever their text."""
    found = allowed(open_matcher(grammars, by_schema({"enum": [True, "12"]})))
    assert {WORDS.index(b"true") + 256, ord("t"), ord('"')} <= set(found)
    anything = allowed(open_matcher(grammars, regex("[^a]+")))
    assert 257 not in anything
    assert all(token < 256 + len(WORDS) for token in anything)


def test_masks_behind_drafted_tokens_leave_the_matcher_where_it_was(grammars: Grammars) -> None:
    """One mask more for every drafted token that the grammar lets through; an end token ends the draft."""
    matcher = open_matcher(grammars, regex("[ab]{2}c+"))
    masks = matcher.compute_masks(spell("abxb"))
    assert [list(list_allowed(mask, VOCAB)) for mask in masks] == [spell("ab"), spell("ab"), spell("c")]
    assert allowed(matcher) == spell("ab")
    for token in spell("aac"):
        matcher.accept(token)
    assert len(matcher.compute_masks([EOS, EOS])) == 1
    assert len(matcher.compute_masks(spell("cc"))) == 3
    assert sorted(allowed(matcher)) == [ord("c"), EOS]


def test_choices_of_a_request_advance_apart(grammars: Grammars) -> None:
    """Each matcher has its own state, though one grammar was compiled."""
    grammar = regex("ab|cd")
    first, second = open_matcher(grammars, grammar), grammars.open_matcher(grammar)
    first.accept(ord("a"))
    assert allowed(first) == spell("b")
    assert sorted(allowed(second)) == spell("ac")


def test_a_token_that_the_grammar_forbids_is_an_error(grammars: Grammars) -> None:
    """As may come from the log of a run under another grammar: the request ends, and says why."""
    matcher = open_matcher(grammars, regex("ab"))
    with pytest.raises(GlowplugError) as caught:
        matcher.accept(ord("x"))
    assert caught.value.info.param == "response_format"


def test_masks_of_a_batch_come_from_the_mask_thread(grammars: Grammars) -> None:
    """All matchers of a step in one call; one that fails does not take the others with it."""
    matchers = [open_matcher(grammars, regex(pattern)) for pattern in ("ab", "cd")]
    broken = open_matcher(grammars, regex("ef"))
    with pytest.raises(GlowplugError):
        broken.accept(ord("x"))
    first, failed, second = grammars.begin_masks([(matchers[0], ()), (broken, ()), (matchers[1], spell("c"))]).result(
        30
    )
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert list(list_allowed(first[0], VOCAB)) == spell("a")
    assert [list(list_allowed(mask, VOCAB)) for mask in second] == [spell("c"), spell("d")]
    assert isinstance(failed, GlowplugError)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (by_schema({"not": {"type": "string"}}), "not"),
        (by_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (by_schema({"x-guidance": {"lenient": True}, "unevaluatedProperties": False}), "unevaluated"),
        (by_schema({"$ref": "#/nowhere"}), "/nowhere"),
        (by_schema({"$ref": "http://example.com/schema"}), "example.com"),
        (by_schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (by_schema({"type": "integer", "minimum": 2, "maximum": 1}), "minimum"),
        (OutputGrammar(GrammarKind.JSON_SCHEMA, "{"), "parse"),
        (by_schema({"type": "number", "exclusiveMinimum": 0, "maximum": 10**400}), "number"),
        (by_schema({"type": "number", "minimum": -(10**400), "exclusiveMaximum": 0}), "number"),
        (OutputGrammar(GrammarKind.JSON_SCHEMA, "[]"), "object"),
        (regex("(a"), "unclosed"),
        (OutputGrammar(GrammarKind.LARK, "start: nowhere"), "nowhere"),
        (regex("a" * (MAX_SOURCE_BYTES + 1)), "bytes"),
    ],
)
def test_a_grammar_that_cannot_be_enforced_names_the_reason(
    grammars: Grammars, grammar: OutputGrammar, words: str
) -> None:
    """INVALID_REQUEST for response_format, with the keyword or the limit in its message, never a lenient reading."""
    with pytest.raises(GlowplugError) as caught:
        grammars.compile(grammar).result(60)
    info = caught.value.info
    assert (info.code, info.param) == (ErrorCode.INVALID_REQUEST, "response_format")
    assert words in info.message
    assert len(info.message) < 1000


def test_compiled_grammars_are_kept_up_to_a_number() -> None:
    """A grammar in use again is not compiled again; the oldest goes when there are too many, and still opens."""
    own = Grammars(WordText, VOCAB, (EOS,))
    patterns = [regex(f"a{{{i}}}b") for i in range(1, MAX_CACHED_GRAMMARS + 2)]
    for grammar in patterns:
        own.compile(grammar).result(30)
    assert own.compile(patterns[-1]).done()
    assert len(own._compiled) == MAX_CACHED_GRAMMARS
    assert patterns[0] not in own._compiled
    assert allowed(own.open_matcher(patterns[0])) == spell("a")
    own.close()


def test_a_guest_that_cannot_tell_its_vocabulary_is_opened_once() -> None:
    """Each request that asks for a grammar fails with the guest's error, and leaves no instance behind."""

    class Broken(WordText):
        def token_bytes(self, token_id: int) -> bytes:
            raise GuestTrap("unreachable executed")

    opened: list[WordText] = []

    def open_text() -> WordText:
        opened.append(Broken())
        return opened[-1]

    own = Grammars(open_text, VOCAB, (EOS,))
    for _ in range(3):
        with pytest.raises(GuestTrap):
            own.compile(regex("a")).result(30)
    assert len(opened) == 1
    own.close()


def test_vocabulary_is_asked_from_the_guest() -> None:
    """Bytes of every token, special tokens found by what detokenising hides, forced text as the guest splits it."""
    text = WordText()
    vocabulary = GrammarVocabulary(text, VOCAB, (EOS,))
    assert vocabulary.tokens[256:260] == WORDS[:4]
    assert vocabulary.tokens[-5:] == [b""] * 5
    assert vocabulary.special_token_ids == [256, 257]
    assert vocabulary("true") == spell("true")
    assert text.num_tokenized == 1
    text.fails = True
    assert vocabulary('name": true') == [*[WORDS.index(word) + 256 for word in (b"name", b'":')], 32, 258]
    assert vocabulary(b"\xff12") == [255, WORDS.index(b"12") + 256]


def answer(grammars: Grammars, grammar: OutputGrammar, rng: random.Random, max_tokens: int = 3_000) -> str | None:
    """A random text that the masks allow, or None where it did not end."""
    matcher, tokens = open_matcher(grammars, grammar), bytearray()
    for _ in range(max_tokens):
        if matcher.is_complete:
            return tokens.decode()
        token = rng.choice(allowed(matcher))
        if token == EOS:
            return tokens.decode()
        matcher.accept(token)
        tokens += WordText().token_bytes(token)
    return None


def test_random_texts_of_generated_schemas_validate(grammars: Grammars) -> None:
    """Sixty schemas, three random texts each: whatever the masks let through is JSON that validates."""
    rng = random.Random(7)
    num_validated = 0
    for seed in range(60):
        schema = generate_schema(1_000 + seed)
        for _ in range(3):
            text = answer(grammars, by_schema(schema), rng)
            if text is not None:
                Draft202012Validator(schema).validate(json.loads(text))
                num_validated += 1
    assert num_validated >= 175  # a recursion may run on, but not in every text


bounds = st.integers(-4, 4).map(float) | st.sampled_from([-1.5, 0.25, 0.5, 2.5, 3])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["minimum", "exclusiveMinimum"]), st.sampled_from(["maximum", "exclusiveMaximum"]), bounds, bounds
)
def test_numbers_stay_inside_their_bounds(
    grammars: Grammars, low_key: str, high_key: str, low: float, span: float
) -> None:
    """Whole numbers at excluded ends included, which the library would let through in short ranges."""
    schema = {"type": "number", low_key: low, high_key: low + abs(span) / 2}
    try:
        matcher = open_matcher(grammars, by_schema(schema))
    except GlowplugError:
        return  # an empty range is refused
    for value in {low, low + abs(span) / 2, float(int(low)), float(int(low) + 1)}:
        for text in {repr(value), str(int(value)) if value == int(value) else repr(value)}:
            trial = grammars.open_matcher(by_schema(schema))
            try:
                for token in spell(text):
                    trial.accept(token)
            except GlowplugError:
                continue
            if trial.is_complete or EOS in allowed(trial):
                Draft202012Validator(schema).validate(json.loads(text))
    assert allowed(matcher)


def test_only_excluded_ends_of_numbers_are_rewritten() -> None:
    """All other schemas pass as they are, and so do values that look like schemas."""
    for kept in (
        {"type": "integer", "exclusiveMinimum": 3, "maximum": 4},
        {"minimum": 3, "maximum": 3.5},
        {"const": {"exclusiveMinimum": 3, "maximum": 3.5}},
        {"enum": [{"exclusiveMinimum": 3, "maximum": 3.5}]},
        {"properties": {"exclusiveMinimum": {"type": "null"}, "maximum": {"type": "number"}}},
        {"exclusiveMinimum": True, "maximum": 3.5},
    ):
        assert json.loads(prepare_schema(json.dumps(kept))) == kept
    named = {"properties": {"default": {"exclusiveMinimum": 3, "maximum": 3.5}}}  # a property, not a value
    assert json.loads(prepare_schema(json.dumps(named)))["properties"]["default"]["minimum"] == 3.000001
    assert json.loads(prepare_schema('{"exclusiveMaximum": 2}')) == {"maximum": 2 - 1e-6}
    moved = json.loads(prepare_schema('{"items": [{"exclusiveMinimum": 3, "maximum": 3.5, "type": "number"}]}'))
    assert moved == {"items": [{"minimum": 3.000001, "maximum": 3.5, "type": "number"}]}


def takes(grammars: Grammars, schema: dict[str, Any], text: str) -> bool:
    """Whether ``text`` is a whole answer."""
    matcher = open_matcher(grammars, by_schema(schema))
    try:
        for token in spell(text):
            matcher.accept(token)
    except GlowplugError:
        return False
    return matcher.is_complete or EOS in allowed(matcher)


@pytest.mark.parametrize(
    ("schema", "taken", "refused"),
    [
        ({"type": "number", "minimum": 0, "maximum": 4}, "3.141592", "3.1415926"),
        ({"type": "number", "minimum": 0}, "12.5", "12." + "0" * (MAX_DECIMALS + 1)),
        ({"type": "number", "maximum": 3e-7, "minimum": 1e-7}, "0.0000002", "0.000000212345"),
        ({"type": "integer", "minimum": 5}, "9" * 18, "9" * 20),
        ({"type": "number"}, "6.02214076e23", "6e"),
    ],
)
def test_numbers_with_a_bound_have_an_end(grammars: Grammars, schema: dict[str, Any], taken: str, refused: str) -> None:
    """A small model that writes 3.3333 would go on to its last token; without bounds every notation is open."""
    assert takes(grammars, schema, taken)
    assert not takes(grammars, schema, refused)


def make_chain(length: int) -> str:
    """A linked list of ``length`` elements."""
    return '{"v":1,"next":' * length + "null" + "}" * length


def test_a_recursion_has_an_end(grammars: Grammars) -> None:
    """A list of the greatest length is an answer, a longer one is not."""
    link = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    node = {"type": "object", "properties": {"v": {"const": 1}, "next": link}, "required": ["v", "next"]}
    schema = {"$ref": "#/$defs/node", "$defs": {"node": {**node, "additionalProperties": False}}}
    assert takes(grammars, schema, make_chain(MAX_RECURSION))
    assert not takes(grammars, schema, make_chain(MAX_RECURSION + 1))


def test_a_copy_of_a_recursive_definition_takes_no_others_name(grammars: Grammars) -> None:
    """A definition that is called like the first copy stays what it is, and so does what refers to it."""
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
    schema = {
        "type": "array",
        "prefixItems": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/node@1"}],
        "items": False,
        "$defs": {"node": node, "node@1": {"type": "boolean"}},
    }
    assert takes(grammars, schema, '[{"next":{"next":{}}},true]')
    assert not takes(grammars, schema, '[{"next":{"next":{}}},{}]')


@given(st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=8))
def test_definitions_that_reach_each_other_are_found(references: list[list[int]]) -> None:
    """Against every path looked for one by one; a definition alone counts where it refers to itself."""
    direct = {str(i): {str(ref) for ref in refs if ref < len(references)} for i, refs in enumerate(references)}

    def reach(name: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        for other in direct[name] - seen:
            seen = reach(other, seen | {other})
        return seen

    expected = {name: {other for other in reach(name) if name in reach(other)} for name in direct}
    assert find_cycles(direct) == {name: cycle for name, cycle in expected.items() if cycle}


def test_a_long_cycle_of_definitions_is_found_in_one_pass() -> None:
    """As many as fit a grammar of the greatest size: each is looked at once, by no recursion of our own."""
    names = [f"{i:x}" for i in range(2_400)]
    direct = {name: {names[(i + 1) % len(names)]} for i, name in enumerate(names)}
    cycles = find_cycles(direct)
    assert cycles.keys() == direct.keys()
    assert len({id(cycle) for cycle in cycles.values()}) == 1


def test_where_bounds_leave_no_answer_the_schema_is_taken_as_it_is(grammars: Grammars) -> None:
    """Two definitions that need each other: the innermost would need one that is not there."""
    both = {"anyOf": [{"const": 1}, {"$ref": "#/$defs/sum"}]}
    sum_of = {"type": "object", "properties": {"of": {"$ref": "#/$defs/value"}}, "required": ["of"]}
    schema = {"$ref": "#/$defs/value", "$defs": {"value": both, "sum": {**sum_of, "additionalProperties": False}}}
    assert takes(grammars, schema, '{"of":' * 40 + "1" + "}" * 40)


def test_what_has_no_bounds_and_no_recursion_stays_as_it_is() -> None:
    """References that are not recursive, values, and types without bounds included."""
    kept = {
        "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"type": ["number", "null"], "minimum": 1}},
        "$defs": {"a": {"enum": [{"type": "number", "minimum": 0}]}, "b": {"$ref": "#/$defs/a"}},
        "items": {"type": "number"},
    }
    assert json.loads(bound_answers(json.dumps(kept))) == kept
