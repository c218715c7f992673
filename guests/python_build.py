"""Builds a Python guest into a component: ``python -m guests.python_build FOLDER -o OUT.wasm``.

``FOLDER`` holds ``app.py`` and the WIT world it implements (``guest.wit``; see ``examples/python_postprocess``). Needs
the package ``componentize-py`` (extra ``python-guests``), which brings its own interpreter; takes about ten seconds.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from guests.component_format import parse_component
from guests.errors import GuestError

WORLD: Final = "post-processor"
TIMEOUT_S: Final = 300.0


def find_componentize_py() -> str:
    """The program, beside this interpreter or on the path.

    Raises:
        GuestError: it is not installed.
    """
    beside = Path(sys.executable).with_name("componentize-py")
    found = str(beside) if beside.is_file() else shutil.which("componentize-py")
    if found is None:
        raise GuestError("componentize-py is not installed: pip install 'glowplug[python-guests]'")
    return found


def build_component(folder: Path) -> bytes:
    """The component of the Python guest in ``folder``. Its module-level code runs now, in the sandbox of the tool.

    Raises:
        GuestError: the tool is missing, reports errors (its output is in the message) or takes too long.
        GuestModuleRefused: the result is not a component.
    """
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / "guest"
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns("__pycache__", "*.wasm"))
        output = Path(scratch) / "guest.wasm"
        command = [find_componentize_py(), "-q", "-d", "guest.wit", "-w", WORLD, "componentize", "--stub-wasi"]
        try:
            done = subprocess.run(
                [*command, "-o", str(output), "app"], cwd=work, capture_output=True, text=True, check=False,
                timeout=TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"building the Python guest in {folder} took longer than {TIMEOUT_S:g} s") from error
        if done.returncode != 0:
            raise GuestError(f"building the Python guest in {folder} failed:\n{done.stdout}{done.stderr}")
        component = output.read_bytes()
    parse_component(component)
    return component


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m guests.python_build", description="Build a Python guest.")
    parser.add_argument("folder", type=Path, help="holds app.py and guest.wit")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the component goes")
    options = parser.parse_args(arguments)
    try:
        component = build_component(options.folder)
    except GuestError as error:
        print(error, file=sys.stderr)
        return 1
    options.output.write_bytes(component)
    print(f"{options.output}: {len(component)} bytes; next: glowplug guests compile {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
