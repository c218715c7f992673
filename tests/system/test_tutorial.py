"""The tutorial's own commands, in order, in a clean state folder with the real small model."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtest.processes import free_port
from tests.model_fixtures import CACHE_DIR

ROOT = Path(__file__).resolve().parent.parent.parent
#: What counts is that all of them end well; a fresh machine's first token is promised within this, downloads included.
FIRST_TOKEN_LIMIT_S = 180


def tutorial_commands() -> list[str]:
    """Lines of the shell blocks that are not marked as not run."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = re.findall(r"(<!-- not run[^\n]*\n)?```sh\n(.*?)```", text, re.S)
    return [line for marked, block in blocks if not marked for line in block.splitlines() if line.strip()]


@pytest.mark.timeout(FIRST_TOKEN_LIMIT_S + 20)
def test_the_tutorial_works_as_written(smollm2_gguf: Path, short_tmp_path: Path) -> None:
    """Every command ends with status 0; the first token comes within three minutes."""
    port = free_port()
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "GLOWPLUG_CONFIG")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_DATA_HOME": str(short_tmp_path),
        "XDG_CACHE_HOME": str(short_tmp_path),
        "PS4": "+ ",
    }
    assert smollm2_gguf.parent == CACHE_DIR  # the one download, made by `make test`
    commands = [line.replace("8080", str(port)) for line in tutorial_commands()]
    commands = [
        f"{line} --cache-dir {CACHE_DIR}" if line.startswith("glowplug build pypi:") else line for line in commands
    ]
    assert len(commands) >= 15
    script = "set -eux\n" + "\n".join(commands) + "\nkill $!; wait $!\n"
    started_s = time.monotonic()
    with (short_tmp_path / "output").open("w+") as output:  # a file: a server left over would keep a pipe open
        shell = subprocess.Popen(
            ["bash", "-c", script], env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = shell.wait(FIRST_TOKEN_LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
        output.seek(0)
        text = output.read()
    assert status == 0, text[-6000:]
    assert time.monotonic() - started_s < FIRST_TOKEN_LIMIT_S
    assert "Paris" in text
    assert re.search(r"cold start from T1", text)
    assert re.search(r"cold start from T2", text)
    assert not list((short_tmp_path / "glowplug").rglob("*.sock"))
