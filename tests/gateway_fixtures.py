"""A real gateway on loopback over a real Valkey, with a scripted worker that reads the queue and writes frames."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from redis.asyncio import Redis

from scheduler.contract import codec, job_queue, keys
from scheduler.contract.connection import connect
from scheduler.contract.environment import ProcessSettings
from scheduler.contract.errors import ErrorInfo
from scheduler.contract.messages import (
    Demand,
    GenerateRequest,
    InboxMessage,
    ModelCard,
    ModelStatus,
    NodeReport,
    StatusReport,
    StepFrame,
    TerminalFrame,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from scheduler.contract.states import FinishReason, Tier
from scheduler.contract.telemetry import Mark
from scheduler.gateway.app import GatewayServer
from scheduler.gateway.settings import GatewaySettings
from worker.publisher import TokenPublisher

MODEL = "tiny"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: As Qwen's templates write tools, calls and results, in short.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Write <tool_call>...</tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'tool' %}<tool_response>{{ message.name }}: {{ message.content }}</tool_response>"
    "{% else %}{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def function_tool(name: str, parameters: Any = None) -> dict[str, Any]:
    """A tool in OpenAI's chat form."""
    function = {"name": name, "description": f"The {name}."}
    return {"type": "function", "function": function if parameters is None else {**function, "parameters": parameters}}


def make_card(name: str = MODEL, **changes: Any) -> ModelCard:
    """A servable card."""
    fields: dict[str, Any] = {
        "name": name,
        "snapshot_id": "5ca1ab1e",
        "created_at_s": 1_700_000_000.0,
        "architecture": "llama",
        "weight_format": "bf16",
        "context_length": 2048,
        "vocab_size": 1000,
        "max_token_bytes": 16,
        "chat_template": CHAT_TEMPLATE,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    return ModelCard(**{**fields, **changes})


def make_status(tier: Tier = Tier.HOST_RAM, *, state: str = "", nodes: int = 1) -> StatusReport:
    """A scheduler's report with one model and ``nodes`` node agents."""
    row = ModelStatus(MODEL, tier, int(bool(state)), 0, 0, None, 300.0, 1 << 20, 2 << 20, state)
    node_reports = tuple(NodeReport(f"node-{i}", 1, time.time(), 1, 1, {}) for i in range(nodes))
    return StatusReport(time.time(), "leader", (row,), node_reports)


Publish = Callable[[StepFrame | TerminalFrame], None]
Script = Callable[[GenerateRequest, Publish], Awaitable[None]]


def words(*texts: str, choice: int = 0, logprob: TokenLogprob | None = None) -> list[StepFrame]:
    """One frame for each text; the last one finishes the choice with ``stop``."""
    return [
        StepFrame(
            (TokenEvent(choice, 10 + i, text, FinishReason.STOP if i == len(texts) - 1 else None, logprob),),
            time.monotonic_ns(),
        )
        for i, text in enumerate(texts)
    ]


def end(
    *, error: ErrorInfo | None = None, cold_tier: Tier | None = Tier.HOST_RAM, completion_tokens: int = 2
) -> TerminalFrame:
    """A terminal frame whose marks a worker would have set just now."""
    now = time.monotonic_ns()
    marks = {Mark.CLAIMED: now - 4000, Mark.TOKENISED: now - 3000, Mark.PREFILLED: now - 2000, Mark.SAMPLED: now - 1000}
    return TerminalFrame(
        Usage(5, completion_tokens), error, {str(k): v for k, v in marks.items()}, "w1", cold_tier, "s"
    )


def say(*texts: str, terminal: TerminalFrame | None = None) -> Script:
    """A worker that says ``texts`` in every choice and ends."""

    async def script(request: GenerateRequest, publish: Publish) -> None:
        for step in zip(*(words(*texts, choice=i) for i in range(request.num_choices)), strict=True):
            events = tuple(event for frame in step for event in frame.events)
            publish(StepFrame(events, time.monotonic_ns()))
        publish(end() if terminal is None else terminal)

    return script


async def stay_silent(request: GenerateRequest, publish: Publish) -> None:
    """A worker that never answers."""
    await asyncio.Event().wait()


@dataclass
class StubWorker:
    """Takes every request that is announced and runs ``script`` for it. ``seen`` are the requests, in order, and
    ``errors`` what went wrong with them here.

    With ``is_away`` it takes none: requests stay in the queue.
    """

    redis: Redis
    script: Script = field(default_factory=lambda: say("Hello", " world"))
    seen: list[GenerateRequest] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    is_away: bool = False

    async def run(self) -> None:
        """Until cancelled."""
        redis: Any = self.redis
        publisher = TokenPublisher(self.redis)
        last_id = b"0-0"
        tasks = set()
        try:
            while True:
                found = await redis.xread({keys.INBOX: last_id}, block=1000)
                for entry_id, fields in found[0][1] if found else []:
                    last_id = entry_id
                    message = codec.decode(fields[keys.FIELD.encode()], InboxMessage)
                    if isinstance(message, Demand) and not self.is_away:
                        task = asyncio.create_task(self._serve(publisher, message.request_id))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
        except Exception as error:
            self.errors.append(f"the worker ended: {error!r}")
            raise
        finally:
            for task in tuple(tasks):
                task.cancel()
            await publisher.aclose()

    async def _serve(self, publisher: TokenPublisher, request_id: str) -> None:
        try:
            await self._serve_or_raise(publisher, request_id)
        except Exception as error:
            self.errors.append(f"{request_id}: {error!r}")

    async def _serve_or_raise(self, publisher: TokenPublisher, request_id: str) -> None:
        body = await self.redis.get(keys.job(request_id))
        if body is None:
            self.errors.append(f"{request_id}: it was announced and is not there")
            return
        request = job_queue.decode_job(body)
        run = await publisher.begin(request, 1)
        self.seen.append(request)
        await self.script(request, lambda frame: publisher.publish([(request_id, frame)]))
        await publisher.wait_logged(run)
        publisher.end(run)


@dataclass
class GatewayHarness:
    """A running gateway, its worker and a client."""

    url: str
    server: GatewayServer
    redis: Redis
    worker: StubWorker
    client: aiohttp.ClientSession

    async def publish(self, *cards: ModelCard, status: StatusReport | None = None) -> None:
        """Make these the models there are."""
        redis: Any = self.redis
        await redis.delete(keys.MODELS)
        for card in cards:
            await redis.hset(keys.MODELS, card.name, codec.encode(card))
        await redis.set(keys.STATUS, codec.encode(status or make_status()))
        self.server.gateway.directory.invalidate()

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any, Any]:
        """Status, headers and decoded JSON body of a POST."""
        async with self.client.post(self.url + path, json=body, **options) as response:
            return response.status, response.headers, await response.json()

    async def get(self, path: str) -> tuple[int, Any, Any]:
        """Status, headers and decoded JSON body of a GET."""
        async with self.client.get(self.url + path) as response:
            return response.status, response.headers, await response.json()

    async def stream(self, path: str, body: dict[str, Any]) -> tuple[Any, list[str]]:
        """Headers, and every SSE block until the server ends the body."""
        async with self.client.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            text = (await response.read()).decode()
        assert text.endswith("\n")
        return response.headers, split_blocks(text)


