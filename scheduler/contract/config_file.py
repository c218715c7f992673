"""``glowplug.yaml``: the sections that concern one process each, and where in the file each value stands.

A value of these sections stands for an environment variable (:data:`VARIABLES`): each process, before it reads its
settings, sets from the file those variables that are not set (:func:`apply_config_file`). So the environment wins, and
there is one reader of each setting. What scheduler and gateway share (policies of models and tenants) is read by
:mod:`scheduler.config`, which checks the whole file.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from scheduler.contract.environment import CONFIG, SettingsError, read_state_dir

MAX_CONFIG_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 16
#: The file that is read where none is named, in the state folder.
DEFAULT_NAME: Final = "glowplug.yaml"

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(gt=0)]
Retention = Annotated[int, msgspec.Meta(ge=3600)]  # seconds
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
T = TypeVar("T")


class GatewaySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the gateway listens and what it bounds. Read when it starts."""

    host: str | None = None
    port: Port | None = None  # 0: any free port
    tls_cert: str | None = None  # PEM file
    tls_key: str | None = None  # PEM file
    cors_origins: tuple[str, ...] | None = None
    admin_from_anywhere: bool | None = None
    request_limit_s: Positive | None = None
    cold_start_limit_s: Positive | None = None
    drain_grace_s: Positive | None = None
    max_body_bytes: Count | None = None
    api_keys: str | None = None  # file
    files_dir: str | None = None  # of uploads and results of batches
    max_file_bytes: Count | None = None
    max_tenant_file_bytes: Count | None = None
    max_tenant_files: Count | None = None
    file_retention_s: Retention | None = None
    upload_limit_s: Positive | None = None
    max_batches: Count | None = None  # under way, of all tenants
    max_tenant_batches: Count | None = None
    max_batch_lines: Count | None = None
    batches_at_once: Count | None = None  # that one gateway runs


class AgentSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a node agent and its workers use. Read when it starts."""

    node_id: str | None = None
    backend: str | None = None
    threads: Count | None = None
    sealed_limit_bytes: Count | None = None
    fill_limit_bytes_per_s: Positive | None = None
    drain_grace_s: Positive | None = None
    verify: Literal["once", "always"] | None = None
    draft_tokens: Annotated[int, msgspec.Meta(ge=0, le=32)] | None = None
    spare_workers: Annotated[int, msgspec.Meta(ge=0, le=8)] | None = None  # on each GPU
    snapshot_keys: str | None = None  # file


class LoggingSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Logs of every process. ``format`` is that of stderr; ``auto``: console on a terminal, JSON elsewhere."""

    level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    format: Literal["auto", "json", "console"] | None = None
    folder: str | None = None  # of the log files; "off": none
    audit_log: str | None = None  # file; "-": stderr


class TracingSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Traces to an OpenTelemetry collector; off without an endpoint. Read when the gateway starts. Headers that hold a
    secret belong into the environment (OTEL_EXPORTER_OTLP_HEADERS)."""

    endpoint: str | None = None  # e.g. http://127.0.0.1:4318; /v1/traces is appended
    sampler: (
        Literal[
            "always_on",
            "always_off",
            "traceidratio",
            "parentbased_always_on",
            "parentbased_always_off",
            "parentbased_traceidratio",
        ]
        | None
    ) = None
    sample_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    service_name: str | None = None


SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {
    "gateway": GatewaySection,
    "agent": AgentSection,
    "logging": LoggingSection,
    "tracing": TracingSection,
}
#: Names of the variables that were set from the file, by comma: they are not the environment's own words.
FROM_FILE: Final = "GLOWPLUG_FROM_FILE"
#: (section, field) -> the variable that it stands for.
VARIABLES: Final[dict[tuple[str, str], str]] = {
    ("gateway", "host"): "GLOWPLUG_HOST",
    ("gateway", "port"): "GLOWPLUG_PORT",
    ("gateway", "tls_cert"): "GLOWPLUG_TLS_CERT",
    ("gateway", "tls_key"): "GLOWPLUG_TLS_KEY",
    ("gateway", "cors_origins"): "GLOWPLUG_CORS_ORIGINS",
    ("gateway", "admin_from_anywhere"): "GLOWPLUG_ADMIN",
    ("gateway", "request_limit_s"): "GLOWPLUG_REQUEST_LIMIT_S",
    ("gateway", "cold_start_limit_s"): "GLOWPLUG_COLD_START_LIMIT_S",
    ("gateway", "drain_grace_s"): "GLOWPLUG_GATEWAY_DRAIN_GRACE_S",
    ("gateway", "max_body_bytes"): "GLOWPLUG_MAX_BODY_BYTES",
    ("gateway", "api_keys"): "GLOWPLUG_API_KEYS",
    ("gateway", "files_dir"): "GLOWPLUG_FILES_DIR",
    ("gateway", "max_file_bytes"): "GLOWPLUG_MAX_FILE_BYTES",
    ("gateway", "max_tenant_file_bytes"): "GLOWPLUG_MAX_TENANT_FILE_BYTES",
    ("gateway", "max_tenant_files"): "GLOWPLUG_MAX_TENANT_FILES",
    ("gateway", "file_retention_s"): "GLOWPLUG_FILE_RETENTION_S",
    ("gateway", "upload_limit_s"): "GLOWPLUG_UPLOAD_LIMIT_S",
    ("gateway", "max_batches"): "GLOWPLUG_MAX_BATCHES",
    ("gateway", "max_tenant_batches"): "GLOWPLUG_MAX_TENANT_BATCHES",
    ("gateway", "max_batch_lines"): "GLOWPLUG_MAX_BATCH_LINES",
    ("gateway", "batches_at_once"): "GLOWPLUG_BATCHES_AT_ONCE",
    ("agent", "node_id"): "GLOWPLUG_NODE_ID",
    ("agent", "backend"): "GLOWPLUG_BACKEND",
    ("agent", "threads"): "GLOWPLUG_THREADS",
    ("agent", "sealed_limit_bytes"): "GLOWPLUG_SEALED_LIMIT_BYTES",
    ("agent", "fill_limit_bytes_per_s"): "GLOWPLUG_FILL_LIMIT_BYTES_PER_S",
    ("agent", "drain_grace_s"): "GLOWPLUG_DRAIN_GRACE_S",
    ("agent", "verify"): "GLOWPLUG_VERIFY",
    ("agent", "draft_tokens"): "GLOWPLUG_DRAFT_TOKENS",
    ("agent", "spare_workers"): "GLOWPLUG_SPARE_WORKERS",
    ("agent", "snapshot_keys"): "GLOWPLUG_SNAPSHOT_KEYS",
    ("logging", "level"): "GLOWPLUG_LOG_LEVEL",
    ("logging", "format"): "GLOWPLUG_LOG_FORMAT",
    ("logging", "folder"): "GLOWPLUG_LOG_DIR",
    ("logging", "audit_log"): "GLOWPLUG_AUDIT_LOG",
    ("tracing", "endpoint"): "OTEL_EXPORTER_OTLP_ENDPOINT",
    ("tracing", "sampler"): "OTEL_TRACES_SAMPLER",
    ("tracing", "sample_ratio"): "OTEL_TRACES_SAMPLER_ARG",
    ("tracing", "service_name"): "OTEL_SERVICE_NAME",
}
#: Variables that name files: a relative path in the file is relative to the file.
PATH_FIELDS: Final = frozenset(
    {
        ("gateway", "tls_cert"),
        ("gateway", "tls_key"),
        ("gateway", "api_keys"),
        ("gateway", "files_dir"),
        ("agent", "snapshot_keys"),
    }
)


class ConfigDocument:
    """A configuration file that is well-formed YAML: its values, and the line of each."""

    def __init__(self, path: Path, node: Any, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values
        self._node = node

    def line_of(self, where: tuple[str, ...]) -> int:
        """The line (from 1) of the key that ``where`` leads to, or of the nearest thing above it."""
        import yaml

        node, line = self._node, 1
        for name in where:
            if not isinstance(node, yaml.MappingNode):
                break
            pair = next(((key, value) for key, value in node.value if key.value == name), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        return line

    def error(self, where: tuple[str, ...], message: str) -> SettingsError:
        """An error that names file, line and field."""
        name = ".".join(where)
        return SettingsError(f"{self.path}:{self.line_of(where)}: {name + ': ' if name else ''}{message}")

    def convert(self, value: Any, into: type[T], where: tuple[str, ...] = ()) -> T:
        """``value``, which stands at ``where``, as ``into``.

        Raises:
            SettingsError: it is not one; names the line, what was expected and, of a misspelt field, the likely one.
        """
        try:
            return msgspec.convert(value, into)
        except msgspec.ValidationError as error:
            message, _, path = str(error).partition(" - at ")
            inner = tuple(part for part in path.strip("`").removeprefix("$").split(".") if part)
            if "unknown field" in message:
                field = message.split("`")[1]
                known = _fields_at(into, inner)
                close = difflib.get_close_matches(field, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                raise self.error((*where, *inner, field), f"unknown field ({hint})") from None
            seen: Any = value
            for part in inner:
                seen = seen.get(part) if isinstance(seen, dict) else None
            shown = "" if isinstance(seen, dict | list) or seen is None else f"{seen!r}: "
            raise self.error((*where, *inner), shown + _readable(message)) from None


def _readable(message: str) -> str:
    text = message.replace("`", "").replace("Expected", "expected")
    for name, meaning in (("float", "a number"), ("int", "a whole number"), ("str", "text"), ("object", "a mapping")):
        text = text.replace(f"expected {name}", f"expected {meaning}")
    return text.replace("a number > 0.0", "a positive number").replace("a whole number > 0", "a positive whole number")


def _fields_at(into: Any, inner: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the fields of the struct that ``inner`` leads to from ``into``."""
    for part in inner:
        hints = msgspec.inspect.type_info(into)
        fields = {field.name: field for field in getattr(hints, "fields", ())}
        into = getattr(fields[part].type, "cls", into) if part in fields else into
    return tuple(getattr(into, "__struct_fields__", ()))


