"""``glowplug usage``: what tenants and keys have used (exit codes: client_commands)."""

from __future__ import annotations

import json
from pathlib import Path

import click

from scheduler.client_commands import get_json, server_url, url_option
from scheduler.command import state_dir_option
from scheduler.plain_tables import make_console, make_table


@click.command()
@state_dir_option
@url_option
@click.option("--days", type=click.IntRange(1, 40), default=1, show_default=True, help="Days, today included (UTC).")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def usage(state_dir: Path, url: str | None, days: int, as_json: bool) -> None:
    """Show requests and tokens by day, tenant, key and model. Counters are kept for 40 days."""
    rows = get_json(server_url(state_dir, url), f"/admin/usage?days={days}")["data"]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = make_table("DAY", "TENANT", "KEY", "MODEL", right=("REQUESTS", "ERRORS", "PROMPT", "COMPLETION"))
    for row in rows:
        key = f"gp_{row['key_id']}" if row["key_id"] else "-"
        counts = (row["requests"], row["errors"], row["prompt_tokens"], row["completion_tokens"])
        table.add_row(row["day"], row["tenant"] or "-", key, row["model"], *(str(count) for count in counts))
    make_console().print(table)
