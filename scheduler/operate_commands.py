"""Verbs of operators: ``wake park unload pin unpin prefetch drain undrain`` (exit codes: client_commands)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import click

from scheduler.client_commands import get_json, post_json, server_url, url_option
from scheduler.command import state_dir_option

POLL_S: Final = 0.1
DEFAULT_WAIT_S: Final = 120.0

#: When an act has come true, from a row of /admin/status. Acts that are not here are true at once.
DONE: Final[dict[str, Callable[[dict[str, Any]], bool]]] = {
    "wake": lambda row: row["tier"] == "T4" and "ready" in row["state"],
    "park": lambda row: row["tier"] in ("T3", "T3r"),
    "pin": lambda row: row["pinned"],
    "unpin": lambda row: not row["pinned"],
    "unload": lambda row: row["workers"] == 0 and row["sealed_bytes"] == 0,
    "prefetch": lambda row: row["sealed_bytes"] > 0,
}
HELP: Final = {
    "wake": "Start a worker for MODEL without a request; its idle timer runs from when it is ready.",
    "park": "Return MODEL's device memory once it is idle and keep its process (T3, T3r), where its backend can.",
    "unload": "Drain MODEL to zero and forget its sealed bytes; the next request wakes it from disk (T1).",
    "pin": "Keep MODEL awake: a worker now, and never scaled to zero, also after restarts.",
    "unpin": "Let MODEL be scaled to zero again.",
    "prefetch": "Verify MODEL into sealed memory (T1 to T2) without a process, so that its first wake is quick.",
    "drain": "Move work off NODE: no new workers there, present ones finish, spares end. Kept; undo with undrain.",
    "undrain": "Let NODE take workers again.",
}


def _common(function: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Machine-readable output."),
        click.option(
            "--wait-s",
            type=click.FloatRange(0),
            default=DEFAULT_WAIT_S,
            show_default=True,
            help="For it to come true; 0: do not.",
        ),
        url_option,
        state_dir_option,
    ):
        function = option(function)
    return function


def _make_model_verb(act: str) -> click.Command:
    @click.command(act, help=HELP[act])
    @click.argument("model")
    @_common
    def verb(model: str, state_dir: Path, url: str | None, wait_s: float, as_json: bool) -> None:
        address = server_url(state_dir, url)
        post_json(address, f"/admin/models/{quote(model)}:{act}")
        row = _wait(address, model, act, wait_s)
        if as_json:
            click.echo(json.dumps(row))
        else:
            click.echo(f"{model}: {row['tier']}, {row['state'] or 'asleep'}{', pinned' if row['pinned'] else ''}")

    return verb


def _make_node_verb(act: str) -> click.Command:
    @click.command(act, help=HELP[act])
    @click.argument("node")
    @_common
    def verb(node: str, state_dir: Path, url: str | None, wait_s: float, as_json: bool) -> None:
        address = server_url(state_dir, url)
        answer = post_json(address, f"/admin/nodes/{quote(node)}:{act}")
        if act == "drain" and wait_s > 0:
            _wait_empty(address, node, wait_s)
        click.echo(json.dumps(answer) if as_json else f"{node}: {act}ed")

    return verb


def _wait_empty(address: str, node: str, wait_s: float) -> None:
    """Return once ``node`` has no worker and no spare.

    Raises:
        ClickException: it still had some at the end.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        status = get_json(address, "/admin/status")
        left = [worker["worker_id"] for worker in status["workers"] if worker["node_id"] == node]
        gpus = [gpu for report in status["nodes"] if report["node_id"] == node for gpu in report["gpus"]]
        if num_spares := sum(gpu.get("spare_workers", 0) for gpu in gpus):
            left.append(f"{num_spares} spares")
        if not left:
            return
        if time.monotonic() > deadline_s:
            raise click.ClickException(
                f"{node} takes no new workers, but after {wait_s:g} s it still has {', '.join(left)}"
            )
        time.sleep(POLL_S)


def _wait(address: str, model: str, act: str, wait_s: float) -> dict[str, Any]:
    """The model's row once ``act`` has come true.

    Raises:
        ClickException: it did not in time, or the model cannot wake; with the cause that the scheduler gives.
    """
    done, deadline_s = DONE.get(act), time.monotonic() + wait_s
    while True:
        rows = get_json(address, "/admin/status")["models"]
        row: dict[str, Any] | None = next((row for row in rows if row["name"] == model), None)
        if row is None:
            raise click.ClickException(f"{model} is gone")
        if done is None or wait_s == 0 or done(row):
            return row
        if time.monotonic() > deadline_s:
            raise click.ClickException(
                f"{model}: no {act} within {wait_s:g} s: {row['error'] or row['state'] or 'asleep'}"
            )
        time.sleep(POLL_S)


wake, park, unload, pin, unpin, prefetch = (
    _make_model_verb(act) for act in ("wake", "park", "unload", "pin", "unpin", "prefetch")
)
drain, undrain = (_make_node_verb(act) for act in ("drain", "undrain"))