def read_document(path: Path) -> ConfigDocument:
    """The file at ``path``.

    Raises:
        SettingsError: it cannot be read, is too large, is not YAML, or names something twice; with the line.
    """
    import yaml

    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise SettingsError(f"{path}: {size} bytes; a configuration is at most {MAX_CONFIG_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        for key, line in _repeated_keys(node, 0):
            raise SettingsError(f"{path}:{line}: {key}: given twice: keep one")
        values = yaml.safe_load(text) or {}
    except yaml.MarkedYAMLError as error:
        line = 1 + (error.problem_mark.line if error.problem_mark is not None else 0)
        raise SettingsError(f"{path}:{line}: not valid YAML: {error.problem}: check indentation and quotes") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}:1: expected a mapping such as `defaults: {{idle_timeout_s: 60}}`")
    return ConfigDocument(path, node, values)


def _repeated_keys(node: Any, depth: int) -> Iterator[tuple[str, int]]:
    import yaml

    if not isinstance(node, yaml.MappingNode) or depth > MAX_DEPTH:
        return
    seen: set[str] = set()
    for key, value in node.value:
        if isinstance(key.value, str):
            if key.value in seen:
                yield key.value, key.start_mark.line + 1
            seen.add(key.value)
        yield from _repeated_keys(value, depth + 1)


def find_config(env: Mapping[str, str] = os.environ) -> Path | None:
    """The configuration file: GLOWPLUG_CONFIG's, else ``glowplug.yaml`` of the state folder; None: there is none."""
    if named := env.get(CONFIG):
        return Path(named).expanduser()
    path = read_state_dir(env) / DEFAULT_NAME
    return path if path.exists() else None


def section_variables(document: ConfigDocument) -> dict[str, str]:
    """What the sections of ``document`` say, as variables.

    Raises:
        SettingsError: a section is malformed.
    """
    found: dict[str, str] = {}
    for section, struct in SECTIONS.items():
        given = document.values.get(section)
        if given is None:
            continue
        document.convert(given, struct, (section,))
        for name, value in given.items():
            if value is None:
                continue
            text = as_text(value)
            if (section, name) in PATH_FIELDS:
                text = str(document.path.absolute().parent / Path(text).expanduser())
            found[VARIABLES[section, name]] = text
    return found


def as_text(value: Any) -> str:
    """A value of the file as its variable is written."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return ",".join(value) if isinstance(value, list) else str(value)


def apply_config_file(env: MutableMapping[str, str] = os.environ) -> None:
    """Set from the configuration file, if there is one, the variables that are not set. Call before settings are read.

    Raises:
        SettingsError: the file cannot be used.
    """
    path = find_config(env)
    if path is None:
        return
    env[CONFIG] = str(path.absolute())
    from_file = {name for name in (env.get(FROM_FILE) or "").split(",") if name}  # a parent's, which we inherit
    for name, value in section_variables(read_document(path)).items():
        if not env.get(name):
            env[name] = value
            from_file.add(name)
    env[FROM_FILE] = ",".join(sorted(from_file))


def find_changed(sections: Collection[str], env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Settings of ``sections``, as ``section.field``, that the file has now and this process does not: they hold after
    a restart.

    Raises:
        SettingsError: the file cannot be used.
    """
    named = env.get(CONFIG)
    if not named:
        return ()
    wanted = section_variables(read_document(Path(named)))
    from_file = (env.get(FROM_FILE) or "").split(",")
    changed = []
    for (section, field), variable in VARIABLES.items():
        has, wants = env.get(variable), wanted.get(variable)
        is_ours = variable in from_file or not has  # else the environment has the last word
        if section in sections and is_ours and (has or None) != wants:
            changed.append(f"{section}.{field}")
    return tuple(changed)
