"""Reading the fields of a JSON request body: strict types, explicit ranges, errors that name the field.

``null`` means absent, as OpenAI's clients send it. Nothing is converted and nothing is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from scheduler.gateway.errors import bad_field

JSON_TYPES: Final[dict[type, str]] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def json_type(value: object) -> str:
    """The JSON name of a decoded value's type, with its article."""
    return JSON_TYPES.get(type(value), type(value).__name__)


class FieldReader:
    """One JSON object whose fields are asked for by name.

    Every method but :meth:`raw` raises ``GlowplugError`` (400) that names the field.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def raw(self, name: str) -> Any:
        """The decoded value as it is; None when absent or null."""
        return self._body.get(name)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad_field(name, f"expected a boolean, got {json_type(value)}")
        return value

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        """An integer in [low, high], or None when absent."""
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise bad_field(name, f"expected an integer, got {json_type(value)}")
        if not low <= value <= high:
            raise bad_field(name, f"{value} is out of range; expected {low} to {high}")
        return value

    def number(self, name: str, *, default: float, low: float, high: float, above_low: bool = False) -> float:
        """A finite number in [low, high], or in (low, high] with ``above_low``."""
        value = self._body.get(name)
        if value is None:
            return default
        return check_number(name, value, low=low, high=high, above_low=above_low)

    def string(self, name: str, *, max_chars: int) -> str | None:
        """A string of at most ``max_chars`` characters, or None when absent."""
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise bad_field(name, f"expected a string, got {json_type(value)}")
        if len(value) > max_chars:
            raise bad_field(name, f"{len(value)} characters; at most {max_chars} are accepted")
        return value

    def one_of(self, name: str, allowed: tuple[str, ...], *, default: str) -> str:
        """One of a few words."""
        value = self._body.get(name)
        if value is None:
            return default
        if value not in allowed:
            seen = f'"{value[:40]}"' if isinstance(value, str) else json_type(value)
            raise bad_field(name, f"expected {' or '.join(allowed)}, got {seen}")
        return str(value)

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object, or None when absent."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, dict):
            raise bad_field(name, f"expected an object, got {json_type(value)}")
        return value


def check_number(name: str, value: object, *, low: float, high: float, above_low: bool = False) -> float:
    """``value`` as a float in range.

    Raises:
        GlowplugError: not a finite number, or out of range; names ``name``.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise bad_field(name, f"expected a number, got {json_type(value)}")
    if not math.isfinite(value) or not low <= value <= high or (above_low and value == low):
        wanted = f"above {low:g} and up to {high:g}" if above_low else f"{low:g} to {high:g}"
        raise bad_field(name, f"{value:g} is out of range; expected {wanted}")
    return float(value)
