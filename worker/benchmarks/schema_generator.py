"""JSON schemas from a seed: what structured output is tried on. Deterministic; ends by bounds, not by luck."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

Schema = dict[str, Any]

WORDS: Final = ("name", "age", "city", "tags", "score", "items", "id", "größe", "is open", "x", "kind", "next")
PATTERNS: Final = ("^[a-z]{1,8}$", "^[A-Z]{2}-[0-9]{3,5}$", "^(red|green|blue)$", r"^\d{4}/\d{2}$", "^[^\\s]{1,6}$")
FORMATS: Final = ("date", "time", "date-time", "uuid", "ipv4")
MAX_DEPTH: Final = 3


def generate_schema(seed: int) -> Schema:
    """A schema whose every instance has bounded length: an object at the top, as ``response_format`` is used.

    Over the seeds there are nested objects with required and optional properties, arrays and tuples with bounds,
    enums and constants, numbers with inclusive and exclusive bounds, strings with lengths, patterns and formats,
    alternatives, type lists, references to definitions, and recursion that a bound or an option ends.
    """
    return _Generator(random.Random(seed)).generate()


class _Generator:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._definitions: dict[str, Schema] = {}

    def generate(self) -> Schema:
        schema = self._object(0)
        if self._definitions:
            schema["$defs"] = self._definitions
        return schema

    def _any(self, depth: int) -> Schema:
        simple: list[Callable[[int], Schema]] = [
            self._string,
            self._integer,
            self._number,
            self._enum,
            self._constant,
            self._type_list,
        ]
        nested = [self._object, self._array, self._tuple, self._any_of, self._reference, self._recursion]
        return self._rng.choice(simple if depth >= MAX_DEPTH else simple + nested)(depth)

    def _object(self, depth: int) -> Schema:
        names = self._rng.sample(WORDS, self._rng.randint(1, 4))
        required = [name for name in names if self._rng.random() < 0.6]
        properties = {name: self._any(depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _array(self, depth: int) -> Schema:
        low = self._rng.randint(0, 2)
        return {
            "type": "array",
            "items": self._any(depth + 1),
            "minItems": low,
            "maxItems": low + self._rng.randint(0, 2),
        }

    def _tuple(self, depth: int) -> Schema:
        elements = [self._any(depth + 1) for _ in range(self._rng.randint(1, 3))]
        return {"type": "array", "prefixItems": elements, "items": False, "minItems": len(elements)}

    def _string(self, _: int) -> Schema:
        match self._rng.randrange(3):
            case 0:
                low = self._rng.randint(0, 4)
                return {"type": "string", "minLength": low, "maxLength": low + self._rng.randint(0, 12)}
            case 1:
                return {"type": "string", "pattern": self._rng.choice(PATTERNS)}
            case _:
                return {"type": "string", "format": self._rng.choice(FORMATS)}

    def _integer(self, _: int) -> Schema:
        low = self._rng.randint(-1000, 1000)
        high = low + self._rng.choice([0, 1, 7, 99, 12345])
        end = {"exclusiveMaximum": high + 1} if self._rng.random() < 0.3 else {"maximum": high}
        return {"type": "integer", "minimum": low, **end}

    def _number(self, _: int) -> Schema:
        low = self._rng.randint(-50, 50) / 4
        bound = self._rng.choice(["minimum", "exclusiveMinimum"])
        return {"type": "number", bound: low, "maximum": low + self._rng.choice([0.5, 3, 1000])}

    def _enum(self, _: int) -> Schema:
        values = ["red", "grün", 'a "quoted" one', 1, -2.5, True, None, ["x", 1]]
        return {"enum": self._rng.sample(values, self._rng.randint(1, 4))}

    def _constant(self, _: int) -> Schema:
        return {"const": self._rng.choice(["fixed", 42, False, None, {"a": [1, 2]}])}

    def _type_list(self, _: int) -> Schema:
        return {"type": self._rng.sample(["boolean", "null"], self._rng.randint(1, 2))}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth + 1) for _ in range(self._rng.randint(2, 3))]}

    def _reference(self, depth: int) -> Schema:
        name = f"d{len(self._definitions)}"
        self._definitions[name] = {}  # its place, so that definitions inside get other names
        self._definitions[name] = self._any(depth + 1)
        return {"$ref": f"#/$defs/{name}"}

    def _recursion(self, _: int) -> Schema:
        """A chain that any link may end."""
        name = f"d{len(self._definitions)}"
        following = {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}
        value = self._integer(MAX_DEPTH)
        self._definitions[name] = {
            "type": "object",
            "properties": {"value": value, "next": following},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        return {"$ref": f"#/$defs/{name}"}
