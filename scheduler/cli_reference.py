"""Writes docs/cli.md from the commands themselves: ``python -m scheduler.cli_reference`` (a test compares)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from scheduler.command import VERBS, main

TARGET: Final = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD: Final = """# The command line

Written by `python -m scheduler.cli_reference` from the commands themselves; do not edit.

## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | the server refused, something failed, or `doctor` or `verify` found a failure; the message says what to do |
| 2 | wrong usage; `verify`, `inspect`, `export`, `import`, `gc`, `resign` and `keys`: or could not look (no key, ...) |
| 3 | no server answers where it should |
| 4 | a batch has ended, but not every line was answered |
| 78 | a process was started with settings that cannot be used; starting it again does not help |
| 130 | Ctrl-C while waiting for a batch, which goes on |

Messages go to stderr, answers to stdout; `--json` is for programs. Progress is shown on a terminal only.
"""


def reference() -> str:
    """The whole document."""
    parts = [HEAD]
    for verb, (_, _, text) in VERBS.items():
        command = main.get_command(click.Context(main), verb)
        assert command is not None, verb
        parts += [f"## glowplug {verb}\n", f"{text}\n", *_describe(command, f"glowplug {verb}")]
    return "\n".join(parts).rstrip() + "\n"


def _describe(command: click.Command, name: str) -> Iterator[str]:
    help_text = inspect.cleandoc(command.help or "").replace("\n\n", "\n").replace("|", "\\|")
    if isinstance(command, click.Group):
        for sub_name in command.list_commands(click.Context(command)):
            sub_command = command.get_command(click.Context(command), sub_name)
            assert sub_command is not None, sub_name
            yield f"### {name} {sub_name}\n"
            yield from _describe(sub_command, f"{name} {sub_name}")
        return
    arguments = " ".join(
        p.make_metavar(click.Context(command)) for p in command.params if p.param_type_name == "argument"
    )
    yield f"```\n{name} {arguments}".rstrip() + "\n```\n"
    if help_text:
        yield help_text + "\n"
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    if options:
        yield "| option | |\n|---|---|"
        for option in options:
            default = (
                "" if option.is_flag or option.default in (None, ()) or not option.show_default else option.default
            )
            text = (option.help or "").replace("|", "\\|") + (f" (default {default})" if default != "" else "")
            yield f"| `{', '.join(option.opts)}` | {text} |"
        yield ""


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    sys.exit(0)
