"""``glowplug batch``: many requests in a JSON-lines file, over HTTP.

Exit codes: 0 done, every line answered; 1 the server refused or failed; 2 wrong usage; 3 no server found; 4 the batch
has ended, but not every line was answered well; 130 stopped by Ctrl-C (the batch goes on).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import click

from scheduler.client_commands import (
    API_KEY,
    NoServer,
    get_json,
    post_json,
    read_json,
    read_lines,
    send_request,
    server_url,
    url_option,
)
from scheduler.command import state_dir_option

INCOMPLETE_EXIT: Final = 4
INTERRUPTED_EXIT: Final = 130
ENDED: Final = frozenset({"completed", "failed", "expired", "cancelled"})
#: A batch's metadata holds the digest of its file under this name: the same file again is the same batch.
DIGEST: Final = "glowplug_blake2b"
LOOK_EVERY_S: Final = 0.5
AWAY_LIMIT_S: Final = 60.0  # a server that is restarted in the meantime
COPY_BYTES: Final = 256 * 1024
RECENT: Final = 100  # batches among which a resubmitted file is looked for


@click.group()
def batch() -> None:
    """Submit many requests in a file, and get their answers."""


def server_options(function: Any) -> Any:
    """Where the server is, and as whom to ask."""

    def export(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
        if value:
            os.environ[API_KEY] = value
        return value

    for option in (
        click.option("--json", "as_json", is_flag=True, help="Machine-readable output."),
        click.option("--api-key", expose_value=False, callback=export, help=f"API key (default: {API_KEY})."),
        url_option,
        state_dir_option,
    ):
        function = option(function)
    return function


def _check_output(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """A file that can be made: said now, and not after hours of waiting.

    Raises:
        BadParameter: its folder is not there, or not for this user.
    """
    if value is not None and not os.access(value.absolute().parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{value.absolute().parent} is no folder that this user can write to")
    return value


output_option = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_check_output,
    help="File for the results (default: stdout).",
)


@batch.command()
@click.argument("requests", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--wait", is_flag=True, help="Wait for the end, then write the results in the order of the requests.")
@click.option("--window", default="24h", show_default=True, help="Completion window: such as 90m, 24h or 7d.")
@click.option(
    "--run-in", "run_window", help="Begin lines in these local times of the server only: such as 22:00-06:00."
)
@click.option("--new", is_flag=True, help="Run the file again, even if it was submitted before.")
@output_option
@server_options
def submit(
    requests: Path,
    wait: bool,
    window: str,
    run_window: str | None,
    new: bool,
    output: Path | None,
    state_dir: Path,
    url: str | None,
    as_json: bool,
) -> None:
    """Submit REQUESTS, a file of JSON lines with custom_id, method, url and body.

    The same file again goes on with the batch that it began, so after Ctrl-C just repeat the command.
    """
    server, endpoint, digest = server_url(state_dir, url), _read_endpoint(requests), _digest(requests)
    found = None if new else _find_earlier(server, endpoint, digest)
    if found is None:
        uploaded = _upload(server, requests)
        body = {
            "input_file_id": uploaded["id"],
            "endpoint": endpoint,
            "completion_window": window,
            "metadata": {DIGEST: digest, "file": requests.name[:200]},
            **({"run_window": run_window} if run_window else {}),
        }
        found = post_json(server, "/v1/batches", body)
        text = f"batch {found['id']}"
    else:
        text = f"batch {found['id']} was begun with this file before (--new runs it again)"
    with _going_on(found["id"]):
        click.echo(text, err=True)
        if wait:
            _finish(server, _wait_end(server, found["id"]), output, as_json)
        else:
            click.echo(json.dumps(found, indent=2) if as_json else found["id"])


@batch.command()
@click.argument("batch_id")
@server_options
def status(batch_id: str, state_dir: Path, url: str | None, as_json: bool) -> None:
    """Show how far BATCH_ID is."""
    found = _get(server_url(state_dir, url), batch_id)
    click.echo(json.dumps(found, indent=2) if as_json else describe(found))
    _show_errors(found)


@batch.command()
@click.argument("batch_id")
@server_options
def cancel(batch_id: str, state_dir: Path, url: str | None, as_json: bool) -> None:
    """End BATCH_ID early; what has been answered is kept."""
    found = post_json(server_url(state_dir, url), f"/v1/batches/{batch_id}/cancel")
    click.echo(json.dumps(found, indent=2) if as_json else describe(found))


@batch.command()
@click.argument("batch_id")
@click.option("--wait", is_flag=True, help="Wait for the end first.")
@output_option
@server_options
def results(batch_id: str, wait: bool, output: Path | None, state_dir: Path, url: str | None, as_json: bool) -> None:
    """Write the answers of BATCH_ID as JSON lines, in the order of its requests, errors among them."""
    server = server_url(state_dir, url)
    with _going_on(batch_id):
        found = _wait_end(server, batch_id) if wait else _get(server, batch_id)
    if found["status"] not in ENDED:
        raise click.ClickException(f"{describe(found)}: it has not ended; add --wait, or ask again later")
    _finish(server, found, output, as_json)


@batch.command(name="list")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many.")
@server_options
def list_batches(limit: int, state_dir: Path, url: str | None, as_json: bool) -> None:
    """Show the newest batches."""
    found = get_json(server_url(state_dir, url), f"/v1/batches?limit={limit}")
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(map(describe, found["data"])))


def describe(found: dict[str, Any]) -> str:
    """A batch in one line."""
    counts = found["request_counts"]
    waits = f", waits for {found['waits_for']}" if found.get("waits_for") else ""
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    done = counts["completed"] + counts["failed"]
    return (
        f"{found['id']}  {found['status']:<11}  {done}/{counts['total']} lines{failed}{waits}  {found['model'] or ''}"
    )


def _show_errors(found: dict[str, Any]) -> None:
    """Why a batch failed before anything ran, line by line."""
    for error in (found.get("errors") or {}).get("data", ()):
        click.echo(f"  line {error['line'] or '-'}: {error['code']}: {error['message']}", err=True)


# --- submitting -------------------------------------------------------------------------------------------------


def _read_endpoint(path: Path) -> str:
    """The endpoint that the first line names.

    Raises:
        ClickException: there is no such line.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        endpoint = json.loads(first)["url"]
    except (ValueError, TypeError, KeyError) as error:
        expected = '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
        raise click.ClickException(f"{path}: the first line is no request; expected {expected}") from error
    return str(endpoint)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _find_earlier(server: str, endpoint: str, digest: str) -> dict[str, Any] | None:
    """The newest batch of the same file that runs, or was completed."""
    for found in get_json(server, f"/v1/batches?limit={RECENT}")["data"]:
        is_same = (found["metadata"] or {}).get(DIGEST) == digest and found["endpoint"] == endpoint
        if is_same and found["status"] not in ("failed", "expired", "cancelled", "cancelling"):
            return dict(found)
    return None


