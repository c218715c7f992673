"""A text model without a guest, and a harness that drives the engine round by round."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field

from llama_programs import TINY, random_plan

from guests.abi import SequenceEnd
from guests.errors import GuestTrap
from guests.llama_assets import LlamaConfig
from scheduler.contract.messages import SamplingParams, TokenEvent
from scheduler.contract.states import Priority
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import BoundModel, ModelPlan
from worker.engine.engine import Engine
from worker.engine.mailbox import Mail
from worker.engine.prefixes import PrefixIndex
from worker.engine.text import PushResult, TextModel
from worker.engine.types import AnyRequest, EngineRequest, RequestStep
from worker.loaded_model import LoadedModel

EOS = 2
POISON = "poison"  # a prompt that traps the tokeniser


@dataclass
class FakeTextSequence:
    """One token is one word ``<id>``; token EOS stops; stop strings are whole words."""

    model: FakeText
    stop: tuple[str, ...]
    ignore_stop_tokens: bool
    generation: int
    is_closed: bool = False

    def push(self, token_id: int) -> PushResult:
        self.model.require_alive(self.generation)
        if token_id in self.model.trap_on:
            self.model.trap()
        if token_id == EOS and not self.ignore_stop_tokens:
            return PushResult("", SequenceEnd.STOP_TOKEN)
        word = f"<{token_id}>"
        if word in self.stop:
            return PushResult("", SequenceEnd.STOP_STRING)
        return PushResult(word, SequenceEnd.NONE)

    def flush(self) -> str:
        return ""

    def close(self) -> None:
        if not self.is_closed:
            self.model.num_open -= 1
        self.is_closed = True


@dataclass
class FakeText:
    """Words are token ids: the prompt "5 6 7" is those three tokens. Traps like a guest: every open state is lost."""

    trap_on: set[int] = field(default_factory=set)
    generation: int = 0
    num_open: int = 0
    continued: list[bool] = field(default_factory=list)  # keep_leading_space of each sequence

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if text == POISON:
            self.trap()
        return [int(word) for word in text.split()]

    def detokenize(self, token_ids: list[int], *, show_special: bool = False) -> str:
        return "".join(f"<{token_id}>" for token_id in token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return b"<%d>" % token_id

    def open_sequence(
        self, stop: tuple[str, ...], *, ignore_stop_tokens: bool = False, keep_leading_space: bool = False
    ) -> FakeTextSequence:
        self.num_open += 1
        self.continued.append(keep_leading_space)
        return FakeTextSequence(self, stop, ignore_stop_tokens, self.generation)

    def trap(self) -> None:
        self.generation += 1
        self.num_open = 0
        raise GuestTrap("unreachable executed")

    def require_alive(self, generation: int) -> None:
        if generation != self.generation:
            raise GuestTrap("the instance of this sequence was dropped")


@dataclass
class Outcome:
    """All that one request got."""

    events: list[TokenEvent] = field(default_factory=list)
    final: RequestStep | None = None
    marks: dict[str, int] = field(default_factory=dict)

    def token_ids(self, choice: int = 0) -> list[int]:
        return [event.token_id for event in self.events if event.choice == choice]

    def text(self, choice: int = 0) -> str:
        return "".join(event.text for event in self.events if event.choice == choice)

    def finish_reasons(self) -> dict[int, str]:
        return {event.choice: event.finish_reason for event in self.events if event.finish_reason}


class EngineHarness:
    """An engine on a tiny random model, driven by hand on the test's thread."""

    def __init__(
        self,
        *,
        max_running: int = 8,
        kv_budget_bytes: int = 1 << 24,
        config: LlamaConfig = TINY,
        plan: ModelPlan | None = None,
        bound: BoundModel | None = None,
        prefixes: PrefixIndex | None = None,
        text: TextModel | None = None,
        prefix_caching: bool = True,
        max_draft_tokens: int = 0,
        open_text: Callable[[], TextModel] | None = None,
    ) -> None:
        plan = plan or random_plan(config)
        self.text = FakeText()
        self.bound = bound or NumpyBackend().bind(plan)
        self.outcomes: dict[str, Outcome] = {}
        self.finished: list[str] = []  # request ids in order of their ends
        self.engine = Engine(
            LoadedModel(
                "tiny",
                "snapshot",
                plan,
                text or self.text,
                (EOS,),
                prefixes or PrefixIndex(),
                open_text or (lambda: text or self.text),
            ),
            self.bound,
            max_running=max_running,
            kv_budget_bytes=kv_budget_bytes,
            on_steps=self._on_steps,
            prefix_caching=prefix_caching,
            max_draft_tokens=max_draft_tokens,
        )
        self._mail = Mail()

    def submit(self, request: AnyRequest) -> Outcome:
        """Hand ``request`` to the next round."""
        self._mail.requests.append(request)
        self.outcomes[request.request_id] = Outcome()
        return self.outcomes[request.request_id]

    def cancel(self, request_id: str) -> None:
        self._mail.cancelled.append(request_id)

    def run_round(self) -> None:
        """One engine round, with its books checked. Where all that is left to do is another thread's work on grammars,
        it waits for that first, as an engine's own thread does."""
        engine = self.engine
        if engine._compiling and not (engine._running or engine._waiting) and self._mail.is_empty:
            wait([compiled for _, compiled in engine._compiling], timeout=1, return_when=FIRST_COMPLETED)
        mail, self._mail = self._mail, Mail()
        self.engine.run_round(mail)
        self.engine.check_integrity()

    def run_until_done(self) -> None:
        """Rounds until every submitted request has its final step; other threads (grammars) take the time they need."""
        deadline_mono_s = time.monotonic() + 60
        while not (all(outcome.final for outcome in self.outcomes.values()) and self._mail.is_empty):
            assert time.monotonic() < deadline_mono_s, "requests did not finish"
            self.run_round()

    def complete(self, request: AnyRequest) -> Outcome:
        """Run ``request`` to its end."""
        outcome = self.submit(request)
        self.run_until_done()
        return outcome

    def _on_steps(self, steps: list[RequestStep]) -> None:
        for step in steps:
            outcome = self.outcomes[step.request_id]
            assert outcome.final is None, "a step after the final one"
            outcome.events += step.events
            outcome.marks |= step.marks
            if step.finished:
                outcome.final = step
                self.finished.append(step.request_id)


def greedy(max_tokens: int = 8, **changes: object) -> SamplingParams:
    """Greedy sampling parameters."""
    return SamplingParams(seed=1, max_tokens=max_tokens, **{"temperature": 0.0, **changes})  # type: ignore[arg-type]


def make_request(
    request_id: str,
    prompt: str | tuple[int, ...],
    sampling: SamplingParams | None = None,
    *,
    num_choices: int = 1,
    priority: Priority = Priority.INTERACTIVE,
    emitted: tuple[tuple[int, ...], ...] = (),
) -> EngineRequest:
    """A request with defaults for tests."""
    return EngineRequest(
        request_id, prompt, sampling or greedy(), num_choices=num_choices, priority=priority, emitted=emitted
    )
