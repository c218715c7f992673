"""``glowplug config``: check the configuration file, show what holds and where it comes from, print its schema."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from scheduler.client_commands import post_json, server_url, url_option
from scheduler.command import state_dir_option
from scheduler.config import ModelPolicy, SchedulerConfig, load_config
from scheduler.contract.config_file import SECTIONS, VARIABLES, ConfigDocument, as_text, find_config, read_document
from scheduler.contract.environment import SettingsError

#: What holds where nothing is said; the processes' own readers have the same (a test compares).
DEFAULTS: Final[dict[str, str]] = {
    "gateway.host": "127.0.0.1",
    "gateway.port": "8080",
    "gateway.admin_from_anywhere": "0",
    "gateway.request_limit_s": "600",
    "gateway.cold_start_limit_s": "120",
    "gateway.drain_grace_s": "30",
    "gateway.max_body_bytes": str(8 * 1024 * 1024),
    "gateway.api_keys": "keys/api.keys.json in the state folder",
    "gateway.cors_origins": "none",
    "gateway.files_dir": "files in the state folder",
    "gateway.max_file_bytes": str(200 * 1024 * 1024),
    "gateway.max_tenant_file_bytes": str(2 * 1024**3),
    "gateway.max_tenant_files": "1000",
    "gateway.file_retention_s": str(30 * 86_400),
    "gateway.upload_limit_s": "900",
    "gateway.max_batches": "1000",
    "gateway.max_tenant_batches": "50",
    "gateway.max_batch_lines": "50000",
    "gateway.batches_at_once": "4",
    "agent.node_id": "the host's name",
    "agent.backend": "auto",
    "agent.threads": "usable cores",
    "agent.sealed_limit_bytes": "80 % of memory",
    "agent.fill_limit_bytes_per_s": "unlimited",
    "agent.drain_grace_s": "10",
    "agent.verify": "once",
    "agent.draft_tokens": "0",
    "agent.spare_workers": "0",
    "agent.snapshot_keys": "keys/snapshot.keys in the state folder",
    "logging.level": "info",
    "logging.format": "auto",
    "logging.folder": "log in the state folder (serve), none (parts started alone)",
    "logging.audit_log": "log/audit.jsonl in the state folder",
    "tracing.endpoint": "none: no traces",
    "tracing.sampler": "parentbased_traceidratio",
    "tracing.sample_ratio": "1",
    "tracing.service_name": "glowplug",
}
#: Variables over values outside of the sections.
POLICY_VARIABLES: Final[dict[str, str]] = {
    "defaults.idle_timeout_s": "GLOWPLUG_IDLE_TIMEOUT_S",
    "defaults.max_workers": "GLOWPLUG_MAX_WORKERS",
    "unheard_grace_s": "GLOWPLUG_UNHEARD_GRACE_S",
}


class Effective(msgspec.Struct, frozen=True):
    """One setting as it holds. ``origin``: ``default``, ``file:LINE`` or ``environment:VARIABLE``."""

    name: str
    value: Any
    origin: str


def effective_settings(path: Path | None, env: Mapping[str, str] = os.environ) -> list[Effective]:
    """Every setting with where it comes from.

    Raises:
        SettingsError: the file or a variable cannot be used.
    """
    config = load_config(path, env)
    document = None if path is None else read_document(path)
    rows = list(_section_rows(document, env))
    for name in ("memory_budget_bytes", "unheard_grace_s"):
        rows.append(_row((name,), getattr(config, name), document, env))
    groups: list[tuple[tuple[str, ...], Any]] = [(("defaults",), config.defaults)]
    groups += [(("models", model), config.policy_of(model)) for model in config.models]
    groups += [(("tenant_defaults",), config.tenant_defaults)]
    groups += [(("tenants", tenant), policy) for tenant, policy in config.tenants.items()]
    for where, policy in groups:
        for field in policy.__struct_fields__:
            row = _row((*where, field), getattr(policy, field), document, env)
            if where[0] == "models" and row.origin == "default":  # it follows the defaults, wherever those are from
                row = msgspec.structs.replace(row, origin=_row(("defaults", field), 0, document, env).origin)
            rows.append(row)
    return rows


def _section_rows(document: ConfigDocument | None, env: Mapping[str, str]) -> Iterator[Effective]:
    for section, struct in SECTIONS.items():
        for field in struct.__struct_fields__:
            name, variable = f"{section}.{field}", VARIABLES[section, field]
            given = ((document.values.get(section) or {}) if document else {}).get(field)
            if env.get(variable):
                yield Effective(name, env[variable], f"environment:{variable}")
            elif given is not None and document is not None:
                yield Effective(name, as_text(given), f"file:{document.line_of((section, field))}")
            else:
                yield Effective(name, DEFAULTS.get(name, "none"), "default")


def _row(where: tuple[str, ...], value: Any, document: ConfigDocument | None, env: Mapping[str, str]) -> Effective:
    name = ".".join(where)
    if (variable := POLICY_VARIABLES.get(name)) and env.get(variable):
        return Effective(name, value, f"environment:{variable}")
    given: Any = document.values if document else {}
    for part in where:
        given = given.get(part) if isinstance(given, dict) else None
    if given is not None and document is not None:
        return Effective(name, value, f"file:{document.line_of(where)}")
    return Effective(name, value, "default")


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, from the types that read it."""
    components: Any
    (_, policy), components = msgspec.json.schema_components([SchedulerConfig, ModelPolicy])
    root = components["SchedulerConfig"]
    root["properties"]["models"]["additionalProperties"] = policy  # read over the defaults, field by field
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "glowplug.yaml",
        **{key: value for key, value in root.items() if key != "title"},
        "$defs": {name: value for name, value in components.items() if name != "SchedulerConfig"},
    }


