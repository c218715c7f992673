"""Threats between what should be apart: tenants, queue writers and processes, gateway and network, path and file."""

from __future__ import annotations

import ast
import asyncio
import os
import pickle
import ssl
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from scheduler.api_keys import Scope, change_keys, create_key, key_file_path
from scheduler.contract import codec, job_queue, keys
from scheduler.contract.errors import ContractError, ErrorCode, ErrorInfo
from scheduler.contract.messages import GenerateRequest, ModelCard, StatusReport
from scheduler.dispatch import Dispatcher
from tests.certificates import make_certificate
from tests.engine_fixtures import EngineHarness, greedy, make_request
from tests.gateway_fixtures import chat_body, run_gateway
from tests.queue_fixtures import MODEL, connected

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("worker", "scheduler", "snapshots", "guests")
CHAT = "/v1/chat/completions"


def test_threat_prefix_cache_of_another_tenant() -> None:
    """What one tenant's prompt left in the cache serves that tenant only: to another it is as if it had never been."""
    harness, prompt = EngineHarness(), tuple(range(3, 67))
    outcomes = [
        harness.complete(replace(make_request(f"r{i}", prompt, greedy(2)), tenant=tenant))
        for i, tenant in enumerate(("a", "a", "b"))
    ]
    assert [one.final.usage.cached_tokens > 0 for one in outcomes if one.final] == [False, True, False]
    assert outcomes[0].token_ids() == outcomes[1].token_ids() == outcomes[2].token_ids()


def test_threat_client_gone_holds_a_place() -> None:
    """A cancelled request leaves the batch with the next step, and gives its memory back."""
    harness = EngineHarness()
    harness.submit(make_request("gone", (3, 4, 5), greedy(500)))
    harness.run_round()
    harness.run_round()
    assert harness.engine.statistics().num_running == 1
    harness.cancel("gone")
    harness.run_round()
    assert harness.engine.statistics().num_running == 0


class Exploit:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


async def test_threat_code_in_the_queue(redis_url: str, tmp_path: Path) -> None:
    """Whoever can write to Redis gets no code executed: a pickle is bytes that do not decode, everywhere."""
    payload, made = pickle.dumps(Exploit(tmp_path / "owned")), tmp_path / "owned"
    for kind in (GenerateRequest, ModelCard, StatusReport):
        with pytest.raises(ContractError):
            codec.decode(payload, kind)
    for decode in (job_queue.decode_job, codec.decode_frame):
        with pytest.raises(ContractError):
            decode(payload)
    async with connected(redis_url) as client:
        redis: Any = client
        await redis.set(keys.job("evil"), payload)
        await redis.zadd(keys.queue(MODEL), {"evil": 0})
        await Dispatcher(client).fail_queued(MODEL, ErrorInfo(ErrorCode.WAKE_FAILED, "x"))
        async with run_gateway(redis_url, tmp_path) as gateway:
            await redis.hset(keys.MODELS, "evil", payload)
            await redis.set(keys.STATUS, payload)
            gateway.server.gateway.directory.invalidate()
            assert (await gateway.get("/v1/models"))[0] == 200
    assert not made.exists()


#: What makes plain values and nodes of YAML, never objects. ``compose`` is called with the SafeLoader.
SAFE_YAML = frozenset(
    [
        "safe_load",
        "safe_dump",
        "compose",
        "SafeLoader",
        "YAMLError",
        "MarkedYAMLError",
        "Node",
        "MappingNode",
        "SequenceNode",
        "ScalarNode",
    ]
)


