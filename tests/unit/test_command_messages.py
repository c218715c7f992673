"""What the commands say where the user can cure it: settings, folders, addresses. One line, no traceback."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from scheduler import api_keys_command, batch_command, client_commands
from scheduler.command import main
from worker.diagnosis.command import _check_redis
from worker.diagnosis.setup_checks import check_configuration


@pytest.fixture(autouse=True)
def _state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWPLUG_STATE_DIR", str(tmp_path))


def refuse(*arguments: str) -> Result:
    """The result of a command that ends in a message."""
    result = CliRunner().invoke(main, list(arguments))
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Error: " in result.output
    return result


@pytest.mark.parametrize("verb", ["serve", "gateway", "scheduler", "agent"])
@pytest.mark.parametrize(
    ("variable", "value"),
    [("REDIS_URL", "nonsense"), ("GLOWPLUG_LOG_LEVEL", "loud"), ("GLOWPLUG_CONFIG", "/none.yaml")],
)
def test_what_starts_processes_ends_with_78_where_settings_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, verb: str, variable: str, value: str
) -> None:
    """The status that service managers do not try again after, and the setting's name or file."""
    monkeypatch.setenv(variable, value)
    result = refuse(verb)
    assert result.exit_code == 78
    assert (variable if variable != "GLOWPLUG_CONFIG" else value) in result.output


def test_doctor_calls_a_wrong_address_of_the_queue_server_wrong_and_not_itself_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A port that is none: a failure with a remedy. A scheme that is none: the check of the configuration tells it."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:99999")
    (finding,) = _check_redis()
    assert (finding.level, "ports up to 65535" in finding.seen, finding.remedy[:10]) == ("fail", True, "correct it")
    monkeypatch.setenv("REDIS_URL", "nonsense")
    assert list(_check_redis()) == []
    assert "REDIS_URL" in next(check_configuration()).seen


def test_a_verb_that_needs_no_queue_server_does_not_ask_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program's REDIS_URL is nothing to a client of ours."""
    monkeypatch.setenv("REDIS_URL", "nonsense")
    assert refuse("ps").exit_code == 3


@pytest.mark.parametrize("arguments", [("serve",), ("config", "show"), ("logs",)])
def test_a_folder_that_cannot_be_used_is_named(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what the kernel said of it; whichever command met it first."""
    monkeypatch.setattr(Path, "stat", deny)
    monkeypatch.setattr(Path, "mkdir", deny)
    result = refuse(*arguments)
    assert (result.exit_code, "Permission denied" in result.output, str(tmp_path) in result.output) == (1, True, True)


def deny(path: Path, *_: Any, **__: Any) -> None:
    """What a folder of somebody else's says."""
    raise PermissionError(13, "Permission denied", str(path))


def test_a_server_s_address_that_may_not_be_read_is_not_a_server_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's folder: "start one" would be the wrong advice."""
    monkeypatch.setattr(Path, "read_text", deny)
    result = refuse("ps")
    assert "Permission denied" in result.output
    assert "glowplug serve" not in result.output


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("::1", "http://[::1]:8080"),
        ("::", "http://[::1]:8080"),
        ("0.0.0.0", "http://127.0.0.1:8080"),
        ("10.0.0.9", "http://10.0.0.9:8080"),
    ],
)
def test_the_server_of_a_state_folder_is_asked_where_it_can_be_reached(tmp_path: Path, host: str, address: str) -> None:
    """IPv6 in brackets; one that listens everywhere, on loopback."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "serve.json").write_text(json.dumps({"host": host, "port": 8080}))
    assert client_commands.server_url(tmp_path, None) == address


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "localhost", "ftp://127.0.0.1", "http://", "http://127.0.0.1:99999"])
@pytest.mark.parametrize("verb", [("ps",), ("run", "m", "hi"), ("pin", "m"), ("batch", "list"), ("config", "reload")])
def test_an_address_that_is_none_is_wrong_usage(verb: tuple[str, ...], url: str) -> None:
    """Not asked at port 80 of this machine, which then "does not answer"."""
    result = refuse(*verb, "--url", url)
    assert result.exit_code == 2
    assert "http://127.0.0.1:8080" in result.output
    assert url in result.output


def test_an_address_may_end_like_that_of_an_openai_client() -> None:
    """A slash, or /v1 as in a client's base_url, is no part of it."""
    for url in (
        "http://127.0.0.1:8080",
        "http://127.0.0.1:8080/",
        "http://127.0.0.1:8080/v1",
        "http://127.0.0.1:8080/v1/",
    ):
        assert client_commands.check_url(None, None, url) == "http://127.0.0.1:8080"  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", [("ps",), ("run", "m", "hi"), ("batch", "list")])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:", "broke off "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\ndata:", "broke off "),
        (b"", "does not answer"),
        (b"nonsense\r\n\r\n", "does not answer"),
    ],
)
def test_a_server_that_dies_while_it_answers_is_told_so(verb: tuple[str, ...], answer: bytes, expected: str) -> None:
    """Exit code 3, as where none answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, connection.makefile("rb") as request:
                num_bytes = 0
                while line := request.readline().strip():
                    if line.lower().startswith(b"content-length:"):
                        num_bytes = int(line.split(b":")[1])
                request.read(num_bytes)  # all of it: closing with bytes unread would reset the connection
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        result = refuse(*verb, "--url", f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert (result.exit_code, expected in result.output) == (3, True), result.output


def test_a_key_that_cannot_be_sent_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key from a file ends with a newline or a carriage return: that is no part of it."""
    for text in ("gp_a\nb", "gp_\u043a"):
        monkeypatch.setenv("GLOWPLUG_API_KEY", text)
        result = refuse("ps", "--url", "http://127.0.0.1:1")
        assert "GLOWPLUG_API_KEY" in result.output
        assert "gp_a" not in result.output
    monkeypatch.setenv("GLOWPLUG_API_KEY", "gp_abc\r\n")
    assert client_commands._authorization() == {"Authorization": "Bearer gp_abc"}


