"""``glowplug doctor``: is this machine fit, and is this set-up whole? Exit code 0 unless something fails."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from scheduler.contract.config_file import apply_config_file
from scheduler.contract.environment import STATE_DIR, SettingsError, read_process_settings
from worker.build.command_support import resolve_state_dir, state_dir_option
from worker.diagnosis import host_checks, setup_checks
from worker.diagnosis.findings import Check, Finding, run_check

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def diagnose(state_dir: Path) -> list[Finding]:
    """All findings, in the order in which they are best read. Blocks; starts nothing."""
    checks: list[tuple[str, Check]] = [
        ("kernel", host_checks.check_kernel),
        ("limits", host_checks.check_limits),
        ("memory", host_checks.check_memory),
        ("processor", host_checks.check_processor),
        ("clock", host_checks.check_clock),
        ("GPU", host_checks.check_gpu),
        ("disk", functools.partial(host_checks.check_disk, state_dir)),
        ("configuration", setup_checks.check_configuration),
        ("keys", functools.partial(setup_checks.check_keys, state_dir)),
        ("snapshots", functools.partial(setup_checks.check_store, state_dir)),
        ("Redis", _check_redis),
        ("server", functools.partial(setup_checks.check_server, state_dir)),
        ("served GPUs", functools.partial(setup_checks.check_served_gpus, state_dir)),
    ]
    try:
        apply_config_file()
    except SettingsError:
        pass  # told by the check of the configuration
    return [finding for name, check in checks for finding in run_check(name, check)]


def _check_redis() -> Iterator[Finding]:
    try:
        url = read_process_settings().redis_url
    except SettingsError:
        return  # told by the check of the configuration
    if not os.environ.get("REDIS_URL") and not Path(url.removeprefix("unix://")).exists():
        yield Finding("Redis", "ok", "embedded; starts with `glowplug serve`")
        return
    yield from asyncio.run(setup_checks.check_redis(url))


@click.command()
@state_dir_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def doctor(state_dir: Path | None, as_json: bool) -> None:
    """Check kernel, limits, memory, processor, GPU, disk, configuration, keys, snapshots, Redis and server.

    Each line is ok, warn or fail, and says what to do. Exit code 1 if anything fails.
    """
    folder = resolve_state_dir(state_dir)
    os.environ[STATE_DIR] = str(folder)
    findings = diagnose(folder)
    failed = any(finding.level == "fail" for finding in findings)
    if as_json:
        rows = [msgspec.to_builtins(finding) for finding in findings]
        click.echo(json.dumps({"ok": not failed, "findings": rows}, indent=2))
    else:
        for finding in findings:
            level = click.style(f"{finding.level:<4}", fg=COLOURS[finding.level])
            click.echo(f"{level}  {finding.check:<18} {finding.seen}")
            if finding.remedy:
                click.echo(f"      {'':<18} -> {finding.remedy}")
    sys.exit(1 if failed else 0)
