"""Verbs that talk to a running server over HTTP: ``ps``, ``run``, ``trace``.

Exit codes: 0 done, 1 the server refused or failed, 2 wrong usage, 3 no server found.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import click

from scheduler.command import state_dir_option
from scheduler.gpu_table import gpu_table
from scheduler.plain_tables import make_console, make_table
from scheduler.readiness_probe import LOOPBACK_OF
from scheduler.waiting_line import WaitingLine

NO_SERVER_EXIT: Final = 3
#: The API key to send, where the server needs one; `ps` and `trace` need the scope admin.
API_KEY: Final = "GLOWPLUG_API_KEY"
#: Certificate authority of an https server, where the system does not know it.
CA_FILE: Final = "GLOWPLUG_CA_FILE"
REQUEST_TIMEOUT_S: Final = 600.0
BAR_COLUMNS: Final = 44
CHAT_PATH: Final = "/v1/chat/completions"


def check_url(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """``value`` as an origin. A base_url as OpenAI clients have it will do: its ``/v1`` is taken off.

    Raises:
        BadParameter: it is none.
    """
    if value is None:
        return None
    expected = f'"{value}": expected http://HOST:PORT or https://HOST:PORT, e.g. http://127.0.0.1:8080'
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise click.BadParameter(f"{expected}, with a port up to 65535") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.rstrip("/") not in ("", "/v1"):
        raise click.BadParameter(expected)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


url_option = click.option(
    "--url", callback=check_url, help="Server, e.g. http://127.0.0.1:8080 (default: the one of the state folder)."
)


class NoServer(click.ClickException):
    """Nothing answers where the server should be."""

    exit_code = NO_SERVER_EXIT


@click.command()
@state_dir_option
@url_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def ps(state_dir: Path, url: str | None, as_json: bool) -> None:
    """Show models with their tier, workers, requests in flight, memory and idle countdown.

    SEALED is verified memory on the host, held once for all workers of all models that share it. PRIVATE is the
    workers' own memory; PSS adds their share of what is mapped by several: weights that ten workers map count once.
    Where there are GPUs, a second table has their memory, who holds it, warm spares and errors.
    """
    status = get_json(server_url(state_dir, url), "/admin/status")
    if as_json:
        click.echo(json.dumps(status, indent=2))
        return
    console = make_console()
    console.print(model_table(status))
    if (gpus := gpu_table(status)) is not None:
        console.print()
        console.print(gpus)
    for model in status["models"]:
        if model.get("error"):
            click.echo(f"{model['name']}: {model['error']}", err=True)


def model_table(status: dict[str, Any]) -> Any:
    """The models of a status report as a rich table."""
    numbers = ("WORKERS", "IN FLIGHT", "SEALED", "PRIVATE", "PSS", "SLEEPS IN")
    table = make_table("MODEL", "TIER", "STATE", right=numbers)
    for model in status["models"]:
        idle_for_s = model["idle_for_s"]
        left_s = None if idle_for_s is None else max(0.0, model["idle_timeout_s"] - idle_for_s)
        table.add_row(
            model["name"],
            model["tier"],
            model["state"] or "asleep",
            str(model["workers"]),
            str(model["in_flight"]),
            _format_bytes(model["sealed_bytes"]),
            _format_bytes(model["worker_bytes"]),
            _format_bytes(model["proportional_bytes"]),
            ("pinned" if model["pinned"] else "-") if left_s is None else f"{left_s:.0f} s",
        )
    return table


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@state_dir_option
@url_option
@click.option("--system", help="System prompt.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of the answer, at most."
)
@click.option("--temperature", type=click.FloatRange(0, 2), help="0: greedy.")
@click.option("--seed", type=int, help="The same seed draws the same answer.")
@click.option("--json", "as_json", is_flag=True, help="Print the raw stream events.")
def run(
    model: str,
    prompt: str | None,
    state_dir: Path,
    url: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Send PROMPT to MODEL and stream the answer; without PROMPT, talk to it: /help, /system, /clear, /quit."""
    if prompt is None:
        from scheduler.conversation import Conversation

        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        given = {name: value for name, value in options.items() if value is not None}
        Conversation(server_url(state_dir, url), model, given, system).run(state_dir / "run_history")
        return
    messages = [{"role": "system", "content": system}] if system else []
    body: dict[str, Any] = {
        "model": model,
        "messages": [*messages, {"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
    }
    body.update({k: v for k, v in {"temperature": temperature, "seed": seed}.items() if v is not None})
    address = server_url(state_dir, url)
    if as_json:
        for event in _stream_events(address, body):
            click.echo(event)
        return
    for text in stream_chat(address, body):
        click.echo(text, nl=False)
        sys.stdout.flush()
    click.echo()


def stream_chat(address: str, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of the answer to a streamed chat request, as they come.

    Raises:
        ClickException: the server refused it, or it ended with an error.
    """
    for event in _stream_events(address, body):
        for choice in json.loads(event).get("choices", ()):
            if text := choice["delta"].get("content"):
                yield text


def _stream_events(address: str, body: dict[str, Any]) -> Iterator[str]:
    """The events of a streamed chat request as JSON, the one with an error too.

    Raises:
        ClickException: the server refused it, or it ended with an error.
        NoServer: the stream has no end.
    """
    waiting = WaitingLine()
    try:
        for line in read_lines(address, _request(address, "POST", CHAT_PATH, body)):
            event = line.decode("utf-8").rstrip("\r\n").removeprefix("data: ")
            waiting.show(event)
            if event == "[DONE]":
                return
            if event.startswith("{"):  # the other lines are comments, ids and the blanks between
                waiting.clear()
                yield event
                if "error" in (told := json.loads(event)):
                    raise click.ClickException(told["error"]["message"])
    finally:
        waiting.clear()
    raise NoServer(f"{address} broke off before the end of its answer")


@click.command()
@click.argument("request_id", required=False)
@state_dir_option
@click.option("--last", is_flag=True, help="The newest request.")
@url_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output, phases in ms.")
def trace(request_id: str | None, state_dir: Path, last: bool, url: str | None, as_json: bool) -> None:
    """Draw the waterfall of REQUEST_ID: where the time to the first byte went."""
    if (request_id is None) == (not last):
        raise click.UsageError("give a REQUEST_ID or --last")
    path = "last" if request_id is None else quote(_bare_id(request_id), safe="")
    found = get_json(server_url(state_dir, url), f"/admin/traces/{path}")
    click.echo(json.dumps(found, indent=2) if as_json else draw_waterfall(found))


def _bare_id(shown: str) -> str:
    """The id in what answers and streams show of a request: ``chatcmpl-ID``, ``msg_ID``, and events' ``ID:NUMBER``."""
    return re.sub(r"^(chatcmpl-|cmpl-|resp_|msg_)", "", shown).partition(":")[0]


def draw_waterfall(found: dict[str, Any]) -> str:
    """The phases of a trace as bars on one time axis, for a terminal of 80 columns.

    ``found`` is a trace as the gateway gives it: ``marks`` in mono ns, ``phases`` with start and end marks.
    """
    marks = found["marks"]
    origin_ns = marks["accepted"]
    phases = [p for p in found["phases"] if p["start"] in marks and p["end"] in marks]
    end_ns = max([marks[p["end"]] for p in phases], default=origin_ns)
    scale = BAR_COLUMNS / max(1, end_ns - origin_ns)
    tier = f"cold start from {found['cold_tier']}" if found["cold_tier"] else "hot"
    if found.get("error"):
        tier += f", ended with {found['error']}"
    first = f"first byte after {found['ttft_ms']:.1f} ms" if found["ttft_ms"] else "no byte of an answer"
    lines = [f"{found['request_id']}  {found['model']}  {tier}  {first}"]
    for phase in phases:
        start_ns = max(0, marks[phase["start"]] - origin_ns)
        duration_ns = max(0, marks[phase["end"]] - origin_ns - start_ns)
        left = min(BAR_COLUMNS - 1, int(start_ns * scale))
        width = max(1, min(BAR_COLUMNS - left, round(duration_ns * scale)))
        lines.append(
            f"  {phase['name']:<12}{' ' * left}{'█' * width:<{BAR_COLUMNS - left}} {duration_ns / 1e6:8.2f} ms"
        )
    if found.get("clock_error_ms") is not None:
        lines.append(
            f"  the worker's host has another clock: its phases may lie {found['clock_error_ms']:.1f} ms earlier"
        )
    if found.get("trace_id"):
        lines.append(f"  trace id {found['trace_id']}")
    return "\n".join(lines)


def _format_bytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count else "-"


def server_url(state_dir: Path, url: str | None) -> str:
    """``url``, else where the server of the state folder listens.

    Raises:
        NoServer: none runs.
        OSError: whether one runs cannot be seen.
    """
    if url:
        return url
    path = state_dir / "run" / "serve.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise NoServer(
            f"no server runs on {state_dir} ({path} is missing): start one with `glowplug serve`, or name it with --url"
        ) from error
    host = LOOPBACK_OF.get(found["host"], found["host"])
    return f"{found.get('scheme', 'http')}://{f'[{host}]' if ':' in host else host}:{found['port']}"


def _connect(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    if scheme != "https":
        return http.client.HTTPConnection(host, port, timeout=REQUEST_TIMEOUT_S)
    import ssl

    try:
        context = ssl.create_default_context(cafile=os.environ.get(CA_FILE))
    except OSError as error:
        raise click.ClickException(f"{CA_FILE}={os.environ.get(CA_FILE)}: not a PEM file to read: {error}") from error
    return http.client.HTTPSConnection(host, port, timeout=REQUEST_TIMEOUT_S, context=context)


def _request(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
    """The response, status checked; errors as :func:`send_request` raises them."""
    if body is None:
        return send_request(url, method, path)
    return send_request(url, method, path, json.dumps(body).encode(), {"Content-Type": "application/json"})


def send_request(
    url: str,
    method: str,
    path: str,
    payload: bytes | Iterable[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
) -> http.client.HTTPResponse:
    """The response, status checked. An iterable payload needs its Content-Length among ``headers``.

    Raises:
        NoServer: nothing answers.
        ClickException: the server answered with an error; its message.
    """
    address = urlsplit(url)
    connection = _connect(address.scheme, address.hostname or "127.0.0.1", address.port)
    sent = {**(headers or {}), **_authorization()}
    with _answering(url, "does not answer"):
        connection.request(method, path, payload, sent)
        response = connection.getresponse()
    if response.status >= 400:
        with _answering(url):
            text = response.read().decode("utf-8", "replace")
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = text[:500]
        remedy = f" (this command sends what {API_KEY} holds)" if response.status in (401, 403) else ""
        raise click.ClickException(f"{response.status}: {message}{remedy}")
    return response


def _authorization() -> dict[str, str]:
    """The header with the user's API key, if there is one.

    Raises:
        ClickException: it cannot be sent.
    """
    api_key = os.environ.get(API_KEY, "").strip()  # files end with a newline, some with a carriage return too
    if not (api_key.isascii() and api_key.isprintable()):
        raise click.ClickException(f"{API_KEY} holds characters that no API key has: set it to the key alone, gp_...")
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


@contextlib.contextmanager
def _answering(url: str, failure: str = "broke off in the middle of its answer") -> Iterator[None]:
    """What goes wrong between us and the server, as :class:`NoServer`."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise NoServer(f"{url} {failure}: {error or type(error).__name__}") from error


def get_json(url: str, path: str) -> Any:
    """The decoded answer to a GET; errors as :func:`send_request` raises them."""
    return read_json(url, _request(url, "GET", path))


def post_json(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The decoded answer to a POST; errors as :func:`send_request` raises them."""
    return read_json(url, _request(url, "POST", path, body or {}))


def read_json(url: str, response: http.client.HTTPResponse) -> Any:
    """The decoded answer of ``url``.

    Raises:
        NoServer: the answer broke off.
        ClickException: it is no JSON.
    """
    with _answering(url):
        text = response.read()
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.ClickException(f"{url} is no glowplug server: it answers with something else than JSON") from error


def read_lines(url: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The lines of an answer of ``url``, as they come. Closes it.

    Raises:
        NoServer: the answer broke off.
    """
    with response:
        lines = iter(response)
        while True:
            with _answering(url):
                line = next(lines, None)
            if line is None:
                return
            yield line
