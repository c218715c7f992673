"""The clients of a chaos run: each streams answers, comes back after a cut, and writes down exactly what it got."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

#: A stream without a byte for this long is given up and resumed at another gateway (comments count as bytes).
SILENCE_S: Final = 12.0
CONNECT_S: Final = 3.0
#: An accepted request without its end after this long is lost.
LOST_AFTER_S: Final = 60.0
RETRY_S: Final = 0.1
CONNECTION_ERRORS: Final = (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.IncompleteReadError)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what the model answers when it is alone, greedy: the first ``max_tokens`` tokens' text."""

    prompt: str
    max_tokens: int
    answer: str


@dataclass(slots=True)
class Entry:
    """One request in the ledger. Times are monotonic seconds."""

    question: Question
    is_streamed: bool
    sent_s: float
    accepted_s: float = 0.0  # 0: never accepted, as far as the client knows
    ended_s: float = 0.0
    request_id: str = ""
    text: str = ""
    outcome: str = "lost"  # completed, abandoned, refused, unanswered, errored, or still: lost
    reason: str = ""
    next_event: int = 1
    gaps: int = 0
    repeats: int = 0
    terminals: int = 0
    resumed: int = 0
    content_at_s: list[float] = field(default_factory=list)

    @property
    def last_event_id(self) -> str:
        return f"{self.request_id}:{self.next_event - 1}"

    @property
    def is_wrong(self) -> bool:
        """Whether the text is not the solo answer (or, of one that did not complete, not its beginning)."""
        if self.outcome == "completed":
            return self.text != self.question.answer
        return not self.question.answer.startswith(self.text)

    def take(self, event_id: str, data: str) -> bool:
        """Write one event down; whether it ended the request."""
        if data == "[DONE]":
            self.terminals += 1
            self.outcome = "completed"
            return True
        if event_id:
            number = int(event_id.rsplit(":", 1)[1])
            self.gaps += number > self.next_event
            self.repeats += number < self.next_event
            self.next_event = max(self.next_event, number + 1)
        event = json.loads(data)
        if "error" in event:
            self.terminals += 1
            self.outcome, self.reason = "errored", str(event["error"]["code"])
            return True
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                self.text += text
                self.content_at_s.append(time.monotonic())
        return False


class Client:
    """Sends one request after the other until told to stop."""

    def __init__(
        self, session: aiohttp.ClientSession, urls: tuple[str, ...], model: str, questions: list[Question], seed: int
    ) -> None:
        self._session = session
        self._urls = urls
        self._model = model
        self._questions = questions
        self._rng = random.Random(seed)
        self.ledger: list[Entry] = []
        self.refusals: Counter[str] = Counter()

    async def run(self, until_s: float, busy: asyncio.Event) -> None:
        """Ask until ``until_s`` (monotonic), only while ``busy`` is set. Every request begun is seen to its end."""
        while time.monotonic() < until_s:
            await busy.wait()
            entry = Entry(self._rng.choice(self._questions), self._rng.random() < 0.9, time.monotonic())
            self.ledger.append(entry)
            if entry.is_streamed:
                await self._ask_streamed(entry)
            else:
                await self._ask_whole(entry)
            entry.ended_s = time.monotonic()
            if entry.outcome in ("refused", "unanswered"):
                self.refusals[entry.reason] += 1
                await asyncio.sleep(RETRY_S * (1 + self._rng.random()))

    def _body(self, entry: Entry) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": entry.question.prompt}],
            "max_tokens": entry.question.max_tokens,
            "temperature": 0,
            "stream": entry.is_streamed,
        }

    async def _ask_whole(self, entry: Entry) -> None:
        """A request that is not streamed: what is cut before its answer cannot be told from one never taken."""
        url = self._rng.choice(self._urls) + "/v1/chat/completions"
        try:
            limit = aiohttp.ClientTimeout(total=LOST_AFTER_S, sock_connect=CONNECT_S)
            async with self._session.post(url, json=self._body(entry), timeout=limit) as response:
                body = await response.json()
        except CONNECTION_ERRORS as error:
            entry.outcome, entry.reason = "unanswered", type(error).__name__
            return
        if response.status != 200:
            entry.outcome, entry.reason = "refused", f"{response.status} {body['error']['code']}"
            return
        entry.accepted_s = entry.sent_s
        entry.terminals, entry.outcome = 1, "completed"
        entry.text = body["choices"][0]["message"]["content"]

    async def _ask_streamed(self, entry: Entry) -> None:
        abandon_after = self._rng.randrange(1, 6) if self._rng.random() < 0.05 else 0
        url = self._rng.choice(self._urls) + "/v1/chat/completions"
        try:
            async with self._session.post(url, json=self._body(entry), timeout=_limits()) as response:
                if response.status != 200:
                    entry.outcome, entry.reason = "refused", f"{response.status} {await _read_code(response)}"
                    return
                entry.request_id = response.headers["X-Request-Id"]
                entry.accepted_s = time.monotonic()
                if await self._read(response, entry, abandon_after):
                    return
        except CONNECTION_ERRORS as error:
            if not entry.accepted_s:
                entry.outcome, entry.reason = "unanswered", type(error).__name__
                return
        await self._resume(entry)

    async def _resume(self, entry: Entry) -> None:
        """Come back, at any gateway, until the request has ended or is lost."""
        deadline_s = time.monotonic() + LOST_AFTER_S
        while time.monotonic() < deadline_s:
            url = f"{self._rng.choice(self._urls)}/v1/requests/{entry.request_id}/stream"
            headers = {"Last-Event-ID": entry.last_event_id}
            with contextlib.suppress(*CONNECTION_ERRORS):
                async with self._session.get(url, headers=headers, timeout=_limits()) as response:
                    if response.status == 200:
                        entry.resumed += 1
                        if await self._read(response, entry, 0):
                            return
                    else:
                        entry.reason = f"resuming: {response.status} {await _read_code(response)}"
            await asyncio.sleep(RETRY_S)

    async def _read(self, response: aiohttp.ClientResponse, entry: Entry, abandon_after: int) -> bool:
        """Take events until the request ends (True) or the connection does (False)."""
        async for event_id, data in read_events(response):
            if entry.take(event_id, data):
                return True
            if abandon_after and len(entry.content_at_s) >= abandon_after:
                entry.outcome = "abandoned"
                return True
        return False


async def read_events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, str]]:
    """``(id, data)`` of each event of a stream; comments are dropped."""
    event_id = data = ""
    async for raw in response.content:
        line = raw.decode("utf-8").rstrip("\r\n")
        if not line:
            if data:
                yield event_id, data
            event_id = data = ""
        elif line.startswith("data: "):
            data = line[len("data: ") :]
        elif line.startswith("id: "):
            event_id = line[len("id: ") :]


def _limits() -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)


async def _read_code(response: aiohttp.ClientResponse) -> str:
    try:
        return str((await response.json())["error"]["code"])
    except (ValueError, KeyError, TypeError, *CONNECTION_ERRORS):
        return "no OpenAI-shaped error"
