"""``glowplug keys api``: make, list and revoke the keys that clients send."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from scheduler.api_keys import ApiKey, ApiKeyError, Scope, change_keys, create_key, key_file_path, load_keys
from scheduler.audit_log import audit_to_file
from scheduler.command import state_dir_option
from scheduler.contract import keys as redis_keys
from scheduler.contract.environment import read_process_settings
from scheduler.plain_tables import make_console, make_table

DAY_S: Final = 86_400
READ_LIMIT_S: Final = 1.0
CLI_ACTOR: Final = "command-line"


@click.group(short_help="Manage the API keys that clients send.")
def api() -> None:
    """Manage the API keys that clients send. Running gateways take every change within a second."""


@api.command("new", short_help="Make a key and show it once.")
@state_dir_option
@click.option("--tenant", default="default", show_default=True, help="Whose requests they are: quota, share, cache.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice([scope.value for scope in Scope]),
    multiple=True,
    default=(Scope.INFER.value,),
    show_default=True,
    help="What it may do; may be given several times.",
)
@click.option("--model", "models", multiple=True, help="Only these models, * allowed (default: all). Others are 404.")
@click.option("--expires-days", type=click.FloatRange(min=0, min_open=True), help="Refuse it after so many days.")
@click.option("--note", default="", help="For people, e.g. who has it.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def new_key(
    state_dir: Path,
    tenant: str,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
    expires_days: float | None,
    note: str,
    as_json: bool,
) -> None:
    """Make a key. It is shown once; only a digest of it is kept."""
    path = key_file_path(state_dir)
    expires_at_s = None if expires_days is None else int(time.time() + expires_days * DAY_S)
    wanted = tuple(dict.fromkeys(Scope(scope) for scope in scopes))
    try:
        key, token = create_key(tenant, wanted, models=models, expires_at_s=expires_at_s, note=note)
        change_keys(path, lambda keys: (*keys, key))
    except ApiKeyError as error:
        raise click.ClickException(str(error)) from error
    audit_to_file(state_dir, CLI_ACTOR, "api_key_created", key_id=key.id, tenant=tenant, scopes=list(wanted))
    if as_json:
        click.echo(msgspec.json.encode({"key": token, **_describe(key, None)}))
        return
    click.echo(token)
    click.echo(f"tenant {tenant}, scopes {', '.join(wanted)}; kept as a digest in {path}. Not shown again.", err=True)


@api.command("list", short_help="List keys by prefix; never secrets.")
@state_dir_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def list_keys(state_dir: Path, as_json: bool) -> None:
    """List all keys: prefix, tenant, scopes, models, when made and last used."""
    path = key_file_path(state_dir)
    try:
        found = load_keys(path)
    except ApiKeyError as error:
        raise click.ClickException(str(error)) from error
    used_at_s = _read_last_used() if found is not None else {}
    rows = [_describe(key, used_at_s.get(key.id)) for key in (() if found is None else found.keys)]
    if as_json:
        click.echo(msgspec.json.encode(rows))
        return
    if not rows:
        click.echo(f"no API keys in {path}: make one with `glowplug keys api new`", err=True)
        return
    table = make_table("KEY", "STATE", "TENANT", "SCOPES", "MODELS", "CREATED", "LAST USED", "EXPIRES", "NOTE")
    for row in rows:
        times = (_show_time(row[name]) for name in ("created_at_s", "last_used_at_s", "expires_at_s"))
        table.add_row(
            f"{row['prefix']}…",
            row["state"],
            row["tenant"],
            ",".join(row["scopes"]),
            ",".join(row["models"]) or "all",
            *times,
            row["note"],
        )
    make_console().print(table)


@api.command("revoke", short_help="Refuse a key from now on.")
@click.argument("key_id")
@state_dir_option
def revoke_key(key_id: str, state_dir: Path) -> None:
    """Revoke the key with KEY_ID (or its prefix, gp_ID). Requests that run go on to their end."""
    wanted = key_id.removeprefix("gp_").partition("_")[0]

    def revoke(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        if wanted not in {key.id for key in keys}:
            raise ApiKeyError(f"no key gp_{wanted} here: `glowplug keys api list` shows them")
        now_s = int(time.time())
        return tuple(
            msgspec.structs.replace(key, revoked_at_s=key.revoked_at_s or now_s) if key.id == wanted else key
            for key in keys
        )

    try:
        change_keys(key_file_path(state_dir), revoke)
    except ApiKeyError as error:
        raise click.ClickException(str(error)) from error
    audit_to_file(state_dir, CLI_ACTOR, "api_key_revoked", key_id=wanted)
    click.echo(f"gp_{wanted} is revoked")


def _describe(key: ApiKey, last_used_at_s: int | None) -> dict[str, Any]:
    return {
        "id": key.id,
        "prefix": key.prefix,
        "state": key.state_at(time.time()),
        "tenant": key.tenant,
        "scopes": list(key.scopes),
        "models": list(key.models),
        "created_at_s": key.created_at_s,
        "last_used_at_s": last_used_at_s,
        "expires_at_s": key.expires_at_s,
        "note": key.note,
    }


def _show_time(at_s: int | None) -> str:
    return "-" if at_s is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(at_s))


def _read_last_used() -> dict[str, int]:
    """When gateways last saw each key; empty when no queue server answers, for the list is worth having without."""
    import asyncio

    from redis.exceptions import RedisError

    from scheduler.contract.connection import connect

    url = read_process_settings().redis_url
    path = Path(url.removeprefix("unix://").partition("?")[0])
    if url.startswith("unix://") and not path.exists():  # the embedded server does not run: nothing to wait for
        return {}

    async def read() -> Any:
        client: Any = connect(url)
        try:
            async with asyncio.timeout(READ_LIMIT_S):
                return await client.hgetall(redis_keys.KEYS_USED)
        finally:
            await client.aclose()

    try:
        found = asyncio.run(read())
    except (RedisError, OSError):  # TimeoutError is one
        return {}
    return {key_id.decode(): int(at_s) for key_id, at_s in found.items()}
