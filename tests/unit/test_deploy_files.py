"""What `deploy/` and docs/metrics.md hold: well-formed, and every metric, verb, variable and option in it exists."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import crossplane
import pytest
import yaml

from scheduler.command import VERBS, main
from scheduler.config import load_config
from scheduler.contract.telemetry import Metric
from scheduler.gateway.metrics import GatewayMetrics
from scheduler.gateway.settings import GatewaySettings
from tests.certificates import make_certificate
from tests.document_pages import read_blocks
from worker.agent_settings import DEFAULT_DRAIN_GRACE_S

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = {metric.value for metric in Metric}
PAGES_WITH_SETTINGS = ("docs/how-to/keys-and-tenants.md", "docs/how-to/tracing.md")
SUFFIXES = ("_bucket", "_count", "_sum")


def metrics_in(expression: str) -> set[str]:
    """Metric names of ours in a query, without the suffixes of histograms."""
    found = set(re.findall(r"\bglowplug_[a-z_]+", expression))
    return {
        next((n.removesuffix(s) for s in SUFFIXES if n.endswith(s) and n.removesuffix(s) in NAMES), n) for n in found
    }


def test_the_table_of_metrics_is_complete_and_true() -> None:
    """Each name once, with the type and labels that the gateway exposes."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(glowplug_\w+)` \| (\w+) \| ([\w, ]*) \| (.+) \|$", text, re.M)
    assert [row[0] for row in rows] == [metric.value for metric in Metric]
    made = GatewayMetrics().ensure_ready()
    exposed = {}
    for family in made.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        exposed[name] = family.type
    for name, kind, _, _ in rows:
        assert exposed[name] == kind, name
    labels = {
        "glowplug_" + str(instrument._name).removeprefix("glowplug_"): instrument._labelnames
        for instrument in vars(made).values()
        if hasattr(instrument, "_labelnames")
    }
    for name, _, given, _ in rows:
        known = labels.get(name, labels.get(name.removesuffix("_total")))
        if known is not None:
            assert tuple(label for label in given.split(", ") if label) == tuple(known), name


def test_the_grafana_dashboard_names_metrics_that_exist() -> None:
    """JSON with unique panels, each with a query over our metrics and a data source by variable."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) >= 8
    seen: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = metrics_in(target["expr"])
            assert names, target
            assert names <= NAMES, target
            assert target["expr"].count("(") == target["expr"].count(")")
            seen |= names
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len(seen) >= 12


def test_the_alert_rules_name_metrics_that_exist_and_say_what_to_do() -> None:
    """Each rule: an expression over our metrics, a severity, a summary and a runbook whose verbs exist."""
    groups = yaml.safe_load((ROOT / "deploy" / "grafana" / "alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 5
    for rule in rules:
        assert metrics_in(rule["expr"]), rule
        assert metrics_in(rule["expr"]) <= NAMES, rule
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        for verb in re.findall(r"glowplug ([a-z]+)", rule["annotations"]["runbook"]):
            assert verb in VERBS, rule


def test_the_systemd_unit_starts_a_verb_that_exists_and_reloads_as_we_do() -> None:
    """Sections and keys parse; ExecStart is `glowplug serve`; 78 (settings) is not tried again."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    path = ROOT / "deploy" / "systemd" / "glowplug.service"
    unit.read_string(re.sub(r"^(Environment)=(\w+)=", r"\1_\2=", path.read_text(), flags=re.M))
    assert unit["Service"]["ExecStart"].split()[1] in VERBS
    assert "-HUP" in unit["Service"]["ExecReload"]
    assert unit["Service"]["RestartPreventExitStatus"] == "2 78"
    assert int(unit["Service"]["TimeoutStopSec"]) > 40 + 40 + 10  # what serve gives its parts
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
        lines = [line for line in done.stderr.splitlines() if "not executable" not in line]
        assert not [line for line in lines if "glowplug.service" in line and "Unknown" in line], lines


@pytest.mark.parametrize("setting", ["proxy_buffering off", "proxy_read_timeout 3600s", "proxy_http_version 1.1"])
def test_the_nginx_site_passes_streams_on_and_keeps_admin_inside(setting: str) -> None:
    """Braces balance, each directive ends, streams are not buffered, /admin and /metrics are refused."""
    text = re.sub(r"#.*", "", (ROOT / "deploy" / "nginx.conf").read_text())
    assert text.count("{") == text.count("}")
    for line in filter(None, (line.strip() for line in text.splitlines())):
        assert line[-1] in "{};", line
    assert setting + ";" in text
    assert re.search(r"location ~ \^/\(admin\|metrics\) \{\s+deny all;", text)


