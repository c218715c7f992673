"""``top``, ``logs`` and ``completion`` (exit codes: client_commands)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from scheduler.client_commands import get_json, model_table, server_url, url_option
from scheduler.command import state_dir_option
from scheduler.contract.log_file import LOG_NAME
from scheduler.gpu_table import gpu_table
from scheduler.plain_tables import make_console, make_table

POLL_S: Final = 0.2
LEVELS: Final = ("debug", "info", "warning", "error", "critical")
LEVEL_COLOURS: Final = {"warning": "yellow", "error": "red", "critical": "red"}


@click.command()
@state_dir_option
@url_option
@click.option("--every-s", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Between two looks.")
@click.option("--count", type=click.IntRange(min=1), help="End after this many looks.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each look.")
def top(state_dir: Path, url: str | None, every_s: float, count: int | None, as_json: bool) -> None:
    """Watch models, workers and nodes live; Ctrl-C ends. Not on a terminal: one table for each look."""
    address = server_url(state_dir, url)
    if as_json:
        for status in _looks(address, every_s, count):
            click.echo(json.dumps(status))
        return
    from rich.live import Live

    console = make_console()
    try:
        if not console.is_terminal:
            for status in _looks(address, every_s, count or 1):
                console.print(_picture(status))
            return
        with Live(console=console, screen=count is None, auto_refresh=False) as live:
            for status in _looks(address, every_s, count):
                live.update(_picture(status), refresh=True)
    except KeyboardInterrupt:
        pass


def _looks(address: str, every_s: float, count: int | None) -> Iterator[dict[str, Any]]:
    seen = 0
    while True:
        yield get_json(address, "/admin/status")
        seen += 1
        if count is not None and seen >= count:
            return
        time.sleep(every_s)


def _picture(status: dict[str, Any]) -> Any:
    from rich.console import Group

    workers = make_table("WORKER", "NODE", "STATE", right=("PID", "RUNNING", "WAITING", "KV USED", "TOKENS"))
    for row in status["workers"]:
        used = f"{row['kv_used_bytes'] / max(1, row['kv_budget_bytes']):.0%}"
        numbers = (row["pid"], row["num_running"], row["num_waiting"])
        workers.add_row(
            row["worker_id"],
            row["node_id"],
            row["state"],
            *(str(n) for n in numbers),
            used,
            str(row["tokens_generated"]),
        )
    nodes = ", ".join(
        f"{node['node_id']} {node['memory_available_bytes'] / 2**30:.1f} GiB free"
        + (" (drained)" if node["node_id"] in status["drained_nodes"] else "")
        for node in status["nodes"]
    )
    gpus = gpu_table(status)
    parts = [model_table(status), "", workers, *(["", gpus] if gpus is not None else [])]
    return Group(f"leader {status['leader']}   nodes: {nodes or 'none'}", "", *parts)


@click.command()
@state_dir_option
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes; Ctrl-C ends.")
@click.option("--lines", "-n", type=click.IntRange(0), default=50, show_default=True, help="How many of the newest.")
@click.option("--level", type=click.Choice(LEVELS), default="debug", help="This level and above.")
@click.option("--component", help="Only of this part: gateway, scheduler, agent, worker, serve.")
@click.option("--json", "as_json", is_flag=True, help="The lines as they are stored.")
def logs(state_dir: Path, follow: bool, lines: int, level: str, component: str | None, as_json: bool) -> None:
    """Show the newest lines of what `serve` logged, and follow them with -f."""
    folder = os.environ.get("GLOWPLUG_LOG_DIR")
    path = (Path(folder) if folder and folder != "off" else state_dir / "log") / LOG_NAME
    if not path.exists() and not follow:
        raise click.ClickException(f"{path}: no log yet; `glowplug serve` writes it")
    levels = LEVELS[LEVELS.index(level) :]

    def is_wanted(line: str) -> bool:
        try:
            event = json.loads(line)
        except ValueError:
            return False  # a line that is being written
        return event.get("level") in levels and (component is None or event.get("component") == component)

    try:
        for line in _tail(path, lines, is_wanted, follow=follow):
            click.echo(line if as_json else _render(json.loads(line)))
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass


def _tail(path: Path, num_lines: int, is_wanted: Callable[[str], bool], *, follow: bool) -> Iterator[str]:
    """The newest wanted lines, then (``follow``) new ones for ever; a rotated file is read to its end, then the new
    one."""
    file = path.open(encoding="utf-8", errors="replace") if path.exists() else None
    if file is not None:
        yield from (line.rstrip("\n") for line in deque(filter(is_wanted, file), maxlen=num_lines))
    pending = ""
    while follow:
        chunk = file.read() if file is not None else ""
        *whole, pending = (pending + chunk).split("\n")
        yield from filter(is_wanted, whole)
        if not chunk:
            if path.exists() and (file is None or path.stat().st_ino != os.fstat(file.fileno()).st_ino):
                if file is not None:
                    file.close()
                file = path.open(encoding="utf-8", errors="replace")
                continue
            time.sleep(POLL_S)


def _render(event: dict[str, Any]) -> str:
    at, level = str(event.pop("timestamp", ""))[11:23], str(event.pop("level", ""))
    component, name = event.pop("component", ""), event.pop("event", "")
    colour = None if os.environ.get("NO_COLOR") else LEVEL_COLOURS.get(level)
    facts = " ".join(f"{key}={value}" for key, value in event.items())
    return f"{at} {click.style(f'{level:<8}', fg=colour)} {component:<9} {name} {facts}".rstrip()


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print completion for SHELL; for bash: `glowplug completion bash >> ~/.bashrc`."""
    from click.shell_completion import get_completion_class

    from scheduler.command import main

    found = get_completion_class(shell)
    assert found is not None, shell  # click.Choice has checked it
    click.echo(found(main, {}, "glowplug", "_GLOWPLUG_COMPLETE").source())
