"""`logs`, `completion`, `top` and the conversation without a server: what they print, keep and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from scheduler import cli_reference, client_commands, conversation, operate_commands, terminal_commands
from scheduler.command import VERBS, main


@pytest.fixture(autouse=True)
def _state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWPLUG_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("GLOWPLUG_LOG_DIR", raising=False)


def test_logs_shows_the_newest_lines_of_a_level_and_a_part(tmp_path: Path) -> None:
    """-n, --level and --component choose; --json gives lines as they are; no log is an error with a remedy."""
    runner = CliRunner()
    missing = runner.invoke(main, ["logs"])
    assert (missing.exit_code, "glowplug serve" in missing.output) == (1, True)
    (tmp_path / "log").mkdir()
    events = [
        {"event": f"e{i}", "level": "error" if i % 2 else "info", "component": "agent" if i < 8 else "gateway", "i": i}
        for i in range(10)
    ]
    (tmp_path / "log" / "glowplug.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"cut')
    shown = runner.invoke(main, ["logs", "--level", "error", "--json"]).output.splitlines()
    assert [json.loads(line)["i"] for line in shown] == [1, 3, 5, 7, 9]
    shown = runner.invoke(main, ["logs", "--level", "error", "-n", "3", "--json"]).output.splitlines()
    assert [json.loads(line)["i"] for line in shown] == [5, 7, 9]  # the newest three errors, however many lines ago
    shown = runner.invoke(main, ["logs", "--component", "gateway"]).output.splitlines()
    assert [line.split()[-1] for line in shown] == ["i=8", "i=9"]


def test_following_goes_on_in_the_new_file_after_a_rotation(tmp_path: Path) -> None:
    """Lines before and after the file was renamed come once each, in order."""
    path = tmp_path / "a.jsonl"
    path.write_text("1\n2\n")
    lines = terminal_commands._tail(path, 1, lambda _: True, follow=True)
    assert next(lines) == "2"
    with path.open("a") as file:
        file.write("3\n")
    assert next(lines) == "3"
    path.rename(tmp_path / "a.jsonl.1")
    path.write_text("4\n")
    assert next(lines) == "4"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_asks_glowplug(shell: str) -> None:
    """The script calls back with _GLOWPLUG_COMPLETE, which lists verbs without a server."""
    runner = CliRunner()
    assert "_GLOWPLUG_COMPLETE" in runner.invoke(main, ["completion", shell]).output
    env = {"_GLOWPLUG_COMPLETE": "bash_complete", "COMP_WORDS": "glowplug do", "COMP_CWORD": "1"}
    asked = runner.invoke(main, [], env=env, prog_name="glowplug")
    assert "doctor" in asked.output


def test_top_prints_one_table_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a terminal: one look. --json with --count: so many lines."""
    status: dict[str, Any] = {"leader": "x", "models": [], "nodes": [], "workers": [], "drained_nodes": []}
    monkeypatch.setattr(terminal_commands, "get_json", lambda *_: status)
    runner = CliRunner()
    shown = runner.invoke(main, ["top", "--url", "http://127.0.0.1:1"])
    assert (shown.exit_code, "MODEL" in shown.output) == (0, True), shown.output
    lines = runner.invoke(main, ["top", "--url", "http://x", "--json", "--count", "2", "--every-s", "0.1"]).output
    assert [json.loads(line) for line in lines.splitlines()] == [status] * 2


