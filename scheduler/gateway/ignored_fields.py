"""Fields of OpenAI's that change nothing here: their form is checked, then they are forgotten.

A client learns of a wrong ``metadata`` here as it would there. ``store: true`` is accepted and nothing is stored: the
answer is the same. Fields that would change the answer are refused.
"""

from __future__ import annotations

from typing import Final

from scheduler.gateway.errors import bad_field
from scheduler.gateway.field_reader import FieldReader, json_type

MAX_METADATA_KEYS: Final = 16
MAX_METADATA_KEY_CHARS: Final = 64
MAX_METADATA_VALUE_CHARS: Final = 512
MAX_LABEL_CHARS: Final = 512
LABELS: Final = ("service_tier", "safety_identifier", "prompt_cache_key", "verbosity", "reasoning_effort")


def check_ignored_fields(reader: FieldReader) -> None:
    """
    Raises:
        GlowplugError: one has a wrong form, or asks for what changes the answer (audio); names it.
    """
    read_metadata(reader)
    reader.boolean("store", default=False)
    for name in LABELS:
        reader.string(name, max_chars=MAX_LABEL_CHARS)
    modalities = reader.raw("modalities")
    if modalities is not None and modalities != ["text"]:
        raise bad_field("modalities", 'only ["text"] is supported')
    for name in ("audio", "web_search_options"):
        if reader.raw(name) is not None:  # an empty object asks for it as well, with defaults
            raise bad_field(name, "is not supported by this server; leave it out")


def read_metadata(reader: FieldReader) -> dict[str, str]:
    """``metadata``, checked.

    Raises:
        GlowplugError: not at most 16 short strings by short names.
    """
    found = reader.mapping("metadata") or {}
    if len(found) > MAX_METADATA_KEYS:
        raise bad_field("metadata", f"{len(found)} keys; at most {MAX_METADATA_KEYS} are accepted")
    for key, value in found.items():
        if not isinstance(value, str):
            raise bad_field("metadata", f'"{key[:40]}" is {json_type(value)}; expected a string')
        if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_VALUE_CHARS:
            raise bad_field(
                "metadata",
                f"keys have at most {MAX_METADATA_KEY_CHARS} characters, values {MAX_METADATA_VALUE_CHARS}",
            )
    return found
