"""The example Python guest, built once for all tests, with misbehaviour added that certain texts spring."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

from guests.component import compile_component
from guests.python_build import build_component
from guests.shipped import GUESTS_FOLDER

EXAMPLE = GUESTS_FOLDER / "examples" / "python_postprocess"

MISBEHAVIOUR = """

_example = WitWorld
_calls = 0


def _recurse(depth: int) -> int:
    return _recurse(depth + 1) + 1


class WitWorld(_example):
    def resume(self, value: int) -> None:
        super().resume(value)
        if value == 33:
            raise RuntimeError("resume refused")

    def post_process(self, text: str) -> str:
        global _calls
        _calls += 1
        match text:
            case "99999999":  # as a model's text can be made to be
                raise KeyError("nines")
            case "!spin" | "88888888":
                while True:
                    pass
            case "!raise":
                raise KeyError("lost")
            case "!deep":
                import sys
                sys.setrecursionlimit(10**9)
                return str(_recurse(0))
            case "!memory":
                return str(len(bytearray(1 << 30)))
            case "!memory slowly":
                kept = []
                while True:
                    kept.append(bytearray(1 << 20))
            case "!long":
                return "x" * (5 << 20)
            case "!log":
                host.log(99, "no such level")
                return "logged"
            case "!log flood":
                for _ in range(5000):
                    host.log(0, "line")
                return "logged"
            case "!calls":
                return str(_calls)
            case "!seed":
                return str(seed)
            case "!clock":
                import time
                return str(time.time())
            case "!random":
                import os
                return os.urandom(4).hex()
            case "!file":
                return open("/etc/passwd").read()
            case "!socket":
                import socket
                return str(socket.create_connection(("127.0.0.1", 6379)))
            case "!environment":
                import os
                return str(dict(os.environ))
        return super().post_process(text)
"""


@functools.cache
def python_component() -> bytes:
    """The component, as componentize-py makes it (ten seconds)."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "guest"
        shutil.copytree(EXAMPLE, folder)
        app = folder / "app.py"
        app.write_text(app.read_text() + MISBEHAVIOUR)
        return build_component(folder)


@functools.cache
def compiled_python_component() -> bytes:
    """Its machine code (eight seconds)."""
    return compile_component(python_component())
