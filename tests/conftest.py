"""Fixtures that every tier may use: one real server for the whole run, empty for each test."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import uvloop

from scheduler.embedded_redis import ensure_server, stop_server

pytest_plugins = ("tests.model_fixtures", "tests.encoder_fixtures")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that the product runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def short_tmp_path() -> Iterator[Path]:
    """A folder whose path leaves room for unix sockets (107 bytes), removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="gp-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="gp-redis-"))
    server = ensure_server(folder, maxmemory="128mb")
    yield server.url
    stop_server(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def redis_url(_redis_server: str) -> str:
    """URL of a real server that holds nothing."""
    with redis.Redis.from_url(_redis_server) as client:
        client.flushall()
    return _redis_server
