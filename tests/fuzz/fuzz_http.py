"""Raw HTTP against a real gateway over a socket: seeded, mutated requests of every route; no 500, no hang.

    python -m tests.fuzz.fuzz_http --cases 20000 --seed 7

starts its own queue server and gateway, and prints the counts by status. The suite runs a short one.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from scheduler.embedded_redis import ensure_server, stop_server
from tests.gateway_fixtures import GatewayHarness, chat_body, run_gateway

#: Short limits, so that a request that never ends is over soon; a connection that outlives the deadline hangs.
LIMITS: Final[dict[str, Any]] = {
    "header_limit_s": 0.25,
    "body_limit_s": 0.25,
    "keepalive_s": 0.25,
    "write_limit_s": 1.0,
    "cold_start_limit_s": 2.0,
    "request_limit_s": 2.0,
    "max_body_bytes": 200_000,
}
DEADLINE_S: Final = 20.0
CONCURRENCY: Final = 48
STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
ROUTES: Final = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/responses/input_tokens"),
    ("POST", "/v1/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/v1/requests/00000000000000000000000000/stream"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/admin/status"),
    ("GET", "/admin/usage?days=3"),
    ("GET", "/admin/traces/last"),
)
ODD_VALUES: Final[tuple[Any, ...]] = (
    None, True, -1, 0, 2**63, 2**200, 1e308, -0.0, "", "\0", "\ud800", "x" * 5000, "💥" * 50, [], {}, [[]], [None] * 50,
    {"": ""}, {"type": "json_schema"}, ["a"] * 20, {"50256": -100}, "NaN", [{"role": "user", "content": None}],
)  # fmt: skip
ODD_HEADERS: Final = (
    b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 5\r\nContent-Length: 6",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: \x0bchunked",
    b"Expect: 100-continue", b"Expect: nonsense", b"Upgrade: websocket\r\nConnection: Upgrade", b"Connection: close",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    b"Content-Encoding: gzip", b"Content-Encoding: br", b"Content-Encoding: deflate, gzip", b"Host: [", b"Host: a.b.c",
    b"Content-Type: multipart/form-data; boundary=x", b"Content-Type: application/json; charset=utf-7",
    b"Content-Type: \xff\xfe", b"Authorization: Bearer \xff", b"Authorization: " + b"A" * 7000, b"x-api-key: \x00",
    b"Origin: null", b"Origin: http://[::1", b"Last-Event-ID: x", b"Last-Event-ID: 00000000000000000000000000.1.2.3",
    b"Accept-Encoding: gzip;q=nan", b"Cookie: " + b"a=b;" * 500, b"X-Request-Id: \r\n folded", b"no colon here",
    b": empty name", b"X:" + b" " * 3000, b"Range: bytes=0-", b"If-Modified-Since: never", b"\x80\x81: y",
    b"X-Forwarded-For: 127.0.0.1", b"Forwarded: for=\"", b"Date: 0", b"Sec-WebSocket-Key: x",
)  # fmt: skip
ODD_PATHS: Final = (
    b"*", b"//", b"/..", b"/%", b"/%00", b"/%ff%fe", b"/v1/models/%2e%2e/%2e%2e", b"http://h/v1/models", b"http://[/",
    b"/v1/models?" + b"a=b&" * 200, b"/?%zz", b"/v1/models/" + b"a" * 7000, b"/admin/traces/" + b"\xe2\x98\xa0" * 9,
    b"/admin/usage?days=\xd9\xa3", b"/v1//models", b"/v1/models;x=y", b"/#x", b"h:1", b"", b"/v1/requests/%0a/stream",
)  # fmt: skip


@dataclass
class Outcome:
    """What happened. ``failures`` are inputs that hung or got a 500."""

    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    silent: int = 0  # closed without an answer: nothing whole was sent
    failures: list[tuple[str, bytes]] = field(default_factory=list)

    def __str__(self) -> str:
        counts = " ".join(f"{status}:{count}" for status, count in sorted(self.statuses.items()))
        return f"{self.cases} inputs, answers {counts}, closed without one {self.silent}, failures {len(self.failures)}"


def make_case(chance: random.Random) -> bytes:
    """One connection's bytes."""
    if chance.random() < 0.03:
        return chance.randbytes(chance.randrange(1, 400)) + chance.choice((b"", b"\r\n\r\n"))
    requests = [make_request(chance) for _ in range(chance.choice((1, 1, 1, 1, 1, 2, 3)))]
    data = bytearray(b"".join(requests))
    for _ in range(chance.choice((0, 0, 0, 0, 1, 2, 5))):
        chance.choice(BYTE_MUTATIONS)(chance, data)
    return bytes(data)


