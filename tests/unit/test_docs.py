"""What the documents tell people to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from scheduler.command import VERBS, main

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")])
DOCUMENTS = [path for path in DOCUMENTS if ".venv" not in path.parts and "node_modules" not in path.parts]


def typed_commands(text: str) -> list[list[str]]:
    """Words of every ``glowplug VERB ...`` in code spans and blocks, comments and shell operators cut off."""
    code = re.findall(r"```(?:sh|shell|bash|console)?\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
    lines = [line for block in code for line in block.splitlines()]
    found = []
    for line in lines:
        match = re.match(r"^(?:\$ )?(?:\S*/)?glowplug (?P<rest>[a-z].*)", line.strip())
        if match:
            words = shlex.split(match["rest"].split(" #")[0].split(" > ")[0].split(" | ")[0], posix=True)
            found.append(words)
    return found


def command_of(words: list[str]) -> click.Command:
    """The command that ``words`` call, sub-commands followed."""
    command = main.get_command(click.Context(main), words[0])
    assert command is not None
    for word in words[1:]:
        if not isinstance(command, click.Group):
            break
        found = command.get_command(click.Context(command), word)
        assert found is not None, f"glowplug {words[0]} has no {word}"
        command = found
    return command


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_the_documents_exists_with_its_options(path: Path) -> None:
    """Verbs, sub-verbs and options that a document names are those of the program."""
    for words in typed_commands(path.read_text(encoding="utf-8")):
        for verb in words[0].split("|"):
            assert verb in VERBS, f"{path.name}: glowplug {verb}"
        if "|" in words[0]:
            continue
        options = {option for parameter in command_of(words).params for option in (*parameter.opts,)}
        for word in words[1:]:
            if word.startswith("--") and not word.startswith("--no-such"):
                assert word.split("=")[0] in options, f"{path.name}: glowplug {' '.join(words)}: {word}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(path: Path) -> None:
    """Relative links in documents point at files of the repository."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_in_the_documents_exists(path: Path) -> None:
    """`make TARGET` names a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8")):
        assert target in targets, f"{path.name}: make {target}"


def test_the_compose_file_starts_every_part_with_a_known_verb() -> None:
    """redis, gateway, scheduler and worker; each of ours by a verb of the command, none of them privileged."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(services) == {"redis", "gateway", "scheduler", "worker"}
    for name in ("gateway", "scheduler", "worker"):
        assert services[name]["command"][0] in VERBS
        assert "privileged" not in services[name]
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy"
