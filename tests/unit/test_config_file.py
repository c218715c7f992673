"""glowplug.yaml: errors name file, line and remedy; every process reads it; the example is valid; origins are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from scheduler.command import main
from scheduler.config import SchedulerConfig, load_config
from scheduler.config_command import DEFAULTS, config_schema, effective_settings
from scheduler.contract.config_file import (
    SECTIONS,
    VARIABLES,
    apply_config_file,
    find_changed,
    read_document,
    section_variables,
)
from scheduler.contract.environment import SettingsError
from scheduler.gateway.settings import GatewaySettings, read_gateway_settings
from worker import agent_settings
from worker.agent_settings import read_agent_settings

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "deploy" / "glowplug.yaml"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("defaults:\n  idle_timeout_s: soon\n", 2, "defaults.idle_timeout_s: 'soon': expected a number"),
        ("\n\ndefaults:\n  idle_timout_s: 3\n", 4, r"idle_timout_s: unknown field \(did you mean idle_timeout_s\?\)"),
        ("models:\n  a:\n    max_workers: 1\n  b:\n    max_workers: 0\n", 5, "models.b.max_workers: 0: expected a pos"),
        ("models:\n  a:\n    max_worker: 1\n", 3, r"models.a.max_worker: unknown field \(did you mean max_workers"),
        ("tenants:\n  x: {weight: 1}\n  y: {weight: none}\n", 3, "tenants.y.weight: 'none': expected a number"),
        ("tenants:\n  y: {weight: -2}\n", 2, "tenants.y.weight: -2: expected a positive number"),
        ("gateway:\n  port: 70000\n", 2, "gateway.port: 70000"),
        ("gateway:\n  max_batches: 0\n", 2, "gateway.max_batches: 0: expected a whole number >= 1"),
        ("gateway:\n  file_retention_s: 60\n", 2, "gateway.file_retention_s: 60: expected a whole number >= 3600"),
        ("gateway:\n  tls_cert: a.pem\n", 1, "tls_cert and tls_key go together"),
        ("agent:\n  verify: never\n", 2, "agent.verify"),
        ("logging:\n  levle: info\n", 2, r"did you mean level\?"),
        ("gatway: {}\n", 1, r"did you mean gateway\?"),
        ("defaults: {max_workers: 1}\ndefaults: {}\n", 2, "given twice"),
        ("defaults:\n  a: b: c\n", 2, "not valid YAML"),
        ("models: [a]\n", 1, "models: expected a mapping"),
        ("- a\n", 1, "expected a mapping"),
    ],
)
def test_errors_name_the_file_the_line_and_the_remedy(tmp_path: Path, text: str, line: int, message: str) -> None:
    """Whatever is wrong, the message begins with file and line and says what was expected."""
    path = tmp_path / "glowplug.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_config(path, env={})
    assert str(caught.value).startswith(f"{path}:{line}: "), caught.value


def test_the_example_is_valid_and_matches_the_schema() -> None:
    """deploy/glowplug.yaml loads, and the schema made from the types accepts it and refuses a misspelt field."""
    config = load_config(EXAMPLE, env={})
    assert config.policy_of("support").max_workers == 2
    assert config.policy_of("always-there").pinned
    schema = config_schema()
    jsonschema.validate(yaml.safe_load(EXAMPLE.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"models": {"a": {"max_worker": 1}}}, schema)


def test_the_file_sets_what_the_environment_does_not(tmp_path: Path) -> None:
    """Section values become variables, paths relative to the file, unless the variable is set."""
    path = tmp_path / "glowplug.yaml"
    path.write_text(
        "gateway: {port: 9, host: '::1', cors_origins: [https://a.b, https://c.d], tls_cert: c.pem, tls_key: /k.pem}\n"
        "agent: {backend: numpy, threads: 2}\nlogging: {level: debug}\n"
    )
    env = {"GLOWPLUG_CONFIG": str(path), "GLOWPLUG_LOG_LEVEL": "error", "GLOWPLUG_STATE_DIR": str(tmp_path)}
    apply_config_file(env)
    gateway = read_gateway_settings(env)
    assert (gateway.port, gateway.host, gateway.cors_origins) == (9, "::1", ("https://a.b", "https://c.d"))
    assert (gateway.tls_certificate, gateway.tls_key) == (tmp_path / "c.pem", Path("/k.pem"))
    agent = read_agent_settings(1000, env)
    assert (agent.backend, agent.num_threads, agent.process.log_level) == ("numpy", 2, "error")


def test_limits_of_files_and_batches_come_from_file_and_environment(tmp_path: Path) -> None:
    """Each of them reaches the gateway; a variable wins; one that cannot be is refused by its name."""
    path = tmp_path / "glowplug.yaml"
    values = {
        "max_file_bytes": 1,
        "max_tenant_file_bytes": 2,
        "max_tenant_files": 3,
        "file_retention_s": 3600,
        "upload_limit_s": 5,
        "max_batches": 6,
        "max_tenant_batches": 7,
        "max_batch_lines": 8,
        "batches_at_once": 9,
    }
    path.write_text(yaml.safe_dump({"gateway": {**values, "files_dir": "kept"}}))
    env = {"GLOWPLUG_CONFIG": str(path), "GLOWPLUG_MAX_BATCHES": "60"}
    apply_config_file(env)
    gateway = read_gateway_settings(env)
    assert {name: getattr(gateway, name) for name in values} == {**values, "max_batches": 60}
    assert gateway.files_dir == tmp_path / "kept"
    for name, text in (("GLOWPLUG_FILE_RETENTION_S", "59"), ("GLOWPLUG_BATCHES_AT_ONCE", "0.5")):
        with pytest.raises(SettingsError, match=name):
            read_gateway_settings({name: text})


def test_what_a_restart_would_change_is_told(tmp_path: Path) -> None:
    """Values that the file has now and the process does not; where a variable was set by hand it has the last word."""
    path = tmp_path / "glowplug.yaml"
    path.write_text("gateway: {port: 9, max_batches: 3}\nagent: {threads: 2}\nlogging: {level: debug}\n")
    env = {"GLOWPLUG_CONFIG": str(path), "GLOWPLUG_THREADS": "1"}
    apply_config_file(env)
    child = dict(env)
    apply_config_file(child)  # a child inherits the variables and what they are from
    for one in (env, child):
        assert find_changed(("gateway", "agent", "logging"), one) == ()
    path.write_text("gateway: {port: 10, host: '::1'}\nagent: {threads: 4}\nlogging: {level: debug}\n")
    for one in (env, child):
        assert find_changed(("gateway", "agent"), one) == ("gateway.host", "gateway.port", "gateway.max_batches")
    path.write_text("gateway: {prot: 10}\n")
    with pytest.raises(SettingsError, match="did you mean port"):
        find_changed(("gateway",), env)


def test_a_file_in_the_state_folder_is_found_and_a_named_one_wins(tmp_path: Path) -> None:
    """glowplug.yaml of the state folder is read where GLOWPLUG_CONFIG names none."""
    (tmp_path / "glowplug.yaml").write_text("gateway: {port: 1}\n")
    (tmp_path / "other.yaml").write_text("gateway: {port: 2}\n")
    found = {"GLOWPLUG_STATE_DIR": str(tmp_path)}
    apply_config_file(found)
    named = {"GLOWPLUG_STATE_DIR": str(tmp_path), "GLOWPLUG_CONFIG": str(tmp_path / "other.yaml")}
    apply_config_file(named)
    assert (found["GLOWPLUG_PORT"], named["GLOWPLUG_PORT"]) == ("1", "2")


def test_origins_are_told(tmp_path: Path) -> None:
    """Default, file with its line, or environment with its variable; a model's own values lie over the defaults."""
    path = tmp_path / "glowplug.yaml"
    path.write_text("defaults:\n  max_running: 8\nmodels:\n  m:\n    max_queued: 3\ngateway:\n  port: 81\n")
    env = {"GLOWPLUG_IDLE_TIMEOUT_S": "7", "GLOWPLUG_LOG_LEVEL": "debug"}
    rows = {row.name: (row.value, row.origin) for row in effective_settings(path, env)}
    assert rows["gateway.port"] == ("81", "file:7")
    assert rows["gateway.host"] == ("127.0.0.1", "default")
    assert rows["logging.level"] == ("debug", "environment:GLOWPLUG_LOG_LEVEL")
    assert rows["models.m.max_queued"] == (3, "file:5")
    assert rows["models.m.max_running"] == (8, "file:2")
    assert rows["models.m.idle_timeout_s"] == (7.0, "environment:GLOWPLUG_IDLE_TIMEOUT_S")
    assert rows["models.m.pinned"] == (False, "default")


