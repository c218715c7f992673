"""Checks of the set-up: configuration, keys, store, Redis, a running server."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from scheduler.contract.config_file import find_config
from scheduler.contract.connection import connect
from scheduler.contract.environment import SettingsError, read_process_settings
from snapshots.errors import KeyRingError, SnapshotError
from snapshots.store import SnapshotStore
from worker.agent_settings import load_keyring
from worker.diagnosis.findings import Finding

MIN_REDIS: Final = (6, 2)
SLOW_REDIS_MS: Final = 5.0
CONNECT_LIMIT_S: Final = 3.0
CONFIG_CHECK_LIMIT_S: Final = 20.0


def check_configuration() -> Iterator[Finding]:
    """glowplug.yaml and the variables are what all processes take, policies of models and tenants included."""
    try:
        path = find_config()
        read_process_settings()
        refused = None if path is None else _ask_config_check()
    except SettingsError as error:
        refused = str(error)
    if refused is not None:
        yield Finding("configuration", "fail", refused, "correct that; `glowplug config check` looks again")
        return
    yield Finding("configuration", "ok", str(path) if path else "defaults and environment")


def _ask_config_check() -> str | None:
    """What `glowplug config check` refuses; None where all is well. A process: policies are the scheduler's to read."""
    command = [sys.executable, "-c", "from scheduler.command import main; main()", "config", "check", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CONFIG_CHECK_LIMIT_S, check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return f"`glowplug config check` ended with status {done.returncode}: {done.stderr[-300:].strip()}"
    return None if found["ok"] else str(found["error"])


def check_keys(state_dir: Path) -> Iterator[Finding]:
    """A signing key that nobody else can read, and API keys likewise where there are some."""
    env = {name: value for name, value in os.environ.items() if name != "GLOWPLUG_DEV"}  # which would make a key
    try:
        keyring = load_keyring(state_dir, env)
    except SettingsError as error:
        yield Finding("signing keys", "fail", str(error), "glowplug keys new (or serve --dev)")
    except KeyRingError as error:
        yield Finding("signing keys", "fail", str(error), f"chmod 600 {state_dir}/keys/*; a damaged one: put it back")
    else:
        yield Finding("signing keys", "ok", f"{len(keyring.key_ids)}, signing with {keyring.signing_key_id}")
    path = Path(os.environ.get("GLOWPLUG_API_KEYS") or state_dir / "keys" / "api.keys.json")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        yield Finding("API keys", "ok", "none: only this machine gets in")
        return
    if mode & 0o077:
        yield Finding("API keys", "fail", f"{path} has mode {mode:04o}", f"chmod 600 {path}")
    else:
        yield Finding("API keys", "ok", f"{path}, mode {mode:04o}")


def check_store(state_dir: Path) -> Iterator[Finding]:
    """Snapshots that are there and whose signature holds. Weights are not read; `glowplug verify` does."""
    try:
        keyring = load_keyring(state_dir, {k: v for k, v in os.environ.items() if k != "GLOWPLUG_DEV"})
    except (SettingsError, KeyRingError):
        return  # told by check_keys
    root = state_dir / "store"
    store = SnapshotStore(root) if root.is_dir() else None  # which it would make
    names = store.list_names() if store is not None else []
    if store is None or not names:
        yield Finding("snapshots", "warn", "none", "glowplug build MODEL --name NAME")
        return
    good = 0
    for name in names:
        try:
            store.read_manifest(name, keyring)
            good += 1
        except SnapshotError as error:
            yield Finding("snapshots", "fail", f"{name}: {error}", f"glowplug verify {name}; build or import it again")
    if good:
        yield Finding("snapshots", "ok", f"{good} with a good signature")


async def check_redis(url: str) -> list[Finding]:
    """Reachable, new enough, keeps what it holds, and near."""
    try:
        redis: Any = connect(url)
    except SettingsError as error:
        return [Finding("Redis", "fail", str(error), "correct it; without REDIS_URL an embedded one is used")]
    try:
        async with asyncio.timeout(CONNECT_LIMIT_S):  # its own retries go on for longer than a person waits
            info: dict[str, Any] = await redis.info()
        took_ms = []
        for _ in range(20):
            started_s = time.perf_counter()
            await redis.ping()
            took_ms.append((time.perf_counter() - started_s) * 1000)
    except TimeoutError:
        remedy = "start it, or correct REDIS_URL; without REDIS_URL an embedded one is used"
        return [Finding("Redis", "fail", f"no answer within {CONNECT_LIMIT_S:g} s", remedy)]
    except Exception as error:  # any: refused, no name, wrong password, loading
        remedy = "start it, or correct REDIS_URL; without REDIS_URL an embedded one is used"
        return [Finding("Redis", "fail", f"{type(error).__name__}: {error}", remedy)]
    finally:
        await redis.aclose()
    version = str(info.get("redis_version", "0"))
    findings = []
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_REDIS:
        findings.append(Finding("Redis", "fail", version, "glowplug needs Redis 6.2 or newer, or Valkey"))
    else:
        seen = f"{info.get('server_name', 'redis')} {info.get('valkey_version', version)}"
        findings.append(Finding("Redis", "ok", seen))
    if not info.get("aof_enabled"):
        remedy = "appendonly yes: accepted requests then survive its restart"
        findings.append(Finding("Redis persistence", "warn", "no append-only file", remedy))
    else:
        findings.append(Finding("Redis persistence", "ok", "append-only file"))
    median_ms = sorted(took_ms)[len(took_ms) // 2]
    slow = median_ms > SLOW_REDIS_MS
    remedy = "each token passes through it: put it in the same network" if slow else ""
    findings.append(Finding("Redis latency", "warn" if slow else "ok", f"{median_ms:.2f} ms", remedy))
    return findings


def check_server(state_dir: Path) -> Iterator[Finding]:
    """A server of this state folder, if one says that it runs, answers."""
    path = state_dir / "run" / "serve.json"
    try:
        found = json.loads(path.read_text())
        address = f"{found['host']}:{found['port']}"
    except (OSError, ValueError, KeyError):
        yield Finding("server", "ok", "none runs on this state folder; `glowplug serve` starts one")
        return
    connection = _open(found)
    try:
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
    except OSError as error:
        yield Finding("server", "fail", f"{address}: {error}", f"start `glowplug serve` again (it removes {path})")
        return
    if status != 200:
        yield Finding("server", "fail", f"{address} answers {status}", "see `glowplug logs`")
    else:
        yield Finding("server", "ok", f"{address} is ready")


def check_served_gpus(state_dir: Path) -> Iterator[Finding]:
    """Errors of GPUs that the running server's agents have heard of: the driver tells them once, to who listens."""
    try:
        found = json.loads((state_dir / "run" / "serve.json").read_text())
        key = os.environ.get("GLOWPLUG_API_KEY")
        connection = _open(found)
        connection.request("GET", "/admin/status", headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        status = json.loads(response.read()) if response.status == 200 else {}
    except (OSError, ValueError, KeyError, http.client.HTTPException):
        return  # no server, or no key for it: told by check_server
    for node in status.get("nodes", ()):
        for gpu in node.get("gpus", ()):
            instance = f":{gpu['instance']}" if "instance" in gpu else ""
            name = f"GPU {gpu['index']}{instance} of {node['node_id']}"
            if gpu.get("fault"):
                cause, _, remedy = gpu["fault"].partition(": ")
                yield Finding(name, "fail", f"{cause}; no worker is sent there", remedy or "nvidia-smi --gpu-reset")
            elif gpu.get("xids"):
                numbers = ", ".join(str(xid) for xid in gpu["xids"])
                yield Finding(name, "warn", f"Xid {numbers}: workers were restarted", "glowplug logs --level error")


def _open(found: dict[str, Any]) -> http.client.HTTPConnection:
    if found.get("scheme") != "https":
        return http.client.HTTPConnection(found["host"], found["port"], timeout=CONNECT_LIMIT_S)
    import ssl

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whether it answers, not who it is
    return http.client.HTTPSConnection(found["host"], found["port"], timeout=CONNECT_LIMIT_S, context=context)
