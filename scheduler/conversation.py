"""``glowplug run MODEL`` without a prompt: a conversation in the terminal, with history that is kept."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, Final

import click

from scheduler.client_commands import stream_chat

MAX_HISTORY_LINES: Final = 1000
HELP: Final = """/system TEXT   begin again with this system prompt (without TEXT: show it)
/clear         forget the conversation
/help          this
/quit          leave (Ctrl-D too); Ctrl-C stops an answer"""


class Conversation:
    """Messages so far, and the loop that reads and answers. ``options`` go into each request."""

    def __init__(self, address: str, model: str, options: dict[str, Any], system: str | None) -> None:
        self._address = address
        self._model = model
        self._options = options
        self._system = system
        self._messages: list[dict[str, str]] = []

    def run(self, history: Path) -> None:
        """Read lines until /quit or the end of input. ``history`` keeps them, for this user only."""
        with _line_editing(history):
            while True:
                try:
                    line = input(f"{self._model}> " if sys.stdin.isatty() else "").strip()
                except EOFError:
                    return
                except KeyboardInterrupt:
                    click.echo()
                    continue
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/clear":
            self._messages.clear()
        elif name == "/system" and rest:
            self._system = rest.strip()
            self._messages.clear()
        elif name == "/system":
            click.echo(self._system or "none")
        else:
            click.echo(HELP if name == "/help" else f"{name} is not known\n{HELP}")

    def _answer(self, line: str) -> None:
        asked = {"role": "user", "content": line}
        system = [{"role": "system", "content": self._system}] if self._system else []
        body = {"model": self._model, "messages": [*system, *self._messages, asked], "stream": True, **self._options}
        pieces: list[str] = []
        try:
            for text in stream_chat(self._address, body):
                pieces.append(text)
                click.echo(text, nl=False)
                sys.stdout.flush()
        except click.ClickException as error:
            if not sys.stdin.isatty():
                raise  # a script is to see it in the exit code
            click.echo(f"{error.format_message()}", err=True)
            return  # the question is not part of the conversation
        except KeyboardInterrupt:
            pass  # what was said so far stays
        click.echo()
        self._messages += [asked, {"role": "assistant", "content": "".join(pieces)}]


@contextlib.contextmanager
def _line_editing(history: Path) -> Any:
    try:
        import readline
    except ImportError:  # some Pythons are built without
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(MAX_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.touch(mode=0o600)
            readline.write_history_file(history)
            history.chmod(0o600)