def make_request(chance: random.Random) -> bytes:
    """A request that is valid but for what chance has put into it."""
    method, path = chance.choice(ROUTES)
    target = chance.choice(ODD_PATHS) if chance.random() < 0.12 else path.encode()
    verb = chance.choice((b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"CONNECT", b"PRI", b"get", b"G\0T", b"A" * 300))
    line = b"%s %s %s\r\n" % (
        verb if chance.random() < 0.1 else method.encode(),
        target,
        chance.choice((b"HTTP/1.1",) * 12 + (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1 x", b"http/1.1", b"HTTP/11", b"")),
    )
    body = make_body(chance) if method == "POST" or chance.random() < 0.1 else b""
    headers = [b"Host: localhost", b"Content-Type: application/json"]
    if chance.random() < 0.15:
        body = encode_chunked(chance, body)
        headers.append(b"Transfer-Encoding: chunked")
    elif body or chance.random() < 0.2:
        headers.append(b"Content-Length: %d" % max(0, len(body) + chance.choice((0,) * 12 + (1, -1, 1000))))
    for _ in range(chance.choice((0,) * 9 + (1, 1, 2, 70))):
        headers.insert(chance.randrange(len(headers) + 1), chance.choice(ODD_HEADERS))
    ending = chance.choice((b"\r\n",) * 15 + (b"\n", b"\r"))
    return line + ending.join(headers) + b"\r\n\r\n" + body


def make_body(chance: random.Random) -> bytes:
    """JSON of a call with odd values in places, or something that is not JSON."""
    if chance.random() < 0.12:
        return chance.choice(
            (
                b"",
                b"{",
                b"[" * 5000,
                b'{"a":' * 2000,
                b"\xff\xfe{}",
                b"null",
                b"0" * 3000,
                b'{"model":1e99999}',
                b"\0" * 99,
            )
        )
    call: dict[str, Any] = chance.choice(
        (
            chat_body(stream=chance.random() < 0.5),
            {"model": "tiny", "prompt": "hello"},
            {"model": "tiny", "input": ["a", "b"]},
            {"model": "tiny", "input": "hi", "stream": chance.random() < 0.5},
            {"model": "tiny", "tokens": [1, 2]},
        )
    )
    names = [*call, "temperature", "top_p", "n", "max_tokens", "stop", "seed", "logprobs", "top_logprobs", "logit_bias"]
    names += ["tools", "response_format", "stream_options", "user", "priority", "messages", "prompt", "echo", "top_k"]
    names += ["system", "tool_choice", "tokens", "content", "instructions", "text", "metadata", "stop_sequences"]
    names += ["suffix", "best_of", "min_p", "presence_penalty", "encoding_format", "dimensions", "guided_regex"]
    for _ in range(chance.choice((0, 0, 1, 1, 2, 6))):
        call[chance.choice(names)] = chance.choice(ODD_VALUES)
    data = json.dumps(call).encode()
    return gzip.compress(data) if chance.random() < 0.03 else data


def encode_chunked(chance: random.Random, body: bytes) -> bytes:
    """The chunked form, now and then a broken one."""
    size = chance.choice(
        (b"%x" % len(body),) * 6 + (b"%x" % (len(body) + 9), b"-1", b"fffffffffffffffff", b"zz", b"0x5")
    )
    return size + chance.choice((b"", b"", b";ext=1", b";" + b"e" * 9000)) + b"\r\n" + body + b"\r\n0\r\n\r\n"


def _flip(chance: random.Random, data: bytearray) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _insert(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data) + 1)
    data[at:at] = chance.choice((b"\r\n", b"\n", b"\0", b" ", b":", b"\xff", b"%", b"\r", b"A" * 10_000, b"\r\n\r\n"))


def _delete(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data) + 1)
    del data[at : at + chance.choice((1, 1, 2, 10, 100))]


def _truncate(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _repeat(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data) + 1)
    piece = bytes(data[at : at + chance.choice((1, 4, 30, 200))])
    data[at:at] = piece * chance.choice((1, 2, 20))


BYTE_MUTATIONS: Final[tuple[Callable[[random.Random, bytearray], None], ...]] = (
    _flip, _flip, _insert, _delete, _truncate, _repeat,
)  # fmt: skip


async def run_cases(gateway: GatewayHarness, *, cases: int, seed: int) -> Outcome:
    """Send ``cases`` inputs, a few dozen connections at a time."""
    outcome, chance = Outcome(), random.Random(seed)
    waiting = [make_case(chance) for _ in range(cases)]
    waiting.reverse()

    async def work() -> None:
        while waiting:
            case = waiting.pop()
            try:
                async with asyncio.timeout(DEADLINE_S):
                    answer = await exchange(gateway, case)
            except TimeoutError:
                outcome.failures.append(("hang", case))
                continue
            outcome.cases += 1
            found = [int(status) for status in STATUS_LINE.findall(answer)]
            outcome.statuses.update(found)
            outcome.silent += not found
            if any(status >= 500 and status != 503 for status in found):
                outcome.failures.append((str(found), case))

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return outcome


async def exchange(gateway: GatewayHarness, case: bytes) -> bytes:
    """Everything that the gateway says to ``case`` until it ends the connection."""
    reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
    try:
        writer.write(case)
        return await reader.read()
    except ConnectionError:  # cut, which is an answer, too
        return b""
    finally:
        writer.transport.abort()


async def _main(cases: int, seed: int) -> int:
    folder = Path(tempfile.mkdtemp(prefix="gp-fuzz-"))
    server = ensure_server(folder / "redis")
    try:
        async with run_gateway(server.url, folder, **LIMITS) as gateway:
            outcome = await run_cases(gateway, cases=cases, seed=seed)
    finally:
        stop_server(folder / "redis")
        shutil.rmtree(folder, ignore_errors=True)
    print(f"seed {seed}: {outcome}")
    for kind, case in outcome.failures[:10]:
        print(kind, case[:2000])
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    raise SystemExit(uvloop.run(_main(arguments.cases, arguments.seed)))
