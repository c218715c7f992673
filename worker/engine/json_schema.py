"""JSON schemas as they are given to ``llguidance``: gaps in its reading closed, endless answers bounded.

A prepared schema lets through nothing that the original does not, and leaves out a little that nobody misses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, Final

Schema = dict[str, Any]

#: Distance kept from an excluded number.
STEP: Final = 1e-6
#: Beyond, a float cannot hold a number and the step beside it.
LARGEST: Final = 1e9
#: What is written for a number with a bound on one side only ends here on the other.
LARGEST_UNASKED: Final = 1e18
#: Decimals of a number with bounds: a model that writes no end otherwise does not find one in 3.3333.
MAX_DECIMALS: Final = 6
#: A narrow range gets so many more that it has about a thousand values; llguidance cannot count in finer steps.
MAX_DECIMALS_OF_NARROW: Final = 10
#: Times a definition may occur within itself: a small model writes a linked list without end.
MAX_RECURSION: Final = 16

_SINGLE: Final = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames")
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def prepare_schema(source: str) -> str:
    """The JSON text of a schema with excluded ends of number ranges moved inside.

    llguidance 1.9 lets ``3`` through for ``{"exclusiveMinimum": 3, "maximum": 3.5}``, and digits that a reader's float
    rounds to the excluded end (``3.00000000000000002``). Such an end becomes an inclusive one, a millionth further in.
    Integers are left as they are.

    Raises:
        ValueError: not JSON.
    """
    schema = json.loads(source)
    for inner in _walk(schema):
        _close_bounds(inner)
    return json.dumps(schema)


def bound_answers(prepared: str) -> str:
    """The JSON text of a prepared schema whose answers end where the model finds no end: numbers with a bound have at
    most :data:`MAX_DECIMALS` decimals and 18 digits before them, a definition occurs in itself at most
    :data:`MAX_RECURSION` times.

    What has neither bounds nor recursion is left as it is: a number without bounds may be ``6e23``. The result may
    be unsatisfiable where the original is not; then the original is meant.
    """
    schema = json.loads(prepared)
    for inner in _walk(schema):
        _limit_digits(inner)
    if isinstance(schema, dict):
        for keyword in ("$defs", "definitions"):
            _limit_recursion(schema, keyword)
    return json.dumps(schema)


def _walk(schema: Any) -> Iterator[Schema]:
    """Every schema object in ``schema``, itself included; not the values in them, such as constants."""
    pending = [schema]
    while pending:
        found = pending.pop()
        if not isinstance(found, dict):
            continue
        yield found
        pending += [found[key] for key in _SINGLE if key in found]
        for key in _LISTS:
            pending += found[key] if isinstance(found.get(key), list) else []
        for key in _MAPS:
            pending += found[key].values() if isinstance(found.get(key), dict) else []


def _close_bounds(schema: Schema) -> None:
    if schema.get("type") == "integer":
        return
    minimum, maximum = _read(schema, "minimum"), _read(schema, "maximum")
    low, high = _read(schema, "exclusiveMinimum"), _read(schema, "exclusiveMaximum")
    start, end = low if minimum is None else minimum, high if maximum is None else maximum
    if low is not None and abs(low) < LARGEST and (end is None or low < end):
        inside = low + (STEP if end is None else min(STEP, (end - low) / 2))
        del schema["exclusiveMinimum"]
        schema["minimum"] = inside if minimum is None else max(inside, minimum)
    if high is not None and abs(high) < LARGEST and (start is None or start < high):
        inside = high - (STEP if start is None else min(STEP, (high - start) / 2))
        del schema["exclusiveMaximum"]
        schema["maximum"] = inside if maximum is None else min(inside, maximum)


def _limit_digits(schema: Schema) -> None:
    """Bound the digits of a number that has a bound; without one llguidance would read an exponent as well."""
    if schema.get("type") not in ("integer", "number") or not schema.keys().isdisjoint({"enum", "const", "multipleOf"}):
        return
    lows = [low for low in (_read(schema, "minimum"), _read(schema, "exclusiveMinimum")) if low is not None]
    highs = [high for high in (_read(schema, "maximum"), _read(schema, "exclusiveMaximum")) if high is not None]
    if any(abs(bound) >= LARGEST_UNASKED for bound in lows + highs) or not (lows or highs):
        return
    if not lows:
        schema["minimum"] = -LARGEST_UNASKED
    if not highs:
        schema["maximum"] = LARGEST_UNASKED
    if schema["type"] == "number":
        width = min(highs) - max(lows) if lows and highs else 1.0
        decimals = max(MAX_DECIMALS, math.ceil(3 - math.log10(width))) if width > 0 else MAX_DECIMALS
        if width > 0 and decimals <= MAX_DECIMALS_OF_NARROW:
            schema["multipleOf"] = float(f"1e-{decimals}")


def _limit_recursion(schema: Schema, keyword: str) -> None:
    """Replace definitions that occur in themselves by copies, each of which refers to the next; the last to nothing."""
    definitions = schema.get(keyword)
    if not isinstance(definitions, dict):
        return
    prefix = f"#/{keyword}/"
    direct = {name: {ref for ref in _refs(body, prefix) if ref in definitions} for name, body in definitions.items()}
    cycles = find_cycles(direct)
    bodies = {name: json.dumps(definitions[name]) for name in cycles}
    mark = "@"
    while any(mark in name for name in definitions):  # a copy must not take the name of another definition
        mark += "@"
    for name, cycle in cycles.items():
        for depth in range(MAX_RECURSION):
            copy = json.loads(bodies[name])
            for inner in _walk(copy):
                _point_deeper(inner, prefix, cycle, depth + 1, mark)
            definitions[_name_at(name, depth, mark)] = copy


def _name_at(name: str, depth: int, mark: str) -> str:
    return f"{name}{mark}{depth}" if depth else name


def _point_deeper(schema: Schema, prefix: str, cycle: set[str], depth: int, mark: str) -> None:
    """Make a reference to one of ``cycle`` one to its copy at ``depth``, or to nothing where there is none."""
    ref = schema.get("$ref")
    if not isinstance(ref, str) or ref.removeprefix(prefix) not in cycle:
        return
    if depth < MAX_RECURSION:
        schema["$ref"] = prefix + _name_at(ref.removeprefix(prefix), depth, mark)
        return
    schema.clear()
    schema["enum"] = []


def _refs(schema: Any, prefix: str) -> set[str]:
    refs = [inner.get("$ref") for inner in _walk(schema)]
    return {ref.removeprefix(prefix) for ref in refs if isinstance(ref, str) and ref.startswith(prefix)}


def find_cycles(direct: dict[str, set[str]]) -> dict[str, set[str]]:
    """Every name that refers to itself, by itself or through others, with all of its cycle: those that it reaches and
    that reach it. ``direct``: what each name refers to. O(names + references).

    Source: Tarjan 1972, "Depth-first search and linear graph algorithms"; without recursion, as a client writes it.
    """
    cycles: dict[str, set[str]] = {}
    order: dict[str, int] = {}  # by which names were first seen
    lowest: dict[str, int] = {}  # the earliest that is reached, of names whose cycle is not known yet
    open_names: list[str] = []
    for root in direct:
        path = [] if root in order else [(root, iter(direct[root]))]
        while path:
            name, references = path[-1]
            if name not in order:
                order[name] = lowest[name] = len(order)
                open_names.append(name)
            for other in references:
                if other not in order:
                    path.append((other, iter(direct[other])))
                    break
                if other in lowest:
                    lowest[name] = min(lowest[name], lowest[other])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[name])
                if lowest[name] == order[name]:
                    cycle: set[str] = set()
                    while name not in cycle:
                        cycle.add(open_names.pop())
                    for member in cycle:
                        del lowest[member]
                    if len(cycle) > 1 or name in direct[name]:
                        cycles.update(dict.fromkeys(cycle, cycle))
    return cycles


def _read(schema: Schema, keyword: str) -> float | None:
    value = schema.get(keyword)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