def _upload(server: str, path: Path) -> dict[str, Any]:
    boundary, size_bytes = secrets.token_hex(16), path.stat().st_size
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="requests.jsonl"\r\n\r\n'
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    headers = {
        "Content-Type": f"multipart/form-data; boundary={boundary}",
        "Content-Length": str(len(head) + size_bytes + len(tail)),
    }

    def pieces() -> Iterator[bytes]:
        yield head
        with open(path, "rb") as file:
            while piece := file.read(COPY_BYTES):
                yield piece
        yield tail

    return dict(read_json(server, send_request(server, "POST", "/v1/files", pieces(), headers)))


def _get(server: str, batch_id: str) -> dict[str, Any]:
    return dict(get_json(server, f"/v1/batches/{batch_id}"))


# --- waiting ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _going_on(batch_id: str) -> Iterator[None]:
    """Ctrl-C ends the command, not the batch: say how to come back."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nthe batch goes on: `glowplug batch results {batch_id} --wait` comes back to it", err=True)
        sys.exit(INTERRUPTED_EXIT)


def _wait_end(server: str, batch_id: str) -> dict[str, Any]:
    """The batch when it has ended; a bar on the way, if somebody looks.

    Raises:
        NoServer: the server was away for too long.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("validating", total=None)
        while True:
            found = _get_patiently(server, batch_id)
            counts = found["request_counts"]
            text = found["status"] + (f" (waits for {found['waits_for']})" if found.get("waits_for") else "")
            done = counts["completed"] + counts["failed"]
            progress.update(task, description=text, completed=done, total=counts["total"] or None)
            if found["status"] in ENDED:
                return found
            time.sleep(LOOK_EVERY_S)


def _get_patiently(server: str, batch_id: str) -> dict[str, Any]:
    """The batch, also from a server that is being restarted."""
    began_mono_s = time.monotonic()
    while True:
        try:
            return _get(server, batch_id)
        except click.ClickException as error:
            is_passing = isinstance(error, NoServer) or error.message.startswith("503")
            if not is_passing or time.monotonic() - began_mono_s > AWAY_LIMIT_S:
                raise
            time.sleep(LOOK_EVERY_S)


# --- results ----------------------------------------------------------------------------------------------------


def _finish(server: str, found: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Write the results; the exit code says whether every line has a good one."""
    if output is not None:
        part = output.with_name(f".{output.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                _write_results(server, found, file)
            os.replace(part, output)
        except OSError as error:
            again = f"glowplug batch results {found['id']} -o FILE"
            raise click.ClickException(
                f"{output}: cannot be written: {error.strerror}; `{again}` tries again"
            ) from error
        finally:
            part.unlink(missing_ok=True)
    elif not as_json:
        _write_results(server, found, sys.stdout.buffer)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    click.echo(describe(found), err=True)
    _show_errors(found)
    counts = found["request_counts"]
    if found["status"] != "completed" or counts["completed"] < counts["total"]:
        sys.exit(INCOMPLETE_EXIT)


def _write_results(server: str, found: dict[str, Any], file: BinaryIO) -> None:
    rows: dict[str, bytes] = {}
    for name in ("output_file_id", "error_file_id"):
        if found[name]:
            for line in _download(server, found[name]):
                rows[json.loads(line)["custom_id"]] = line
    if rows:
        for line in _download(server, found["input_file_id"]):
            if line.strip() and (row := rows.get(json.loads(line)["custom_id"])):
                file.write(row)
    file.flush()


def _download(server: str, file_id: str) -> Iterator[bytes]:
    yield from read_lines(server, send_request(server, "GET", f"/v1/files/{file_id}/content"))
