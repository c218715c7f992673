"""The ``glowplug`` command: a thin table from verb to the module that does it, imported only when called.

Modules are named by string, so this table may point into every package without an import between layers.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any, Final

import click

from scheduler.contract import environment

#: verb -> (module, attribute, one line of help)
VERBS: Final[dict[str, tuple[str, str, str]]] = {
    "build": ("worker.build.command", "build", "Turn a model into a signed snapshot."),
    "verify": ("worker.build.store_commands", "verify", "Re-hash a snapshot and say what is wrong, and where."),
    "inspect": ("worker.build.inspect_command", "inspect_command", "Show what a snapshot consists of."),
    "export": ("worker.build.transport_commands", "export_command", "Write a snapshot to one compressed file."),
    "import": ("worker.build.transport_commands", "import_command", "Bring a snapshot in from a file."),
    "gc": ("worker.build.store_commands", "gc", "Delete blobs that no snapshot names."),
    "keys": ("worker.build.keys_command", "keys", "Manage keys: of snapshots, and of the API."),
    "resign": ("worker.build.keys_command", "resign", "Sign snapshots with the newest key."),
    "guests": ("guests.command", "guests", "Compile, inspect and run guests (WebAssembly)."),
    "kernels": ("worker.backends.kernels.command", "kernels", "Build and check the CUDA kernels."),
    "serve": ("scheduler.serve_command", "serve", "Start everything on this machine and serve."),
    "gateway": ("scheduler.serve_command", "gateway", "Start the HTTP gateway alone."),
    "scheduler": ("scheduler.serve_command", "scheduler", "Start the scheduler alone."),
    "agent": ("scheduler.serve_command", "agent", "Start the node agent (and its workers) alone."),
    "doctor": (
        "worker.diagnosis.command",
        "doctor",
        "Check this machine and this set-up; says how to fix what is wrong.",
    ),
    "top": ("scheduler.terminal_commands", "top", "Watch models, workers and requests live."),
    "logs": ("scheduler.terminal_commands", "logs", "Show and follow the log files of the state folder."),
    "completion": ("scheduler.terminal_commands", "completion", "Print shell completion for bash, zsh or fish."),
    "config": ("scheduler.config_command", "config_group", "Check and show the configuration."),
    "ps": ("scheduler.client_commands", "ps", "Show models, tiers, workers and idle timers."),
    **{
        verb: ("scheduler.operate_commands", verb, text)
        for verb, text in (
            ("wake", "Start a worker for a model, without a request."),
            ("park", "Return a model's device memory, where its backend can."),
            ("unload", "Drain a model to zero and forget its sealed bytes."),
            ("pin", "Keep a model awake: it is never scaled to zero."),
            ("unpin", "Let a pinned model sleep again."),
            ("prefetch", "Verify a model into sealed memory, without a process."),
            ("drain", "Move work off a node: no new workers, present ones finish."),
            ("undrain", "Let a drained node work again."),
        )
    },
    "usage": ("scheduler.usage_command", "usage", "Show what tenants and keys have used."),
    "run": ("scheduler.client_commands", "run", "Stream an answer to the terminal."),
    "batch": ("scheduler.batch_command", "batch", "Submit many requests in a file, and get their answers."),
    "trace": ("scheduler.client_commands", "trace", "Draw where the time of a request went."),
}


#: (verb, sub-verb) -> (module, attribute): sub-verbs that another package than the verb's own offers
SUB_VERBS: Final[dict[tuple[str, str], tuple[str, str]]] = {
    ("keys", "api"): ("scheduler.api_keys_command", "api"),
}


#: What the kernel says of a folder that this user cannot use as it was asked for.
UNUSABLE_PATH: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class RefusedSettings(click.ClickException):
    """A variable or the configuration file cannot be used."""

    exit_code = environment.EXIT_SETTINGS


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called. What a user can cure ends in a message, whichever
    command met it: settings that cannot be used, a folder that this user may not read or write."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except environment.SettingsError as error:
            raise RefusedSettings(str(error)) from error
        except OSError as error:
            if error.errno not in UNUSABLE_PATH or not isinstance(error.filename, str):
                raise
            raise click.ClickException(
                f"{error.filename}: {error.strerror}: run as the user who owns it, or choose another --state-dir"
            ) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and (near := difflib.get_close_matches(args[0], VERBS, n=3)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {' or '.join(near)}?")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        # Read when NumPy is imported: OpenBLAS's own threads would spin beside the product threads of a build.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        module, attribute, _ = VERBS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        for (verb, sub_verb), (sub_module, sub_attribute) in SUB_VERBS.items():
            if verb == cmd_name and isinstance(command, click.Group):
                command.add_command(getattr(importlib.import_module(sub_module), sub_attribute), sub_verb)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of verbs, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, _, text) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="glowplug")
def main() -> None:
    """Scale-to-zero LLM inference that wakes in the time of one prefill."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal has not shows as "?" and ends nothing
            stream.reconfigure(errors="replace")


def state_dir_option(function: Any) -> Any:
    """``--state-dir``, exported to the environment so that every process of this command agrees."""

    def export(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path:
        chosen = value.absolute() if value else environment.read_state_dir()
        os.environ[environment.STATE_DIR] = str(chosen)
        return chosen

    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        callback=export,
        help="Folder of snapshots, keys and queue (default: the user's data folder).",
    )(function)


if __name__ == "__main__":
    sys.exit(main())
