"""Every part as a real process on a Redis of its own, to be killed, stopped and started again at will.

Two gateways, two schedulers and a node agent with a real model; and a client that keeps its own ledger: every event of
its stream once, in order, whichever gateway it came from.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from redis.asyncio import Redis

from loadtest.processes import command_name, descendants
from scheduler.contract import codec, keys
from scheduler.contract.connection import connect
from scheduler.contract.messages import StatusReport, StepFrame, TerminalFrame
from scheduler.embedded_redis import find_server_binary
from tests.eventually import eventually
from tests.log_lines import read_log

CHAT = "/v1/chat/completions"
DURABLE = ("--appendonly", "yes", "--appendfsync", "everysec")
FORGETFUL = ("--appendonly", "no")


class RedisProcess:
    """A server with options of the test's choosing."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.path = folder / "r.sock"
        self.url = f"unix://{self.path}"
        folder.mkdir(parents=True, exist_ok=True)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start it (again), over what is left of its files."""
        base = ["--port", "0", "--unixsocket", str(self.path), "--dir", str(self.folder), "--save", ""]
        command = [find_server_binary(), *base, *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 30
        while not self.answers():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline_s, "the server does not answer"
            time.sleep(0.005)
        return self.process

    def answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(0.5)
                client.connect(str(self.path))
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Answer:
    """What one client has, and how it came to it. ``ids`` are the event ids in order."""

    request_id: str = ""
    text: str = ""
    ids: list[str] = field(default_factory=list)
    is_done: bool = False
    error: dict[str, Any] | None = None
    num_resumes: int = 0
    completion_tokens: int = 0

    def check(self) -> None:
        """Every event once and in order, exactly one end.

        Raises:
            AssertionError: a gap, a repeat, or no end.
        """
        counts = [int(event_id.partition(":")[2]) for event_id in self.ids]
        assert counts == list(range(1, len(counts) + 1)), counts
        assert self.is_done != (self.error is not None), (self.is_done, self.error)


class Fleet:
    """The processes. ``async with`` starts and stops them; :meth:`mend` starts what has died."""

    def __init__(self, state_dir: Path, redis: RedisProcess, *, gateways: int = 2, **env: str) -> None:
        self.state_dir = state_dir
        self.redis_process = redis
        self.redis: Redis = connect(redis.url)
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        self.urls: dict[str, str] = {}
        self.env = {
            **os.environ,
            "REDIS_URL": redis.url,
            "GLOWPLUG_STATE_DIR": str(state_dir),
            "GLOWPLUG_NODE_ID": "fleet",
            "GLOWPLUG_HOST": "127.0.0.1",
            **env,
        }
        self._gateways = [f"gateway-{i}" for i in range(gateways)]
        self.names = [*self._gateways, "scheduler-0", "scheduler-1", "agent"]

    async def __aenter__(self) -> Fleet:
        self.mend()
        await self.wait_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self.parts.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM)
        for name, process in self.parts.items():
            try:
                await asyncio.to_thread(process.wait, 30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"{name} did not stop; {self.log(name)[-2000:]}") from None
        await self.redis.aclose()
        self.redis_process.kill()

    def mend(self) -> None:
        """Start every part that does not run."""
        for name in self.names:
            if name not in self.parts or self.parts[name].poll() is not None:
                self.start(name)

    def start(self, name: str) -> None:
        kind = name.partition("-")[0]
        module = "worker" if kind == "agent" else "scheduler"
        env, pass_fds, pipe = dict(self.env), (), None
        if kind == "gateway":
            read_end, write_end = os.pipe()
            pipe = os.fdopen(read_end)
            env["GLOWPLUG_READY_FD"], pass_fds = str(write_end), (write_end,)
            env["GLOWPLUG_PORT"] = self.urls[name].rpartition(":")[2] if name in self.urls else "0"
        with (self.state_dir / f"{name}.log").open("ab") as log:
            self.parts[name] = subprocess.Popen(
                [sys.executable, "-m", module, kind], env=env, stderr=log, pass_fds=pass_fds
            )
        if pipe is not None:
            os.close(write_end)
            with pipe:
                address = json.loads(pipe.readline() or "null")
            assert address is not None, self.log(name)[-2000:]
            self.urls[name] = f"http://{address['host']}:{address['port']}"

    def log(self, name: str) -> str:
        return (self.state_dir / f"{name}.log").read_text()

    def log_events(self, name: str, event: str) -> list[dict[str, Any]]:
        """Log lines of that event."""
        return read_log(self.state_dir / f"{name}.log", event)

    def send(self, name: str, number: signal.Signals) -> None:
        self.parts[name].send_signal(number)
        if number is signal.SIGKILL:
            self.parts[name].wait()

    async def wait_ready(self) -> None:
        """Until every gateway would serve."""

        async def ready() -> bool:
            async with aiohttp.ClientSession() as client:
                for url in self.urls.values():
                    try:
                        async with client.get(f"{url}/readyz") as response:
                            if response.status != 200:
                                return False
                    except aiohttp.ClientError:
                        return False
            return True

        await eventually(ready, what="every gateway ready")

    async def status(self) -> StatusReport:
        data: bytes = await eventually(lambda: self.redis.get(keys.STATUS), what="a status report")
        return codec.decode(data, StatusReport)

    async def leader(self) -> str:
        """Name of the scheduler process that leads."""

        async def find() -> str | None:
            raw = await self.redis.get(keys.LEADER)
            for name in self.names:
                if raw and name.startswith("scheduler") and self.parts[name].poll() is None:
                    lines = self.log_events(name, "leading")
                    if lines and lines[-1]["scheduler"] == raw.decode():
                        return name
            return None

        return str(await eventually(find, what="a leader"))

    def find_workers(self) -> list[int]:
        """Pids of the worker processes, by the name that they give themselves."""
        everything = descendants(self.parts["agent"].pid)
        names = {pid: command_name(pid) for pid in everything}
        return [pid for pid, name in names.items() if name.startswith("gp:") and name != "gp:zygote"]

    async def wait_logged(self, request_id: str, at_least: int) -> None:
        """Until the request's token log has that many frames."""

        async def enough() -> bool:
            return bool(await self.redis.llen(keys.token_log(request_id)) >= at_least)  # type: ignore[misc]

        await eventually(enough, what=f"{at_least} frames of {request_id}")

    async def check(self, answer: Answer, num_tokens: int) -> None:
        """The answer is whole: every event once and in order, one good end, and its text is that of the log.

        Not compared with a calm run: a batch of another size rounds otherwise, and greedy text may part at a near tie.

        Raises:
            AssertionError: it is not.
        """
        answer.check()
        assert (answer.error, answer.completion_tokens) == (None, num_tokens), answer
        raw = await self.redis.lrange(keys.token_log(answer.request_id), 0, -1)  # type: ignore[misc]
        *steps, terminal = [codec.decode_frame(data) for data in raw]
        assert isinstance(terminal, TerminalFrame)
        assert all(isinstance(step, StepFrame) for step in steps), "one terminal frame, at the end"
        events = [event for step in steps if isinstance(step, StepFrame) for event in step.events]
        assert answer.text == "".join(event.text for event in events)
        assert sum(event.token_id >= 0 for event in events) == num_tokens

    async def ask(self, answer: Answer, first: str = "gateway-0", **fields: Any) -> Answer:
        """Stream a chat into ``answer``; on a lost connection, go on at the next gateway."""
        body = {
            "messages": [{"role": "user", "content": "Tell me about the sea."}],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        order = [first, *(name for name in self._gateways if name != first)]
        turn = 0
        deadline_s = time.monotonic() + 100
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(sock_connect=2, sock_read=30)) as client:
            while not answer.is_done and answer.error is None:
                assert time.monotonic() < deadline_s, f"no end of {answer}"
                url = self.urls[order[turn % len(order)]]
                turn += 1
                try:
                    if not answer.request_id:
                        async with client.post(url + CHAT, json=body) as response:
                            await read_stream(response, answer)
                    else:
                        answer.num_resumes += 1
                        path = f"{url}/v1/requests/{answer.request_id}/stream"
                        headers = {"Last-Event-ID": answer.ids[-1]} if answer.ids else {}
                        async with client.get(path, headers=headers) as response:
                            await read_stream(response, answer)
                except (aiohttp.ClientError, ConnectionError):
                    await asyncio.sleep(0.05)
        return answer


