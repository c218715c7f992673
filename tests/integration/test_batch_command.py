"""``glowplug batch`` against a real gateway: results in order, exit codes, and Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scheduler.contract.messages import GenerateRequest
from tests.batch_fixtures import batch_line, decode_rows, encode_lines
from tests.eventually import eventually
from tests.gateway_fixtures import GatewayHarness, Publish, run_gateway, say


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path) as running:
        yield running


async def start(gateway: GatewayHarness, *words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scheduler.command", "batch", *words, "--url", gateway.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "GLOWPLUG_STATE_DIR": "/nonexistent"},
    )


async def run(gateway: GatewayHarness, *words: str) -> tuple[int, bytes, str]:
    """Exit code, stdout and stderr."""
    process = await start(gateway, *words)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out, err.decode()


async def test_submit_and_wait_writes_the_results_in_order(gateway: GatewayHarness, tmp_path: Path) -> None:
    """All lines answered: exit 0, rows in the order of the requests; again: the same batch, nothing run twice."""
    path = tmp_path / "requests.jsonl"
    path.write_bytes(encode_lines(batch_line(i) for i in reversed(range(9))))
    code, out, err = await run(gateway, "submit", str(path), "--wait")
    assert code == 0, err
    assert [row["custom_id"] for row in decode_rows(out)] == [f"r{i}" for i in reversed(range(9))]
    code, _, err = await run(gateway, "submit", str(path), "--wait", "-o", str(tmp_path / "results.jsonl"))
    assert (code, len(gateway.worker.seen)) == (0, 9), err
    assert (tmp_path / "results.jsonl").read_bytes() == out
    code, out, _ = await run(gateway, "list", "--json")
    (listed,) = json.loads(out)["data"]
    code, out, _ = await run(gateway, "status", listed["id"])
    assert b"completed    9/9 lines" in out
    assert (await run(gateway, "results", listed["id"], "--json"))[0] == 0


async def test_a_batch_with_errors_ends_with_4_and_its_rows(gateway: GatewayHarness, tmp_path: Path) -> None:
    """One line is refused: its row is among the results, in its place."""
    path = tmp_path / "requests.jsonl"
    path.write_bytes(encode_lines([batch_line(0), batch_line(1, temperature=9), batch_line(2)]))
    code, out, err = await run(gateway, "submit", str(path), "--wait")
    assert (code, [bool(row["error"]) for row in decode_rows(out)]) == (4, [False, True, False]), err
    path.write_bytes(encode_lines([batch_line(0)]) + b"{}\n")
    code, out, err = await run(gateway, "submit", str(path), "--wait")
    assert (code, out) == (4, b"")
    assert "line 2: invalid_json_line" in err


async def test_after_ctrl_c_the_batch_goes_on(gateway: GatewayHarness, tmp_path: Path) -> None:
    """130, and how to come back; the same command finds the batch again; cancel ends one."""
    gate = asyncio.Event()

    async def held(request: GenerateRequest, publish: Publish) -> None:
        await gate.wait()
        await say("done")(request, publish)

    gateway.worker.script = held
    path = tmp_path / "requests.jsonl"
    path.write_bytes(encode_lines(batch_line(i) for i in range(3)))
    process = await start(gateway, "submit", str(path), "--wait")
    assert process.stderr is not None
    assert (await process.stderr.readline()).startswith(b"batch batch_")
    await eventually(lambda: gateway.worker.seen, what="a line under way")
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130, err
    assert b"the batch goes on" in err
    gate.set()
    code, out, err_text = await run(gateway, "submit", str(path), "--wait")
    assert (code, len(decode_rows(out)), len(gateway.worker.seen)) == (0, 3, 3), err_text
    gate.clear()
    code, out, _ = await run(gateway, "submit", str(path), "--new")
    code, out, err_text = await run(gateway, "cancel", out.decode().strip())
    assert (code, b"cancel" in out) == (0, True), err_text


async def test_on_a_terminal_a_bar_shows_how_far_it_is(gateway: GatewayHarness, tmp_path: Path) -> None:
    """Status, lines done of all, time so far and time left, while the results go elsewhere."""
    gate, answered = asyncio.Event(), 0

    async def held(request: GenerateRequest, publish: Publish) -> None:
        nonlocal answered
        answered += 1
        if answered > 2:
            await gate.wait()
        await say("done")(request, publish)

    gateway.worker.script = held
    path = tmp_path / "requests.jsonl"
    path.write_bytes(encode_lines(batch_line(i) for i in range(4)))
    terminal, end = os.openpty()
    os.set_blocking(terminal, False)
    words = ("submit", str(path), "--wait", "-o", str(tmp_path / "out.jsonl"), "--url", gateway.url)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scheduler.command", "batch", *words),
        stderr=end,
        env={**os.environ, "GLOWPLUG_STATE_DIR": "/nonexistent", "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(end)
    seen = b""

    def read() -> bytes:
        nonlocal seen
        with contextlib.suppress(OSError):  # nothing there, or the other end is closed
            while data := os.read(terminal, 65536):
                seen += data
        return seen

    await eventually(lambda: b"2/4" in read(), what="two of four lines in the bar")
    gate.set()
    assert await process.wait() == 0
    read()
    os.close(terminal)
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode()
    assert re.search(r"in_progress .*2/4 \d:\d\d:\d\d left [-\d]+:[-\d]+", text), text
    assert "completed    4/4 lines" in text
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 4


async def test_wrong_usage_and_no_server_have_their_own_exit_codes(gateway: GatewayHarness, tmp_path: Path) -> None:
    """2 for a file that is not there, 1 for one without requests, 3 where nothing listens."""
    assert (await run(gateway, "submit", str(tmp_path / "none")))[0] == 2
    (tmp_path / "empty").write_bytes(b"\n")
    assert (await run(gateway, "submit", str(tmp_path / "empty")))[0] == 1
    gateway.url = "http://127.0.0.1:9"
    assert (await run(gateway, "list"))[0] == 3