def split_blocks(text: str) -> list[str]:
    """The blocks of a stream; a comment line before an event is a block of its own."""
    return re.sub(r"(?m)^(:.*)\n(?!\n)", r"\1\n\n", text).removesuffix("\n\n").split("\n\n")


def events_of(blocks: Sequence[str]) -> list[Any]:
    """The decoded data events, ``[DONE]`` left out."""
    return [json.loads(block[6:].partition("\n")[0]) for block in blocks if block.startswith("data: {")]


def comments_of(blocks: Sequence[str]) -> list[str]:
    """The comments, without their colon."""
    return [block[2:] for block in blocks if block.startswith(": ")]


def chat_body(**changes: Any) -> dict[str, Any]:
    """A small valid chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **changes}


@contextlib.asynccontextmanager
async def run_gateway(
    redis_url: str, tmp_path: Any, script: Script | None = None, **settings: Any
) -> AsyncIterator[GatewayHarness]:
    """A gateway with one servable model, stopped and closed at the end."""
    redis = connect(redis_url)
    process = ProcessSettings(tmp_path, redis_url, "test-node", "info", None)
    base = GatewaySettings(port=0, drain_grace_s=0.2, redis_limit_s=2.0)
    server = GatewayServer(msgspec.structs.replace(base, **settings), process)
    worker = StubWorker(redis)
    if script is not None:
        worker.script = script
    working = asyncio.create_task(worker.run())
    await server.start()
    async with aiohttp.ClientSession() as client:
        harness = GatewayHarness(f"http://{server.host}:{server.port}", server, redis, worker, client)
        await harness.publish(make_card())
        yield harness
    await server.aclose()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await redis.aclose()
