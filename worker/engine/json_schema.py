"""JSON schemas as they are given to ``llguidance``, where its reading of them has a gap that must be closed."""

from __future__ import annotations

import json
from typing import Any, Final

#: Distance kept from an excluded integer.
STEP: Final = 1e-6
#: Beyond, a float cannot hold an integer and the step beside it.
LARGEST: Final = 1e9
VALUES: Final = frozenset({"const", "enum", "default", "examples"})  # keywords that hold values, not schemas


def prepare_schema(source: str) -> str:
    """The JSON text of a schema, with excluded ends of number ranges moved inside.

    llguidance 1.9 lets ``3`` through for ``{"exclusiveMinimum": 3, "maximum": 3.5}``, and digits that a reader's float
    rounds to the excluded end (``3.00000000000000002``). Such an end becomes an inclusive one, a millionth further in.
    Integers are left as they are.

    Raises:
        ValueError: not JSON.
    """
    schema = json.loads(source)
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            _close_bounds(value)
            pending += [inner for key, inner in value.items() if key not in VALUES]
    return json.dumps(schema)


def _close_bounds(schema: dict[str, Any]) -> None:
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


def _read(schema: dict[str, Any], keyword: str) -> float | None:
    value = schema.get(keyword)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
