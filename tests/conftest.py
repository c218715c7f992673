"""Fixtures that every tier may use: one real server for the whole run, empty for each test."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import structlog
import uvloop
from hypothesis import HealthCheck, settings

from tests import one_blas_thread  # noqa: F401  # imported for its side effect, before NumPy

# isort: split

from scheduler.embedded_redis import ensure_server, stop_server

#: Hundreds of processes start here; each would compile the product's sources again where the environment forbids to
#: keep what was compiled. What is compiled lies in __pycache__ beside the sources.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

#: The same examples in every run, and no deadline that a loaded machine could miss; ``--hypothesis-profile=explore``
#: looks for new ones.
for _profile, _is_steady in (("explore", False), ("steady", True)):
    settings.register_profile(
        _profile, derandomize=_is_steady, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile("steady")

_LEFT_OUT = pytest.StashKey[int]()

pytest_plugins = ("tests.model_fixtures", "tests.encoder_fixtures")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that the product runs on."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave browser tests out where there is no browser; CI installs one."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
        config.stash[_LEFT_OUT] = len(left_out)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin early what takes long and needs no test's attention."""
    gc.collect()
    gc.freeze()  # what collecting imported stays: a later full collection need not look at it again
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    if not session.config.option.collectonly and any(hasattr(m, "compiled_python_component") for m in modules):
        from tests.python_guest_fixtures import begin_building

        begin_building()
    if not session.config.option.collectonly and any(
        hasattr(m, name) for m in modules for name in ("emulator", "emulated_backend")
    ):
        import cuda_fixtures

        cuda_fixtures.begin_building()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out."""
    if count := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{count} browser tests left out: install the packages chromium and chromium-driver"
        )


@pytest.fixture(autouse=True, scope="session")
def _hang_up_is_heard() -> Iterator[None]:
    """Under ``nohup`` SIGHUP is ignored, and every child would inherit that; a handler is not inherited."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def _environment_of_one_test() -> Iterator[None]:
    """Commands that run in this process export their state folder; the next test has another."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _logging_of_one_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands that run in this process configure logging; neither that nor a logger made by it outlives the test."""
    configure = structlog.configure
    monkeypatch.setattr(structlog, "configure", lambda **kw: configure(**{**kw, "cache_logger_on_first_use": False}))
    yield
    structlog.reset_defaults()


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