def test_the_defaults_that_are_shown_are_those_of_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of defaults agrees with GatewaySettings and the agent's reader; every field has a variable."""
    assert set(VARIABLES) == {(name, field) for name, struct in SECTIONS.items() for field in struct.__struct_fields__}
    gateway = GatewaySettings()
    told = {name.removeprefix("gateway.") for name in DEFAULTS if name.startswith("gateway.")}
    for field in told - {"admin_from_anywhere", "api_keys", "cors_origins", "files_dir"}:
        value = getattr(gateway, field)
        assert DEFAULTS[f"gateway.{field}"] == (f"{value:g}" if isinstance(value, float) else str(value))
    monkeypatch.setattr(agent_settings, "detect_backend", lambda: "cuda")  # what "auto" finds differs by machine
    agent = read_agent_settings(1000, {"GLOWPLUG_STATE_DIR": "/state"})
    shown = {VARIABLES["agent", field]: DEFAULTS[f"agent.{field}"] for field in ("backend", "spare_workers")}
    assert agent == read_agent_settings(1000, {"GLOWPLUG_STATE_DIR": "/state", **shown})
    assert float(DEFAULTS["agent.drain_grace_s"]) == agent.drain_grace_s
    assert DEFAULTS["agent.verify"] == agent.verification
    assert SchedulerConfig() == load_config(None, env={})


