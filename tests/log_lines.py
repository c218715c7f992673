"""Lines of a log that its process is still writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_log(path: Path, event: str = "") -> list[dict[str, Any]]:
    """The whole JSON lines of ``path`` (of that event, where one is named): the last one may be half written."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = [json.loads(line) for line in whole.split(b"\n") if line.startswith(b"{")]
    return [line for line in lines if event in ("", line.get("event"))]
