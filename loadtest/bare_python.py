"""``python3 loadtest/bare_python.py FOLDER --wheels WHEELS``: an environment of this interpreter, its packages, ours.

For machines without a package index: nothing is downloaded, and nothing of the interpreter's own is touched. FOLDER
gets ``bin/python``, which finds the wheels of WHEELS (unpacked in FOLDER), then what this interpreter finds, then this
checkout; also where a process is started with an empty environment. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_environment(folder: Path, wheels: Path | None) -> Path:
    """The interpreter of the environment, made or brought up to date."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    unpacked = folder / "wheels"
    shutil.rmtree(unpacked, ignore_errors=True)  # a program of an earlier run may still be in use: never written over
    for wheel in sorted(wheels.glob("*.whl")) if wheels is not None else []:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        _place_data(unpacked, wheel)
    paths = [unpacked, *map(Path, site.getsitepackages()), ROOT]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    target = folder / "lib" / version / "site-packages" / "glowplug.pth"
    target.write_text("".join(f"{path.resolve()}\n" for path in paths))
    return folder / "bin" / "python"


def _place_data(unpacked: Path, wheel: Path) -> None:
    """Move what a wheel keeps for other places of an environment: modules beside the others, programs to ``bin``."""
    name, version = wheel.name.split("-")[:2]
    data = unpacked / f"{name}-{version}.data"
    for kind, target in (("purelib", unpacked), ("platlib", unpacked), ("scripts", unpacked / "bin")):
        for path in sorted((data / kind).rglob("*")):
            if path.is_file():
                place = target / path.relative_to(data / kind)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
                if kind == "scripts":
                    place.chmod(0o755)
    for path in unpacked.rglob("*"):  # a zip archive read so keeps no modes: programs that packages bring must run
        if path.is_file() and path.suffix == "" and path.read_bytes()[:4] == b"\x7fELF":
            path.chmod(0o755)


def main() -> None:
    """Command line; prints the interpreter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheels", type=Path)
    options = parser.parse_args()
    print(make_environment(options.folder, options.wheels))


if __name__ == "__main__":
    main()
