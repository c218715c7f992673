"""A real agent with a tiny real model, driven as the scheduler and a gateway would drive it."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.connection import connect
from scheduler.contract.messages import (
    AgentCommand,
    DrainWorker,
    GenerateRequest,
    InboxMessage,
    ModelCard,
    NodeReport,
    SamplingParams,
    SpawnWorker,
    StepFrame,
    TerminalFrame,
    WorkerChanged,
    WorkerReport,
)
from scheduler.dispatch import Dispatcher
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from tests.eventually import WITHIN_S, eventually
from tests.log_lines import read_log
from worker.build.model_sources import open_located
from worker.build.snapshot_builder import build_snapshot

MODEL = "tiny"
NODE = "node-under-test"
GATEWAY = "gateway-under-test"
CHECKPOINT = Path(__file__).parent / "data" / "tiny_llama"
MEBIBYTE = 1 << 20


@functools.cache
def _built_state_dir() -> Path:
    """One snapshot of the tiny model for the whole run; copied by every test that uses it."""
    folder = Path(tempfile.mkdtemp(prefix="gp-tiny-"))
    keyring = KeyRing.generate_file(folder / "keys" / "snapshot.keys")
    with open_located(CHECKPOINT) as source:
        build_snapshot(source, MODEL, SnapshotStore(folder / "store"), keyring)
    return folder


def copy_state_dir(target: Path) -> Path:
    """A private state folder with keys and the tiny model."""
    return Path(shutil.copytree(_built_state_dir(), target))


def is_running(pid: int) -> bool:
    """Whether ``pid`` exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def make_request(request_id: str, *, max_tokens: int = 12, **fields: Any) -> GenerateRequest:
    sampling = SamplingParams(seed=7, max_tokens=max_tokens, temperature=0.8, ignore_eos=True)
    return GenerateRequest(request_id, MODEL, GATEWAY, "a cold start", sampling, **fields)