def test_nothing_in_front_of_a_gateway_has_less_patience_or_room_than_it() -> None:
    """nginx lets through the largest upload that a gateway takes; Compose waits for as long as a gateway drains."""
    settings = GatewaySettings()
    (room,) = re.findall(r"client_max_body_size (\d+)m;", (ROOT / "deploy" / "nginx.conf").read_text())
    assert int(room) * 2**20 > max(settings.max_file_bytes, settings.max_body_bytes)
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for service, drain_s in (("gateway", settings.drain_grace_s), ("worker", DEFAULT_DRAIN_GRACE_S)):
        assert int(services[service]["stop_grace_period"].removesuffix("s")) > drain_s, service


def test_the_nginx_site_is_read_by_nginx_own_parser(tmp_path: Path) -> None:
    """Every directive is known, in its place and with as many arguments as it takes; `nginx -t` where there is one."""
    site = tmp_path / "site.conf"
    site.write_text(
        (ROOT / "deploy" / "nginx.conf").read_text().replace("/etc/ssl/llm.example.com", str(tmp_path / "c"))
    )
    whole = tmp_path / "nginx.conf"
    whole.write_text(f"error_log stderr;\npid {tmp_path}/pid;\nevents {{}}\nhttp {{ include {site}; }}\n")
    found = crossplane.parse(str(whole), strict=True)
    assert found["errors"] == []
    assert {Path(part["file"]).name for part in found["config"]} == {"nginx.conf", "site.conf"}
    if shutil.which("nginx"):
        make_certificate(tmp_path)
        (tmp_path / "cert.pem").rename(tmp_path / "c.pem")
        (tmp_path / "key.pem").rename(tmp_path / "c.key")
        done = subprocess.run(["nginx", "-t", "-c", str(whole)], capture_output=True, text=True, check=False)
        assert "syntax is ok" in done.stderr, done.stderr


def test_the_settings_in_the_pages_are_ours(tmp_path: Path) -> None:
    """Each block of YAML is what its page says: settings that `config check` takes, or the one for its program."""
    checked = []
    for page in PAGES_WITH_SETTINGS:
        for block in read_blocks(page):
            if block.language == "yaml":
                file = tmp_path / "glowplug.yaml"
                file.write_text(block.text)
                load_config(file, {})
                checked.append(page)
    assert set(checked) == set(PAGES_WITH_SETTINGS)
    load_config(ROOT / "deploy" / "glowplug.yaml", {})


def test_the_scrape_configuration_in_the_page_names_our_files() -> None:
    """Prometheus' keys, our port and the file of rules that lies in deploy/."""
    (block,) = [block for block in read_blocks("docs/metrics.md") if block.language == "yaml"]
    found = yaml.safe_load(block.text)
    (job,) = found["scrape_configs"]
    assert set(job) == {"job_name", "authorization", "static_configs"}
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8080"]}]
    assert all((ROOT / "deploy" / "grafana" / name).is_file() for name in found["rule_files"])


def test_the_gpu_override_is_for_a_service_of_the_compose_file() -> None:
    """It adds devices to the worker and nothing else; images and commands of the whole are as they were."""
    (block,) = [block for block in read_blocks("docs/how-to/compose-gpu.md") if block.language == "yaml"]
    override = yaml.safe_load(block.text)["services"]
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(override) <= set(services)
    (device,) = override["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    images = {services[name]["image"] for name in services}
    assert all(re.fullmatch(r"[a-z]+:[\w.-]+", image) for image in images), images


def test_the_commands_in_the_compose_file_are_ours() -> None:
    """`docker compose run --rm SERVICE ...` passes the rest to `glowplug`: verbs and options exist, values fit."""
    text = (ROOT / "compose.yaml").read_text()
    lines = re.findall(r"^#   docker compose run --rm (\w+) (.+)$", text, re.M)
    assert len(lines) >= 2
    services = yaml.safe_load(text)["services"]
    for service, rest in lines:
        assert service in services
        command, words = main, shlex.split(rest)
        while isinstance(command, click.Group):
            name, found, words = command.resolve_command(click.Context(command), words)
            assert found is not None, name
            command = found
        command.make_context(command.name, words)