async def read_stream(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """Take the events of one connection into ``answer``."""
    if response.status != 200:
        answer.error = {"status": response.status, **(await response.json())["error"]}
        return
    answer.request_id = answer.request_id or response.headers["X-Request-Id"]
    data: dict[str, Any] | None = None
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line == "data: [DONE]":
            answer.is_done = True
        elif line.startswith("data: "):
            data = json.loads(line[6:])
            if "error" in data:
                answer.error = data["error"]
        elif line.startswith("id: ") and data is not None:
            answer.ids.append(line[4:])
            for choice in data["choices"]:
                answer.text += choice["delta"].get("content") or ""
            if data.get("usage"):
                answer.completion_tokens = data["usage"]["completion_tokens"]
    if not answer.is_done and answer.error is None:
        raise aiohttp.ClientPayloadError("the stream ended without an end")


@contextlib.asynccontextmanager
async def started_fleet(state_dir: Path, *redis_options: str, **options: Any) -> AsyncIterator[Fleet]:
    """A fleet on a server with these options."""
    redis = RedisProcess(state_dir / "redis", *(redis_options or DURABLE))
    async with Fleet(state_dir, redis, **options) as fleet:
        yield fleet


def copy_linked(source: Path, target: Path) -> Path:
    """A private state folder; blobs are hard links."""

    def copy(one: str, other: str) -> None:
        os.link(one, other) if "/blobs/" in one else shutil.copy2(one, other)

    return Path(shutil.copytree(source, target, copy_function=copy))


def flip_one_bit(path: Path, position: int) -> None:
    """Change the lowest bit of one byte of a file that may be a hard link: only this name's content changes."""
    own = path.with_name(f"{path.name}.own")
    shutil.copyfile(path, own)
    with own.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.replace(own, path)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """SIGSTOP now, SIGCONT at the end."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def count_in(text: str, pattern: str) -> int:
    return len(re.findall(pattern, text))
