"""Pages of the documentation as programs: their fenced blocks, run in order by one shell, as a reader would."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.processes import free_port
from tests.fleet_fixtures import copy_linked
from tests.model_fixtures import CACHE_DIR

ROOT: Final = Path(__file__).resolve().parent.parent
DEFAULT_PORT: Final = "8080"
#: Lines that make no sense here, with the reason. Everything else in a block of shell is run.
NOT_RUN: Final = {
    "make setup": "installs the environment that the tests run in; `python -m loadtest new-user` runs and times it",
    ".venv/bin/pip install 'glowplug[otel]'": "the tests' environment has every extra that needs no GPU",
    "make demo": "a story of its own, told from the same commands as the tutorial",
    "make test": "runs these tests",
}
_BLOCK: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_SERVE: Final = re.compile(r"^(?:\w+=\S+ )*(?:\.venv/bin/)?glowplug serve\b[^&]*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its text."""

    language: str
    text: str


def read_blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*match) for match in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))]


#: What a page that speaks of a running server is told beside one.
SERVING: Final = Block("sh", "glowplug serve\n")


def make_script(blocks: list[Block], port: int) -> str:
    """A script of all shell and Python blocks.

    Servers get ``port``. One in the foreground goes to the background, as in another terminal, and ends the one before.
    """
    lines: list[str] = []
    for block in blocks:
        if block.language == "python":
            lines += ["python - <<'PYTHON'", block.text, "PYTHON"]
        elif block.language in ("sh", "console"):
            lines += [line.removeprefix("$ ") for line in block.text.splitlines()]
    return "\n".join(_make_lines(line, port) for line in lines if line.split("  ")[0] not in NOT_RUN)


def _make_lines(line: str, port: int) -> str:
    line = line.replace(DEFAULT_PORT, str(port)).replace("0.0.0.0", "127.0.0.1")
    command = line.split(" #")[0].rstrip()
    if not _SERVE.match(command):
        return line
    port_option = "" if "--port" in command else f" --port {port}"
    scheme = "https" if "--tls-cert" in command else "http"
    return (
        f"stop_server\n{command}{port_option} & SERVER=$!\n"
        f"until curl -sk -o ready.txt {scheme}://127.0.0.1:{port}/readyz; do kill -0 $SERVER; sleep 0.1; done"
    )


class Reader:
    """Somebody who follows pages in a folder of their own, with nothing configured and the model files downloaded."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is short and empty. It gets what a checkout has; what the commands write stays in it."""
        self.folder = folder
        self.state_dir = folder / "data" / "glowplug"
        self.port = free_port()
        (folder / "cache" / "glowplug").mkdir(parents=True)
        (folder / "cache" / "glowplug" / "models").symlink_to(CACHE_DIR)
        (folder / ".curlrc").write_text("fail\n")  # a page that earns a 4xx is wrong
        for name in ("deploy", "examples", "guests"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)

    def take_state(self, built: Path) -> None:
        """Begin with a state folder that was built before."""
        copy_linked(built, self.state_dir)

    def run(self, script: str, *, within_s: float) -> str:
        """Run ``script``; what it printed. Nothing that it started is left behind.

        Raises:
            AssertionError: a command failed, or not all had ended in time; with the end of the output.
        """
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("REDIS_URL", "GLOWPLUG_"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PS4": "+ ",
            "XDG_DATA_HOME": str(self.folder / "data"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "CURL_HOME": str(self.folder),
        }
        prelude = (
            'set -euo pipefail\nSERVER=\nstop_server() { [ -z "$SERVER" ] || { kill "$SERVER"; wait "$SERVER"; }; }\n'
        )
        whole = f"{prelude}set -x\n{script}\nSERVER=${{SERVER:-${{!:-}}}}; stop_server\n"
        with (self.folder / "output").open("w+") as output:  # a file: a server left over would keep a pipe open
            shell = subprocess.Popen(
                ["bash", "-c", whole],
                env=environment,
                cwd=self.folder,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            status: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = shell.wait(within_s)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGTERM)
            output.seek(0)
            text = output.read()
        assert status == 0, f"status {status}\n{text[-6000:]}"
        return text