def test_a_model_s_name_is_whole_in_a_pipe_and_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe has no width; a terminal that is too narrow breaks the name and loses none of it."""
    name = "mistral-small-3.2-24b-instruct-2506-of-march-with-a-long-name-q4-k-m"
    row = {"name": name, "tier": "T4", "state": "ready", "workers": 1, "in_flight": 64, "sealed_bytes": 2**34}
    row |= {
        "worker_bytes": 2**34,
        "proportional_bytes": 2**34,
        "idle_for_s": 1,
        "idle_timeout_s": 9999,
        "pinned": False,
    }
    status = {"leader": "x", "models": [row], "nodes": [], "workers": [], "drained_nodes": []}
    for module in (client_commands, terminal_commands):
        monkeypatch.setattr(module, "get_json", lambda *_: status)
    for verb in ("ps", "top"):
        shown = CliRunner().invoke(main, [verb, "--url", "http://x"]).output
        assert f"{name}  T4    ready" in shown
        narrow = CliRunner().invoke(main, [verb, "--url", "http://x"], env={"COLUMNS": "100"}).output
        assert name in "".join(line.split(" ")[0] for line in narrow.splitlines())


def test_a_trace_is_found_by_what_answers_and_streams_call_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The id of a completion, of a message, of a stream's event; a request without an answer has no first byte."""
    asked: list[str] = []
    found = {"request_id": "01AB", "model": "m", "cold_tier": None, "ttft_ms": 0.0, "marks": {"accepted": 1}}

    def answer(_: str, path: str) -> dict[str, Any]:
        asked.append(path)
        return {**found, "phases": [], "error": "cancelled"}

    monkeypatch.setattr(client_commands, "get_json", answer)
    for shown in ("01AB", "chatcmpl-01AB", "cmpl-01AB", "resp_01AB", "msg_01AB", "01AB:7", "a/b?c"):
        result = CliRunner().invoke(main, ["trace", shown, "--url", "http://x"])
        assert "ended with cancelled  no byte of an answer" in result.output
    assert asked == ["/admin/traces/01AB"] * 6 + ["/admin/traces/a%2Fb%3Fc"]


def test_a_drain_that_is_not_over_is_not_called_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """After --wait-s the workers and spares that are left are named, with exit code 1; none left: done."""
    gpus = [{"spare_workers": 2}]
    status = {"nodes": [{"node_id": "n", "gpus": gpus}], "workers": [{"worker_id": "m-1", "node_id": "n"}]}
    monkeypatch.setattr(operate_commands, "post_json", lambda *_: {})
    monkeypatch.setattr(operate_commands, "get_json", lambda *_: status)
    late = CliRunner().invoke(main, ["drain", "n", "--url", "http://x", "--wait-s", "0.1"])
    assert (late.exit_code, "after 0.1 s it still has m-1, 2 spares" in late.output) == (1, True), late.output
    status.update(nodes=[], workers=[])
    assert CliRunner().invoke(main, ["drain", "n", "--url", "http://x"]).output == "n: drained\n"


def test_a_conversation_carries_its_messages_and_its_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second question carries the first answer; /system and /clear begin anew; history is private."""
    bodies: list[dict[str, Any]] = []

    def answer(_: str, body: dict[str, Any]) -> list[str]:
        bodies.append(body)
        return ["an", "swer"]

    monkeypatch.setattr(conversation, "stream_chat", answer)
    typed = "first\nsecond\n/system be brief\n/system\nthird\n/clear\n/nonsense\nfourth\n/quit\nnever\n"
    done = CliRunner().invoke(main, ["run", "m", "--url", "http://x", "--max-tokens", "3"], input=typed)
    assert done.exit_code == 0, done.output
    contents = [[message["content"] for message in body["messages"]] for body in bodies]
    assert contents == [["first"], ["first", "answer", "second"], ["be brief", "third"], ["be brief", "fourth"]]
    assert bodies[0]["max_tokens"] == 3
    assert "/nonsense is not known" in done.output
    assert (tmp_path / "run_history").stat().st_mode & 0o077 == 0


def test_a_conversation_from_a_pipe_ends_with_the_error_it_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """`echo ... | glowplug run m || ...`: nobody is there to read it and go on."""

    def refuse(*_: Any) -> None:
        raise click.ClickException("404: no model")

    monkeypatch.setattr(conversation, "stream_chat", refuse)
    done = CliRunner().invoke(main, ["run", "m", "--url", "http://x"], input="first\nsecond\n")
    assert (done.exit_code, done.output.count("404: no model")) == (1, 1)


def test_no_server_is_exit_code_3_for_every_verb_that_needs_one() -> None:
    """The documented exit codes: 3 where nothing answers, 2 for wrong usage."""
    runner = CliRunner()
    for words in (["ps"], ["top"], ["usage"], ["run", "m", "p"], ["trace", "--last"], ["wake", "m"], ["drain", "n"]):
        assert runner.invoke(main, words).exit_code == 3, words
    assert runner.invoke(main, ["ps", "--no-such-option"]).exit_code == 2


def test_the_reference_is_what_the_commands_say() -> None:
    """docs/cli.md is up to date: `python -m scheduler.cli_reference` writes it."""
    text = cli_reference.TARGET.read_text(encoding="utf-8")
    assert text == cli_reference.reference(), "run python -m scheduler.cli_reference"
    assert all(f"## glowplug {verb}\n" in text for verb in VERBS)