class Host:
    """One agent process and the Redis it uses; plays scheduler and gateway. Close with ``async with``."""

    def __init__(self, redis_url: str, state_dir: Path, **env: str) -> None:
        self.redis: Redis = connect(redis_url)
        self.state_dir = state_dir
        self.log = state_dir / "agent.log"
        self.dispatcher = Dispatcher(self.redis)
        self.fencing_token = 1
        self._env = {
            **os.environ,
            "REDIS_URL": redis_url,
            "GLOWPLUG_STATE_DIR": str(state_dir),
            "GLOWPLUG_NODE_ID": NODE,
            "GLOWPLUG_DRAIN_GRACE_S": "5",
            "GLOWPLUG_THREADS": "1",
            "GLOWPLUG_STOPPED_LIMIT_S": "60",  # tests stop workers to look at them
            **env,
        }
        self.agent = self.start_agent()

    def start_agent(self) -> subprocess.Popen[bytes]:
        """A further agent process; the harness's own one is ``agent``."""
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen([sys.executable, "-m", "worker", "agent"], env=self._env, stderr=log)
        return self.agent

    async def __aenter__(self) -> Host:
        await self.wait_registered()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.agent.poll() is None:
            self.agent.send_signal(signal.SIGTERM)
            await eventually(lambda: self.agent.poll() is not None, what="agent's end")
        await self.redis.aclose()

    async def wait_registered(self) -> NodeReport:
        async def report() -> bool:
            assert self.agent.poll() is None, self.log.read_text()
            found = await self.node_report()
            return found is not None and found.pid == self.agent.pid and found.zygote_pid != 0

        await eventually(report, what="agent registered")
        found = await self.node_report()
        assert found is not None
        return found

    async def wait_queue_empty(self) -> None:
        """Wait until no request is queued or claimed: a worker gives its claim back just after the terminal frame."""

        async def empty() -> bool:
            return await self.dispatcher.queue_depth(MODEL) == 0

        await eventually(empty, what="the queue is empty")

    async def wait_logged(self, event: str) -> None:
        """Wait for a line of that event in the agent's log."""
        await eventually(lambda: f'"event": "{event}"' in self.log.read_text(), what=f"log line {event}")

    def logged_pid(self, worker_id: str) -> int:
        """Pid of a worker as its agent logged it, before the worker itself has said a word."""
        return next(int(line["pid"]) for line in read_log(self.log, "worker_started") if line["worker_id"] == worker_id)

    # --- as the scheduler ---------------------------------------------------------------------------------------------

    async def order(self, command: AgentCommand) -> None:
        fields: dict[Any, Any] = {keys.FIELD: codec.encode(command)}
        await self.redis.xadd(keys.node_commands(NODE), fields)

    async def order_spawn(
        self, worker_id: str, model: str = MODEL, marks: dict[str, int] | None = None, **fields: Any
    ) -> None:
        await self.order(SpawnWorker(worker_id, model, self.fencing_token, 16, 64 * MEBIBYTE, marks or {}, **fields))

    async def order_drain(self, worker_id: str, grace_s: float = 5.0) -> None:
        await self.order(DrainWorker(worker_id, self.fencing_token, grace_s))

    async def spawn(self, worker_id: str, **fields: Any) -> WorkerReport:
        """Order a worker and wait until it is ready."""
        await self.order_spawn(worker_id, **fields)
        await self.wait_change(worker_id, "ready")
        return await self.worker_report(worker_id)

    async def changes(self, worker_id: str) -> list[WorkerChanged]:
        messages = [codec.decode(f[b"m"], InboxMessage) for _, f in await self.redis.xrange(keys.INBOX)]
        return [m for m in messages if isinstance(m, WorkerChanged) and m.worker_id == worker_id]

    async def wait_change(self, worker_id: str, state: str, *, exited: bool = False) -> WorkerChanged:
        async def found() -> WorkerChanged | None:
            matching = [c for c in await self.changes(worker_id) if c.state == state and c.exited == exited]
            return matching[-1] if matching else None

        change: WorkerChanged = await eventually(found, what=f"{worker_id} {state} (exited={exited})")
        return change

    async def worker_report(self, worker_id: str) -> WorkerReport:
        async def found() -> WorkerReport | None:
            data = await self.redis.get(keys.worker(worker_id))
            return codec.decode(data, WorkerReport) if data else None

        report: WorkerReport = await eventually(found, what=f"report of {worker_id}")
        return report

    async def node_report(self) -> NodeReport | None:
        data = await self.redis.get(keys.node(NODE))
        return codec.decode(data, NodeReport) if data else None

    async def wait_security_counts(self, **expected: int) -> None:
        """Wait until exactly these events were counted: whoever sees a refused card may be quicker than its count."""

        async def found() -> bool:
            counts = await self.redis.hgetall(keys.SECURITY_COUNTS)  # type: ignore[misc]
            return {kind.decode(): int(count) for kind, count in counts.items()} == expected

        await eventually(found, what=f"security events {expected}")

    async def card(self, model: str = MODEL) -> ModelCard | None:
        data = await self.redis.hget(keys.MODELS, model)  # type: ignore[misc]
        return codec.decode(data, ModelCard) if data else None

    # --- as a gateway -------------------------------------------------------------------------------------------------

    async def frames(self, request_id: str) -> list[StepFrame | TerminalFrame]:
        return [codec.decode_frame(f) for f in await self.redis.lrange(keys.token_log(request_id), 0, -1)]  # type: ignore[misc]

    async def wait_answer(self, request_id: str, within_s: float = WITHIN_S) -> tuple[list[str], TerminalFrame]:
        """Text of every choice and the terminal frame; checks that the log has exactly one, at its end."""

        async def ended() -> bool:
            last = await self.redis.lrange(keys.token_log(request_id), -1, -1)  # type: ignore[misc]
            return bool(last) and codec.is_terminal(last[0])

        await eventually(ended, within_s=within_s, what=f"end of {request_id}; {self.log.read_text()[-2000:]}")
        *steps, terminal = await self.frames(request_id)
        assert isinstance(terminal, TerminalFrame)
        assert all(isinstance(step, StepFrame) for step in steps)
        texts: dict[int, str] = {}
        for step in steps:
            for event in step.events:  # type: ignore[union-attr]
                texts[event.choice] = texts.get(event.choice, "") + event.text
        return [texts[choice] for choice in sorted(texts)], terminal

    async def ask(self, request_id: str, **fields: Any) -> tuple[list[str], TerminalFrame]:
        await self.dispatcher.enqueue(make_request(request_id, **fields))
        return await self.wait_answer(request_id)

    async def stop_in_mid_stream(
        self, pid: int, make: Callable[..., GenerateRequest] = make_request, **fields: Any
    ) -> str:
        """SIGSTOP a worker while it runs a request that has some frames and no end; that request's id."""
        for number in range(20):
            request_id = f"storm-{number}"
            await self.dispatcher.enqueue(make(request_id, **fields))
            await self.wait_frames(request_id, 2)
            os.kill(pid, signal.SIGSTOP)
            if all(isinstance(frame, StepFrame) for frame in await self.frames(request_id)):
                return request_id
            os.kill(pid, signal.SIGCONT)  # the tiny model was quicker
        raise AssertionError("no request was caught in mid-stream")

    async def wait_frames(self, request_id: str, at_least: int) -> None:
        async def enough() -> bool:
            return bool(await self.redis.llen(keys.token_log(request_id)) >= at_least)  # type: ignore[misc]

        await eventually(enough, what=f"{at_least} frames of {request_id}")


async def wait_gone(*pids: int) -> None:
    """Wait until none of the processes runs."""
    await eventually(lambda: not any(is_running(pid) for pid in pids), what=f"processes {pids} gone")


__all__ = ["GATEWAY", "MODEL", "NODE", "Host", "copy_state_dir", "is_running", "make_request", "wait_gone"]
