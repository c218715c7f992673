"""Servers behind TLS, access lists and sentinels: the queue and the token bus work there as on a socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError

from loadtest.processes import free_port
from scheduler.contract.connection import connect
from scheduler.contract.environment import SettingsError, read_process_settings
from scheduler.contract.errors import GlowplugError
from scheduler.dispatch import Dispatcher
from scheduler.embedded_redis import find_server_binary
from tests.certificates import make_certificate
from tests.eventually import eventually
from tests.queue_fixtures import MODEL, Recorder, connected, make_request, make_step, started_hub
from worker.publisher import TokenPublisher


@contextlib.contextmanager
def server(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server or sentinel on a TCP port of loopback."""
    folder.mkdir()
    command = [find_server_binary(), *options, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def wait_listening(port: int) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    await eventually(answers, what=f"a server on {port}")


async def deliver(url: str, request_id: str) -> None:
    """One request through the queue, one frame through log and channel."""
    async with connected(url) as redis, started_hub(redis) as hub:
        request, heard = make_request(request_id), Recorder()
        hub.open(request_id, heard)
        await Dispatcher(redis).enqueue(request)
        publisher = TokenPublisher(redis)
        run = await publisher.begin(request, 1)
        publisher.publish([(request_id, make_step(1))])
        await publisher.wait_logged(run)
        await eventually(lambda: heard.numbers == [1], what="the frame")
        await publisher.aclose()


@contextlib.asynccontextmanager
async def tls_front(port: int, certificate: Path, key: Path) -> AsyncIterator[int]:
    """A proxy that ends TLS before the server on ``port``; its own port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer))

    front = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield front.sockets[0].getsockname()[1]
    finally:
        front.close()


async def test_tls_and_an_access_list(tmp_path: Path) -> None:
    """``rediss://`` with a user of the access list and a CA of one's own; a server of no known CA is not talked to."""
    port = free_port()
    acl = ("--user", "glowplug", "on", ">secret", "~*", "&*", "+@all", "--user", "default", "off")
    certificate, key = make_certificate(tmp_path)
    with server(tmp_path / "r", port, *acl):
        await wait_listening(port)
        async with tls_front(port, certificate, key) as front:
            await deliver(f"rediss://glowplug:secret@127.0.0.1:{front}/0?ssl_ca_certs={certificate}", "r1")
            stranger: Any = connect(f"rediss://glowplug:secret@127.0.0.1:{front}/0")
            with pytest.raises((RedisError, TimeoutError)):
                async with asyncio.timeout(1):
                    await stranger.ping()
            await stranger.aclose()


async def test_sentinels_name_the_master_and_its_successor(tmp_path: Path) -> None:
    """After the master is killed, the same client goes on at the replica that was promoted."""
    master, replica, sentinel = free_port(), free_port(), free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"sentinel monitor main 127.0.0.1 {master} 1\nsentinel down-after-milliseconds main 1000\n"
        "sentinel failover-timeout main 2000\n"
    )
    with (
        server(tmp_path / "m", master, "--repl-diskless-sync-delay", "0") as first,
        server(tmp_path / "r", replica, "--replicaof", f"127.0.0.1 {master}"),
    ):
        await wait_listening(replica)
        async with connected(f"redis://127.0.0.1:{replica}") as follower:
            await eventually(lambda: is_linked(follower), what="the replica follows")
        with server(tmp_path / "s", sentinel, str(config), "--sentinel"):
            await wait_listening(sentinel)
            await wait_knows_replica(f"redis://127.0.0.1:{sentinel}")
            url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel}/main/0"
            await deliver(url, "r1")
            async with connected(url) as redis:
                first.kill()
                await eventually(lambda: enqueues(redis), what="the promoted replica")
            await deliver(url, "r3")


async def wait_knows_replica(url: str) -> None:
    """The sentinel looks every 10 s; told to look more often, it knows at once.

    How often it pings stays: it promotes no replica that has told nothing for five of those periods.
    """
    asked: Any = connect(url)
    await asked.execute_command("SENTINEL", "DEBUG", "info-period", "100")

    async def knows() -> bool:
        found = await asked.execute_command("SENTINEL", "REPLICAS", "main")
        return len(found) == 1

    await eventually(knows, what="the sentinel knows the replica")
    await asked.aclose()


async def is_linked(redis: Any) -> bool:
    return (await redis.info("replication")).get("master_link_status") == "up"


async def enqueues(redis: Any) -> bool:
    try:
        await Dispatcher(redis).enqueue(make_request("r2", model=MODEL))
    except (RedisError, GlowplugError):
        return False
    return True


@pytest.mark.parametrize("url", ["http://x", "redis+sentinel:/x", "postgres://user:secret@host"])
def test_another_scheme_is_refused_without_showing_the_password(url: str) -> None:
    """The message names the variable and the forms there are."""
    with pytest.raises(SettingsError, match="REDIS_URL") as refused:
        read_process_settings({"REDIS_URL": url})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["redis+sentinel://host:1", "redis+sentinel:///main", "redis+sentinel://host:x/main"])
def test_a_sentinel_url_without_host_port_or_service_is_refused(url: str) -> None:
    """Said before anything is connected."""
    with pytest.raises(ValueError, match="HOST:PORT"):
        connect(url)
