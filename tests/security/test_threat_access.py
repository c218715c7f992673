"""Threats of getting in: without a key, with a stolen, revoked or guessed one, or through a browser or a spelling."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.api_keys import (
    ApiKey,
    ApiKeyError,
    ApiKeySet,
    Scope,
    change_keys,
    create_key,
    digest_token,
    key_file_path,
    load_keys,
)
from scheduler.contract.environment import SettingsError
from scheduler.gateway.access import OPEN_PATHS, OPEN_PREFIX, check_may_start, scope_of
from tests.eventually import eventually
from tests.gateway_fixtures import MODEL, GatewayHarness, chat_body, make_card, run_gateway

CHAT = "/v1/chat/completions"
ALL = (Scope.INFER, Scope.BATCH, Scope.ADMIN)


def add_key(state_dir: Path, tenant: str = "acme", scopes: tuple[Scope, ...] = ALL, **options: Any) -> str:
    """A new key in the file of ``state_dir``; its token."""
    key, token = create_key(tenant, scopes, **options)
    change_keys(key_file_path(state_dir), lambda keys: (*keys, key))
    return token


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
async def token(tmp_path: Path) -> str:
    return add_key(tmp_path)


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path, token: str) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path) as harness:
        yield harness


async def status_of(gateway: GatewayHarness, method: str, path: str, **options: Any) -> int:
    async with gateway.client.request(method, gateway.url + path, **options) as response:
        body = await response.read()
        if response.status in (401, 403):
            shape = {"message", "type"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}
            assert set(json.loads(body)["error"]) == shape  # Anthropic's there, OpenAI's everywhere else
        return response.status


async def test_threat_no_key(gateway: GatewayHarness) -> None:
    """Every route but the probes and the empty page answers 401 in its dialect's shape without a key."""
    routes = {
        (route.method, route.resource.canonical)
        for route in gateway.server._runner.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert len(routes) >= 11
    for method, path in routes:
        wanted = {200} if path in OPEN_PATHS else {200, 404} if path.startswith(OPEN_PREFIX) else {401}
        assert await status_of(gateway, method, re.sub(r"\{.*?\}", "x", path)) in wanted, (method, path)
    async with gateway.client.post(gateway.url + CHAT, json=chat_body()) as response:
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert (await response.json())["error"]["code"] == "missing_api_key"
    assert gateway.worker.seen == []


async def test_threat_guessed_key(gateway: GatewayHarness, token: str) -> None:
    """No part of a key opens anything: other secrets, cut, longer, other case, other schemes, not ASCII."""
    key_id = token.split("_")[1]
    last = "A" if token[-1] != "A" else "B"
    wrong = ["", "gp_", key_id, f"gp_{key_id}_", token[:-1] + last, token[:-2], token + "x", token.upper(), "é" * 40]
    wrong += [f"gp_{key_id}_{'A' * 43}", f"gp_aaaaaaaa_{token.split('_', 2)[2]}", token * 3]
    for guess in wrong:
        assert await status_of(gateway, "GET", "/v1/models", headers={"x-api-key": guess}) == 401, guess
    lines = gateway.server.gateway.metrics.render(None, {})[0].decode().splitlines()
    counts = [line for line in lines if line.startswith("glowplug_refused_keys_total{")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in counts) == len(wrong), counts
    for header in (f"Basic {token}", token, f"Bearer{token}", "Bearer", ""):
        assert await status_of(gateway, "GET", "/v1/models", headers={"Authorization": header}) == 401, header
    assert await status_of(gateway, "GET", "/v1/models", headers=bearer(token)) == 200
    assert await status_of(gateway, "GET", "/v1/models", headers={"x-api-key": token}) == 200


def test_threat_key_comparison_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are compared in constant time, and an unknown id costs the same comparison as a known one."""
    compared: list[tuple[str, str]] = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("scheduler.api_keys.hmac.compare_digest", compare)
    key, token = create_key("acme", ALL)
    keys = ApiKeySet((key,))
    for wrong in (f"gp_{key.id}_x", "gp_aaaaaaaa_x", "x"):
        assert keys.find(wrong) is None
    assert keys.find(token) == key
    assert [len(a) == len(b) == 64 for a, b in compared] == [True] * 4


def test_threat_stolen_key_file(tmp_path: Path) -> None:
    """The file holds no key and is readable by its owner only; one that others may read is refused."""
    token = add_key(tmp_path)
    path = key_file_path(tmp_path)
    text = path.read_text()
    assert token.split("_", 2)[2] not in text
    assert token not in text
    assert digest_token(token, token.split("_")[1]) in text
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(ApiKeyError, match="0640"):
        load_keys(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"version":2,"keys":[]}', b"[" * 100_000])
def test_threat_broken_key_file(tmp_path: Path, content: bytes) -> None:
    """A file that is no key file stops the start, whatever is in it; it never means that no keys are needed."""
    path = key_file_path(tmp_path)
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ApiKeyError):
        load_keys(path)


async def test_threat_revoked_key(gateway: GatewayHarness, tmp_path: Path, token: str) -> None:
    """Revoked in the file: refused by a running gateway without a restart. New keys work likewise."""
    assert await status_of(gateway, "GET", "/v1/models", headers=bearer(token)) == 200

    def revoke(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        import msgspec

        return tuple(msgspec.structs.replace(key, revoked_at_s=1) for key in keys)

    change_keys(key_file_path(tmp_path), revoke)
    other = add_key(tmp_path)

    async def is_refused() -> bool:
        return await status_of(gateway, "GET", "/v1/models", headers=bearer(token)) == 401

    await eventually(is_refused)
    assert await status_of(gateway, "GET", "/v1/models", headers=bearer(other)) == 200


async def test_threat_expired_key(gateway: GatewayHarness, tmp_path: Path) -> None:
    """A key is refused from its expiry on."""
    old = add_key(tmp_path, expires_at_s=int(time.time()) - 1)
    young = add_key(tmp_path, expires_at_s=int(time.time()) + 1000)

    async def is_known() -> bool:
        return await status_of(gateway, "GET", "/v1/models", headers=bearer(young)) == 200

    await eventually(is_known)
    assert await status_of(gateway, "GET", "/v1/models", headers=bearer(old)) == 401


async def test_threat_key_file_removed(gateway: GatewayHarness, tmp_path: Path, token: str) -> None:
    """Whoever deletes or breaks the key file does not open the gateway: nobody gets in any more."""
    path = key_file_path(tmp_path)
    path.write_bytes(b"broken")
    assert await status_of(gateway, "GET", "/v1/models") == 401
    path.unlink()

    async def is_refused() -> bool:
        return await status_of(gateway, "GET", "/v1/models", headers=bearer(token)) == 401

    await eventually(is_refused)
    assert await status_of(gateway, "GET", "/v1/models") == 401


async def test_threat_key_beyond_its_scope(gateway: GatewayHarness, tmp_path: Path) -> None:
    """A key for inference reads no metrics, traces or status; one for operators runs no model: 403."""
    infer, admin = add_key(tmp_path, scopes=(Scope.INFER,)), add_key(tmp_path, scopes=(Scope.ADMIN,))

    async def is_known() -> bool:
        return await status_of(gateway, "GET", "/v1/models", headers=bearer(infer)) == 200

    await eventually(is_known)
    for path in ("/metrics", "/admin/status", "/admin/traces/last", "/%61dmin/status"):
        assert await status_of(gateway, "GET", path, headers=bearer(infer)) == 403, path
    assert await status_of(gateway, "POST", CHAT, json=chat_body(), headers=bearer(admin)) == 403
    assert await status_of(gateway, "GET", "/metrics", headers=bearer(admin)) == 200
    assert await status_of(gateway, "GET", "/admin/status", headers=bearer(admin)) == 200


def test_threat_path_spelling() -> None:
    """Scopes go by whole path segments; whatever is not listed needs a key all the same."""
    assert scope_of("/admin") is scope_of("/admin/status") is scope_of("/metrics") is Scope.ADMIN
    assert scope_of("/v1/files/x") is scope_of("/v1/batches") is Scope.BATCH
    assert scope_of("/v1/models/{model}") is scope_of("/v1/filesystem") is Scope.INFER
    assert scope_of("/adminx") is None


async def test_threat_other_tenants_models(gateway: GatewayHarness, tmp_path: Path) -> None:
    """A model that a key may not see is answered byte for byte like one that does not exist, on every route."""
    await gateway.publish(make_card(), make_card("secret-model"))
    narrow = bearer(add_key(tmp_path, tenant="b", models=("tin*",)))

    async def listed() -> Any:
        async with gateway.client.get(gateway.url + "/v1/models", headers=narrow) as response:
            return response.status == 200 and [model["id"] for model in (await response.json())["data"]]

    assert await eventually(listed) == [MODEL]
    for hidden, unknown in (("secret-model", "absent-model"),):
        answers = []
        for name in (hidden, unknown):
            found = []
            async with gateway.client.get(f"{gateway.url}/v1/models/{name}", headers=narrow) as response:
                found.append((response.status, (await response.text()).replace(name, "NAME")))
            async with gateway.client.post(gateway.url + CHAT, json=chat_body(model=name), headers=narrow) as response:
                found.append((response.status, (await response.text()).replace(name, "NAME")))
            answers.append(found)
        assert answers[0] == answers[1]
        assert [status for status, _ in answers[0]] == [404, 404]
        assert "secret" not in str(answers)


async def test_threat_other_tenants_stream(gateway: GatewayHarness, tmp_path: Path, token: str) -> None:
    """Who knows another tenant's request id cannot read its stream: answered like an id that never was."""
    body = chat_body(stream=True)
    async with gateway.client.post(gateway.url + CHAT, json=body, headers=bearer(token)) as response:
        request_id = response.headers["X-Request-Id"]
        await response.read()
    other = bearer(add_key(tmp_path, tenant="b"))

    async def is_known() -> bool:
        return await status_of(gateway, "GET", "/v1/models", headers=other) == 200

    await eventually(is_known)
    path = "/v1/requests/{}/stream"
    assert await status_of(gateway, "GET", path.format(request_id), headers=bearer(token)) == 200
    for wanted in (request_id, "0" * 26):
        assert await status_of(gateway, "GET", path.format(wanted), headers=other) == 404
    event = {**other, "Last-Event-ID": f"{request_id}.0"}
    async with gateway.client.post(gateway.url + CHAT, json=body, headers=event) as response:
        assert "Hello" not in await response.text() or request_id not in response.headers["X-Request-Id"]


def test_threat_open_to_the_network() -> None:
    """Beyond loopback a gateway does not start without keys, nor with --no-auth; the remedy is named."""
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", ""):
        with pytest.raises(SettingsError, match="glowplug keys api new"):
            check_may_start(host, has_keys=False, no_auth=False)
        with pytest.raises(SettingsError, match="--no-auth"):
            check_may_start(host, has_keys=True, no_auth=True)
        check_may_start(host, has_keys=True, no_auth=False)
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1", "::ffff:127.0.0.1"):
        check_may_start(host, has_keys=False, no_auth=False)


async def test_threat_dns_rebinding(redis_url: str, tmp_path: Path) -> None:
    """Without keys a web page cannot reach the gateway through a name of its own or as another origin."""
    async with run_gateway(redis_url, tmp_path) as gateway:
        for headers in ({"Host": "evil.example:8080"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
            assert await status_of(gateway, "GET", "/v1/models", headers=headers) == 403, headers
        for headers in ({"Host": "localhost:1"}, {"Host": "gateway"}, {"Origin": "http://127.0.0.1:8080"}):
            assert await status_of(gateway, "GET", "/v1/models", headers=headers) == 200, headers


async def test_threat_foreign_page_with_cors(redis_url: str, tmp_path: Path) -> None:
    """CORS is off by default; an allowed origin may read answers, another may not, and a preflight opens nothing."""
    async with (
        run_gateway(redis_url, tmp_path) as gateway,
        gateway.client.get(gateway.url + "/v1/models") as response,
    ):
        assert not [name for name in response.headers if name.lower().startswith("access-control")]
    token = add_key(tmp_path)
    async with run_gateway(redis_url, tmp_path, cors_origins=("https://app.example",)) as gateway:
        asked = {"Access-Control-Request-Method": "POST"}
        for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
            headers = {"Origin": origin}
            async with gateway.client.options(gateway.url + CHAT, headers={**headers, **asked}) as response:
                assert response.status == 204
                assert (response.headers.get("Access-Control-Allow-Origin") == origin) is allowed
            async with gateway.client.get(gateway.url + "/v1/models", headers={**headers, **bearer(token)}) as response:
                assert response.status == 200
                assert (response.headers.get("Access-Control-Allow-Origin") == origin) is allowed


async def test_threat_answers_as_documents(gateway: GatewayHarness, token: str) -> None:
    """Every answer forbids sniffing, framing, loading and referrers; also errors, streams and unparsable requests."""
    stream = chat_body(stream=True)
    for path, body in (("/v1/models", None), ("/nothing", None), (CHAT, stream), (CHAT, {}), ("/healthz", None)):
        method = "GET" if body is None else "POST"
        async with gateway.client.request(method, gateway.url + path, json=body, headers=bearer(token)) as response:
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Referrer-Policy"] == "no-referrer"
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
    writer.write(b"GARBAGE\r\n\r\n")
    answer = (await reader.read()).decode()
    writer.close()
    assert "nosniff" in answer
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "malformed_http"


async def test_threat_secrets_in_logs(gateway: GatewayHarness, token: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither prompt nor answer nor key reaches the log: served, refused, or as HTTP that cannot be parsed."""
    secret, key_secret = "swordfish-prompt", token.split("_", 2)[2]
    body = chat_body(messages=[{"role": "user", "content": secret}])
    assert await status_of(gateway, "POST", CHAT, json=body, headers=bearer(token)) == 200
    assert await status_of(gateway, "POST", CHAT, json={**body, "top_k": "x"}, headers=bearer(token)) == 400
    assert await status_of(gateway, "POST", CHAT, json=body, headers=bearer(token[:-4])) == 401
    for raw in (
        f"POST {CHAT} HTTP/1.1\r\nAuthorization: Bearer {token}\r\nbad header {secret}\r\n\r\n",
        f"POST {CHAT}?{secret} HTTP/1.1\r\nAuthorization: Bearer {token}\r\nX: {secret * 1000}\r\n\r\n",
        f"{secret} {token}\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
        writer.write(raw.encode())
        await reader.read()
        writer.close()
    captured = capfd.readouterr()
    text = captured.out + captured.err
    assert "request" in text
    assert token.split("_")[1] in text  # the id is what a log may name
    for forbidden in (secret, key_secret, key_secret[:20], "Hello world"):
        assert forbidden not in text


async def test_threat_admin_acts_unseen(gateway: GatewayHarness, tmp_path: Path, token: str) -> None:
    """Keys made and revoked, and admin orders, are lines of an append-only file, with who did it; refused ones too."""
    from click.testing import CliRunner

    from scheduler.api_keys_command import api

    runner = CliRunner()
    made = runner.invoke(api, ["new", "--state-dir", str(tmp_path), "--tenant", "t2"])
    assert made.exit_code == 0, made.output
    new_id = made.output.split("_")[1]
    assert runner.invoke(api, ["revoke", f"gp_{new_id}", "--state-dir", str(tmp_path)]).exit_code == 0
    orders = [(f"/admin/models/{MODEL}:wake", 202, None), ("/admin/models/none:pin", 404, "model_not_found")]
    orders += [(f"/admin/models/{MODEL}:park", 409, "park_unsupported"), ("/admin/status", 405, "http_error")]
    for path, expected, _ in orders:
        assert await status_of(gateway, "POST", path, headers=bearer(token)) == expected
    limited = add_key(tmp_path, scopes=(Scope.INFER,))
    await eventually(lambda: known_to(gateway, limited), what="the new key")
    for _ in range(3):
        assert await status_of(gateway, "POST", f"/admin/models/{MODEL}:unload", headers=bearer(limited)) == 403
    path = tmp_path / "log" / "audit.jsonl"

    def lines() -> Any:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return found if len({line.get("path") for line in found}) == 2 + len(orders) else None

    found = await eventually(lines)
    assert [line["event"] for line in found[:2]] == ["api_key_created", "api_key_revoked"]
    assert all(line["actor"] == "command-line" and line["timestamp"] for line in found[:2])
    told = {line["path"]: (line["status"], line["code"], line["actor"]) for line in found[2:]}
    assert told == {
        **{order: (status, code, token.split("_")[1]) for order, status, code in orders},
        f"/admin/models/{MODEL}:unload": (403, "insufficient_scope", limited.split("_")[1]),
    }
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.output.split("_", 2)[2][:30] not in path.read_text()
    assert os.environ.get("GLOWPLUG_API_KEYS") is None


async def known_to(gateway: GatewayHarness, token: str) -> bool:
    return await status_of(gateway, "GET", "/v1/models", headers=bearer(token)) == 200


def test_keys_are_listed_without_secrets(tmp_path: Path) -> None:
    """The list shows prefix, tenant and state; a key that does not exist cannot be revoked."""
    from click.testing import CliRunner

    from scheduler.api_keys_command import api

    runner, token = CliRunner(), add_key(tmp_path, tenant="acme")
    listed = json.loads(runner.invoke(api, ["list", "--json", "--state-dir", str(tmp_path)]).output)
    assert [(row["prefix"], row["tenant"], row["state"]) for row in listed] == [(token[:11], "acme", "active")]
    assert token.split("_", 2)[2] not in str(listed)
    assert runner.invoke(api, ["revoke", "gp_none", "--state-dir", str(tmp_path)]).exit_code == 1
