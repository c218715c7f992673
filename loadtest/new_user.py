"""A new user's walk, timed: a fresh clone, `make setup`, README's first commands to the first token, the tutorial.

Nothing of this machine is used but Python, git and make: home, caches and state are empty folders, and pip downloads
everything. The commands are those of the documents, read from them; only the port is another.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from loadtest.processes import free_port, wait_until
from loadtest.streaming_client import chat_body, get_text, post_stream

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2"
STEP_LIMIT_S = 600.0


class Walk:
    """Runs commands in a clone and keeps how long each phase took, in seconds."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "glowplug"
        self.phases_s: dict[str, float] = {}
        home = folder / "home"
        home.mkdir()
        kept = (
            "PATH",
            "LANG",
            "TERM",
            "http_proxy",
            "https_proxy",
            "no_proxy",
            "PIP_INDEX_URL",
            "PIP_CERT",
            "SSL_CERT_FILE",
        )
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment |= {"HOME": str(home), "PIP_NO_CACHE_DIR": "1"}

    def timed(self, phase: str, act: Callable[[], object]) -> None:
        """Do ``act`` as one phase."""
        started_s = time.perf_counter()
        act()
        self.phases_s[phase] = round(time.perf_counter() - started_s, 2)
        print(f"{phase:<42} {self.phases_s[phase]:7.2f} s", flush=True)

    def shell(self, script: str) -> None:
        """Run ``script`` in the clone.

        Raises:
            SystemExit: it failed; with the end of what it printed.
        """
        command = ["bash", "-euc", script]
        done = subprocess.run(
            command,
            cwd=self.clone,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=STEP_LIMIT_S,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"`{script[:200]}` ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")

    def block(self, page: str, number: int | None = None) -> list[str]:
        """Lines of a page's shell blocks, of all or of one of them."""
        found = re.findall(r"^```sh\n(.*?)^```$", (self.clone / page).read_text(encoding="utf-8"), re.M | re.S)
        text = "\n".join(found) if number is None else found[number]
        return [line for line in text.splitlines() if line.strip()]


def ask_first_token(port: int) -> None:
    """One token of an answer.

    Raises:
        SystemExit: an error came instead.
    """
    answer = post_stream(f"http://127.0.0.1:{port}", chat_body(MODEL, max_tokens=1))
    if answer.error or not answer.content_at_ms:
        raise SystemExit(f"no token: status {answer.status} {answer.error[:300]}")


def walk_readme(walk: Walk, port: int) -> None:
    """README's first block, line by line, and the first token of a chat."""
    setup, *commands, serve = (line.split(" #")[0].rstrip() for line in walk.block("README.md", 0))
    walk.timed(setup, lambda: walk.shell(setup))
    for command in commands:
        name = " ".join(command.split()[1:3])
        walk.timed(f"glowplug {name}", lambda command=command: walk.shell(command))  # type: ignore[misc]
    server = subprocess.Popen(
        [*serve.split(), "--port", str(port)],
        cwd=walk.clone,
        env=walk.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        walk.timed(
            "glowplug serve, until ready",
            lambda: wait_until(lambda: is_ready(port), within_s=30, what="/readyz"),
        )
        walk.timed("first token of the first answer", lambda: ask_first_token(port))
    finally:
        server.terminate()
        server.wait(60)


def is_ready(port: int) -> bool:
    """Whether the server takes requests."""
    try:
        return get_text(f"http://127.0.0.1:{port}", "/readyz")[0] == 200
    except OSError:
        return False


def walk_tutorial(walk: Walk, port: int) -> None:
    """All of the tutorial but `make setup`, with an empty state folder and an empty cache."""
    walk.environment["XDG_DATA_HOME"] = f"{walk.environment['HOME']}/second-data"
    walk.environment["XDG_CACHE_HOME"] = f"{walk.environment['HOME']}/second-cache"
    lines = [line.replace("8080", str(port)) for line in walk.block("docs/tutorial.md") if not line.startswith("make ")]
    script = "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + "\n".join(lines) + "\nkill %1; wait %1\n"
    walk.timed("the tutorial's commands", lambda: walk.shell(script))


def run_new_user(arguments: list[str]) -> int:
    """Command line of ``python -m loadtest new-user``."""
    parser = argparse.ArgumentParser(prog="python -m loadtest new-user", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="gp-new-") as folder:
        walk = Walk(Path(folder))
        clone = ["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(walk.clone)]
        walk.timed("git clone (of this folder)", lambda: subprocess.run(clone, check=True))
        walk_readme(walk, free_port())
        first_token_s = round(sum(walk.phases_s.values()), 1)
        print(f"first token after {first_token_s} s, downloads included")
        walk_tutorial(walk, free_port())
        sizes = subprocess.run(["du", "-sm", str(walk.clone / ".venv")], capture_output=True, text=True, check=True)
    result = {"phases_s": walk.phases_s, "first_token_s": first_token_s, "venv_mib": int(sizes.stdout.split()[0])}
    print(json.dumps(result), file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
