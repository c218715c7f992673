"""The example Python guest, built once for all tests, with misbehaviour added that certain texts spring."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from guests.component import compile_component
from guests.python_build import build_component
from guests.shipped import GUESTS_FOLDER

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = GUESTS_FOLDER / "examples" / "python_postprocess"
COMPONENT, COMPILED, LOG = "guest.wasm", "guest.cwasm", "log"

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
def _building() -> tuple[subprocess.Popen[bytes], Path]:
    """The process that builds and compiles, and where it leaves what it made. One for the whole run."""
    folder = Path(tempfile.mkdtemp(prefix="gp-python-guest-"))
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.python_guest_fixtures", str(folder)], cwd=ROOT, stdout=log, stderr=log
        )

    def clean() -> None:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clean)
    return process, folder


def begin_building() -> None:
    """Start what takes eighteen seconds, beside the tests that come before those that need it."""
    _building()


def _wait_built(name: str) -> bytes:
    process, folder = _building()
    assert process.wait(200) == 0, (folder / LOG).read_text()
    return (folder / name).read_bytes()


@functools.cache
def python_component() -> bytes:
    """The component, as componentize-py makes it."""
    return _wait_built(COMPONENT)


@functools.cache
def compiled_python_component() -> bytes:
    """Its machine code."""
    return _wait_built(COMPILED)


def _build(target: Path) -> None:
    """Ten seconds for the component, eight for its machine code."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "guest"
        shutil.copytree(EXAMPLE, folder)
        app = folder / "app.py"
        app.write_text(app.read_text() + MISBEHAVIOUR)
        component = build_component(folder)
    (target / COMPONENT).write_bytes(component)
    (target / COMPILED).write_bytes(compile_component(component))


if __name__ == "__main__":
    _build(Path(sys.argv[1]))