def test_keys_are_listed_whatever_the_queue_server_s_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """When they were last used is worth having, not worth failing for: sentinels that are away, too."""
    assert CliRunner().invoke(main, ["keys", "api", "new", "--note", "mine"]).exit_code == 0
    for url in ("redis+sentinel://127.0.0.1:1/main", "redis://127.0.0.1:1", "unix:///nowhere.sock"):
        monkeypatch.setenv("REDIS_URL", url)
        monkeypatch.setattr(api_keys_command, "READ_LIMIT_S", 0.1)
        listed = CliRunner().invoke(main, ["keys", "api", "list"])
        assert (listed.exit_code, "mine" in listed.output) == (0, True), listed.output


def test_results_that_cannot_be_written_are_told_before_the_batch_or_with_the_way_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is not there: wrong usage, nothing is submitted. A disk that is full at the end: what to repeat."""
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"url": "/v1/chat/completions"}')
    result = refuse("batch", "submit", str(requests), "--wait", "-o", "/none/results.jsonl", "--url", "http://x")
    assert (result.exit_code, "/none is no folder" in result.output) == (2, True)

    def fill(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    ended = {"id": "batch_1", "status": "completed"}
    monkeypatch.setattr(batch_command, "get_json", lambda *_: ended)
    monkeypatch.setattr(batch_command, "_write_results", fill)
    result = refuse("batch", "results", "batch_1", "-o", str(tmp_path / "out"), "--url", "http://x")
    assert "No space left on device; `glowplug batch results batch_1 -o FILE` tries again" in result.output
    assert list(tmp_path.glob("*.part")) == []


def test_a_verb_with_a_slip_is_told_the_right_one() -> None:
    """Close ones only."""
    assert "Did you mean serve?" in refuse("servee").output
    assert "Did you mean" not in refuse("frobnicate").output


def test_on_a_terminal_a_wake_is_shown_until_the_first_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line on stderr, erased before the answer and when the wake fails; nothing of it in a pipe."""
    stream = [b": waking model=m stage=queued eta_ms=9\n", b": waking model=m stage=spawning eta_ms=4\n"]
    stream += [b'data: {"choices": [{"delta": {"content": "hi"}}]}\n', b"data: [DONE]\n"]
    monkeypatch.setattr(client_commands, "_request", lambda *_: None)
    monkeypatch.setattr(client_commands, "read_lines", lambda *_: iter(stream))
    monkeypatch.setenv("TERM", "xterm")
    erase = "\r\x1b[K"
    for is_terminal, expected in ((True, f"{erase}waking m: queued{erase}waking m: spawning{erase}"), (False, "")):
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda answer=is_terminal: answer)
        monkeypatch.setattr(sys, "stderr", terminal)
        assert list(client_commands.stream_chat("http://x", {})) == ["hi"]
        assert terminal.getvalue() == expected


def test_letters_that_the_terminal_has_not_end_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Latin-1 terminal: bars of `trace` become question marks."""
    trace = {"request_id": "a", "model": "m", "cold_tier": "T2", "ttft_ms": 1.0, "marks": {"accepted": 1, "b": 2}}
    phases = [{"name": "queue", "start": "accepted", "end": "b"}]
    monkeypatch.setattr(client_commands, "get_json", lambda *_: {**trace, "phases": phases})
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    main(["trace", "--last", "--url", "http://x"], standalone_mode=False)
    sys.stdout.flush()
    assert b"queue       ????" in written.getvalue()
