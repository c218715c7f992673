"""The built wheel holds what a user needs, and nothing of the workshop; installed alone, it works."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout without touching the network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_ships_guests_sdk_and_formats_but_no_tests(wheel: Path) -> None:
    """The compiled guests, the header for guest authors and the documents of format and ABI are inside."""
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("guests/llama/llama.wasm", "guests/sdk/glowplug.h", "guests/ABI.md", "snapshots/FORMAT.md"):
        assert expected in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "worker",
        "scheduler",
        "snapshots",
        "guests",
    }


def test_the_installed_wheel_answers_for_every_verb(wheel: Path, tmp_path: Path) -> None:
    """Every verb of the command imports and explains itself from the installed files, not from the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "GLOWPLUG_STATE_DIR": str(tmp_path)}
    script = (
        "import scheduler.command as c, click;"
        "assert c.__file__.startswith({site!r}), c.__file__;"
        "[c.main.get_command(click.Context(c.main), verb).get_help(click.Context(c.main)) for verb in c.VERBS];"
        "print(*c.VERBS)"
    ).format(site=str(tmp_path / "site"))
    found = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "serve" in found.stdout