def test_threat_code_in_the_queue_or_files() -> None:
    """No module of ours imports what turns data into code: pickle, marshal, shelve, or yaml's unsafe loaders."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & set(names), path
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
                    assert node.attr in SAFE_YAML, path
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec"), path


async def test_threat_ssrf(redis_url: str, tmp_path: Path) -> None:
    """No request makes the gateway open a connection: image parts and links are refused, and it has no HTTP client."""
    async with run_gateway(redis_url, tmp_path) as gateway:
        address = "http://169.254.169.254/latest"
        await gateway.post(CHAT, chat_body())
        for part in (
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "input_audio", "url": address},
            {"type": "file", "file": {"file_id": address}},
        ):
            status, _, body = await gateway.post(CHAT, chat_body(messages=[{"role": "user", "content": [part]}]))
            assert (status, body["error"]["code"]) == (400, "invalid_request")
        assert (await gateway.post(CHAT, chat_body(model=address)))[0] == 404
    for path in (ROOT / "scheduler" / "gateway").rglob("*.py"):
        text = path.read_text()
        for client in ("ClientSession", "urllib.request", "http.client", "httpx", "open_connection"):
            assert client not in text, (path, client)


async def test_threat_path_traversal(redis_url: str, tmp_path: Path) -> None:
    """No spelling of a path, model name or id reads a file: each is a name that does not exist."""
    (tmp_path / "secret.txt").write_text("swordfish")
    async with run_gateway(redis_url, tmp_path) as gateway:
        for path in (
            "/../secret.txt", "/v1/models/../../secret.txt", "/v1/models/%2e%2e%2fsecret.txt", "/%2e%2e/secret.txt",
            "/admin/traces/..%2f..%2fsecret.txt", "/v1/models/%00", "//etc/passwd", "/v1/requests/..%2f/stream",
        ):  # fmt: skip
            reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            assert answer.split(b" ")[1] in (b"404", b"400"), path
            assert b"swordfish" not in answer
        for name in ("../secret.txt", "/etc/passwd", "x\0y", "..\\secret"):
            assert (await gateway.post(CHAT, chat_body(model=name)))[0] == 404


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")  # what is tested is that it is refused
async def test_threat_eavesdropping(redis_url: str, tmp_path: Path) -> None:
    """With a certificate: TLS 1.2 and newer only, HSTS, streams too; plain HTTP gets nothing; reloaded at run time."""
    certificate, key = make_certificate(tmp_path, "first")
    _, token_headers = add_key(tmp_path)
    async with run_gateway(redis_url, tmp_path, tls_certificate=certificate, tls_key=key) as gateway:
        url = f"https://{gateway.server.host}:{gateway.server.port}"
        trusting = ssl.create_default_context(cafile=str(certificate))
        async with gateway.client.post(
            url + CHAT, json=chat_body(stream=True), headers=token_headers, ssl=trusting
        ) as response:
            assert response.headers["Strict-Transport-Security"].startswith("max-age=")
            assert "[DONE]" in await response.text()
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        async with aiohttp.ClientSession() as client:
            with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
                await client.get(url + "/healthz", ssl=old)
            with pytest.raises(aiohttp.ClientError):
                await client.get(url.replace("https", "http") + "/healthz")
            make_certificate(tmp_path, "second")
            gateway.server.reload_certificate()
            with pytest.raises(aiohttp.ClientError):
                await client.get(url + "/healthz", ssl=trusting)
            renewed = ssl.create_default_context(cafile=str(certificate))
            async with client.get(url + "/healthz", ssl=renewed) as response:
                assert response.status == 200


def add_key(state_dir: Path) -> tuple[str, dict[str, str]]:
    key, token = create_key("acme", (Scope.INFER, Scope.ADMIN))
    change_keys(key_file_path(state_dir), lambda known: (*known, key))
    return key.id, {"Authorization": f"Bearer {token}"}


def test_threat_open_to_the_network_at_start(tmp_path: Path, redis_url: str) -> None:
    """The process itself refuses to listen on 0.0.0.0 without keys: exit code of settings, remedy on stderr."""
    environment = {**os.environ, "REDIS_URL": redis_url, "GLOWPLUG_STATE_DIR": str(tmp_path)}
    environment |= {"GLOWPLUG_HOST": "0.0.0.0", "GLOWPLUG_PORT": "0"}
    command = [sys.executable, "-m", "scheduler", "gateway"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert found.returncode == 78
    assert "glowplug keys api new" in found.stderr
