"""Builds the shipped guests from C with the ``ziglang`` wheel: ``python -m guests.build [--check] [NAME ...]``.

Compiler, flags and relative paths are all there is to the output, so a build is reproducible: CI runs ``--check``,
which builds into a temporary folder and compares the bytes with the committed ones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guests.errors import GuestError
from guests.module import parse_guest
from guests.shipped import GUESTS_FOLDER

COMPILER_FLAGS: Final = (
    "--target=wasm32-freestanding",
    "-mcpu=generic+simd128+bulk_memory",
    "-std=c11",
    "-O2",
    "-g0",
    "-s",
    "-nostdlib",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wl,--no-entry",
    "-Wl,-z,stack-size=65536",
    "-Isdk",
    "-Icommon",
)

#: Sources that every guest made of a folder is built with.
SHARED_SOURCES: Final = "common"


@dataclass(frozen=True, slots=True)
class ShippedGuest:
    """A guest that ships built. ``sources`` is a C file, or a folder of them that the shared ones join; both relative
    to ``guests/``."""

    name: str
    sources: str
    output: str

    def source_files(self) -> list[str]:
        """Its C files in a fixed order, relative to ``guests/``."""
        path = GUESTS_FOLDER / self.sources
        files = [path]
        if path.is_dir():
            files = sorted(
                [*path.glob("*.c"), *(GUESTS_FOLDER / SHARED_SOURCES).glob("*.c")], key=lambda file: file.name
            )
        return [str(file.relative_to(GUESTS_FOLDER)) for file in files]


SHIPPED: Final = (
    ShippedGuest("llama", "llama", "llama/llama.wasm"),
    ShippedGuest("embed", "embed", "embed/embed.wasm"),
    ShippedGuest("toy", "examples/toy.c", "examples/toy.wasm"),
    ShippedGuest("bias", "examples/bias.c", "examples/bias.wasm"),
    ShippedGuest("table", "examples/table.c", "examples/table.wasm"),
)


def compile_c(sources: list[str], output: Path) -> None:
    """Compile C files into a guest and check it. Paths are absolute or relative to ``guests/``. Takes about a second.

    Raises:
        GuestError: the compiler is missing or reports errors; its output is in the message.
        GuestModuleRefused: the result breaks a rule of the ABI.
    """
    command = [sys.executable, "-m", "ziglang", "cc", *COMPILER_FLAGS, *sources, "-o", str(output)]
    # From guests/, so that no absolute path can reach the output.
    done = subprocess.run(command, cwd=GUESTS_FOLDER, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GuestError(f"building {output.name} failed:\n{done.stdout}{done.stderr}")
    parse_guest(output.read_bytes())


def build(guest: ShippedGuest) -> Path:
    """Build ``guest`` in place; where it is. The old file stays if the build fails.

    Raises:
        GuestError: see :func:`compile_c`.
    """
    output = GUESTS_FOLDER / guest.output
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        built = Path(folder) / output.name
        compile_c(guest.source_files(), built)
        built.chmod(0o644)
        built.replace(output)
    return output


def is_current(guest: ShippedGuest) -> bool:
    """Whether the committed file is what its sources build to.

    Raises:
        GuestError: see :func:`compile_c`.
    """
    output = GUESTS_FOLDER / guest.output
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / output.name
        compile_c(guest.source_files(), built)
        return output.is_file() and output.read_bytes() == built.read_bytes()


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m guests.build", description="Build the shipped guests.")
    parser.add_argument("--check", action="store_true", help="build elsewhere and compare with the files here")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(g.name for g in SHIPPED)}")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {guest.name for guest in SHIPPED}
    if unknown:
        parser.error(f"no guest is called {', '.join(sorted(unknown))}")
    num_stale = 0
    for guest in SHIPPED:
        if options.names and guest.name not in options.names:
            continue
        try:
            if not options.check:
                path = build(guest)
                print(f"{guest.name}: {path.relative_to(GUESTS_FOLDER.parent)}, {path.stat().st_size} bytes")
            elif is_current(guest):
                print(f"{guest.name}: up to date")
            else:
                num_stale += 1
                print(f"{guest.name}: {guest.output} is not what its sources build to; run python -m guests.build")
        except GuestError as error:
            num_stale += 1
            print(f"{guest.name}: {error}", file=sys.stderr)
    return 1 if num_stale else 0


if __name__ == "__main__":
    sys.exit(main())