@click.group("config")
def config_group() -> None:
    """Check and show the configuration (glowplug.yaml and the environment)."""


_file = click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))


@config_group.command()
@state_dir_option
@_file
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def check(state_dir: Path, file: Path | None, as_json: bool) -> None:
    """Check FILE (default: the one that would be used); exit code 1 with file, line and remedy where it is wrong."""
    path = file or find_config()
    try:
        load_config(path)
    except SettingsError as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "file": str(path), "error": str(error)}))
            raise SystemExit(1) from error
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps({"ok": True, "file": None if path is None else str(path)}))
    else:
        click.echo(f"{path}: ok" if path else f"no file ({state_dir}/glowplug.yaml); defaults and environment are ok")


@config_group.command()
@state_dir_option
@_file
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def show(state_dir: Path, file: Path | None, as_json: bool) -> None:
    """Show every setting that holds, and whether it is from the file, the environment or a default."""
    try:
        rows = effective_settings(file or find_config())
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(row) for row in rows], indent=2))
        return
    shown = [(row.name, _show_value(row.value), row.origin) for row in rows]
    name_width, value_width = (max(len(row[column]) for row in shown) for column in (0, 1))
    for name, value, origin in shown:
        click.echo(f"{name:<{name_width}}  {value:<{value_width}}  {origin}")


def _show_value(value: Any) -> str:
    """As the file has it: ``false``, ``300``, and ``""`` where there is nothing to see."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) and value.is_integer() and value < 1e6 else str(value) or '""'


@config_group.command()
def schema() -> None:
    """Print the JSON schema of glowplug.yaml, for editors."""
    click.echo(json.dumps(config_schema(), indent=2))


@config_group.command("reload")
@state_dir_option
@url_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def reload_command(state_dir: Path, url: str | None, as_json: bool) -> None:
    """Let every running process read policies of models and tenants again; streams go on. Exit code 1: one did not."""
    answer = post_json(server_url(state_dir, url), "/admin/config:reload")
    if as_json:
        click.echo(json.dumps(answer))
    else:
        _show_reload(answer)
    if answer["failed"] or answer["silent"]:
        raise SystemExit(1)


def _show_reload(answer: dict[str, Any]) -> None:
    """Who reloaded, and who did not and why."""
    for row in answer["reloaded"]:
        changed = ", ".join(row.get("needs_restart", ()))
        click.echo(f"{row['part']:<9}  {row['member']}: reloaded{'; after a restart: ' if changed else ''}{changed}")
    for row in answer["failed"]:
        click.echo(f"{row['part']:<9}  {row['member']}: not reloaded: {row['error']}", err=True)
    for row in answer["silent"]:
        remedy = "goes on with what it had; restart it, or reload again"
        click.echo(f"{row['part']:<9}  {row['member']}: did not answer, {remedy}", err=True)