def test_the_example_keeps_a_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who starts from deploy/glowplug.yaml on a GPU machine has the GPU backend, as without a file."""
    monkeypatch.setattr(agent_settings, "detect_backend", lambda: "cuda")
    assert read_agent_settings(1000, section_variables(read_document(EXAMPLE))).backend == "cuda"


def test_the_command_checks_shows_and_prints_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """check: exit 0 or 1 with the line; show and schema: JSON."""
    monkeypatch.setenv("GLOWPLUG_STATE_DIR", str(tmp_path))
    path = tmp_path / "a.yaml"
    path.write_text("defaults:\n  max_workers: 0\n")
    runner = CliRunner()
    refused = runner.invoke(main, ["config", "check", str(path)])
    assert (refused.exit_code, "a.yaml:2: defaults.max_workers" in refused.output) == (1, True)
    assert runner.invoke(main, ["config", "check", str(EXAMPLE)]).exit_code == 0
    shown = json.loads(runner.invoke(main, ["config", "show", "--json", str(EXAMPLE)]).output)
    assert {"name", "value", "origin"} == set(shown[0])
    assert json.loads(runner.invoke(main, ["config", "schema"]).output)["title"] == "glowplug.yaml"


@pytest.mark.parametrize("command", [("scheduler", "gateway"), ("scheduler", "scheduler"), ("worker", "agent")])
def test_every_process_refuses_a_wrong_file_by_name(tmp_path: Path, command: tuple[str, str]) -> None:
    """Gateway, scheduler and agent end with EX_CONFIG and the line, before they do anything."""
    path = tmp_path / "glowplug.yaml"
    path.write_text("logging:\n  level: loud\n")
    env = {"PATH": "/usr/bin", "GLOWPLUG_STATE_DIR": str(tmp_path), "GLOWPLUG_CONFIG": str(path)}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=env, cwd=EXAMPLE.parent.parent, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, f"{path}:2: logging.level" in done.stderr) == (78, True), done.stderr
