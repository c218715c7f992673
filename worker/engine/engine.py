"""The step loop: requests join and leave between steps, each step runs one batch and samples from it.

One thread owns everything here (``Engine.run``); others use :meth:`Engine.submit`, :meth:`Engine.cancel`,
:meth:`Engine.stop` and :meth:`Engine.statistics`. A request moves like this:

============= ============== ==============================================================
from          to             when
============= ============== ==============================================================
(mailbox)     waiting        tokenised and checked; otherwise it ends with an error
(mailbox)     compiling      it asks for an output grammar, which another thread compiles
compiling     waiting        the grammar can be enforced; otherwise it ends with an error
waiting       running        KV blocks and ``max_running`` have room, tenants in turn
running       waiting        preempted: its KV blocks go to a request served before it
waiting       (ended)        cancelled, as while compiling
running       (ended)        every choice finished, cancelled, or an error
============= ============== ==============================================================
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import structlog

from scheduler.contract.errors import ErrorCode, ErrorInfo
from worker.backends.protocol import KV_BLOCK_TOKENS, BackendLost, BoundModel
from worker.engine.batch import SequenceView, decide_step
from worker.engine.batch_share import BatchShare
from worker.engine.engine_statistics import EngineStatistics
from worker.engine.failures import EngineIntegrityError, describe_error
from worker.engine.fairness import ServiceOrder
from worker.engine.grammar import Grammars
from worker.engine.intake import attach_grammar, prepare_request
from worker.engine.kv_cache import KvCache
from worker.engine.mailbox import Mail, Mailbox
from worker.engine.parking import IdleParking
from worker.engine.prefill_budget import PrefillBudget
from worker.engine.sequence import Choice, RunningRequest
from worker.engine.step_reports import StepReports
from worker.engine.text_requests import answer_text_request
from worker.engine.turns import Turn, draft_ahead, run_turns
from worker.engine.types import AnyRequest, RequestStep, TextRequest
from worker.loaded_model import LoadedModel

_log = structlog.get_logger()


class Engine:
    """Continuous batching over one bound model.

    ``max_running`` bounds the sequences (choices) of a batch, ``kv_budget_bytes`` their KV memory together with what is
    kept of earlier ones for prompts to come (nothing without ``prefix_caching``). Up to ``max_draft_tokens`` tokens of
    a sequence are guessed ahead (0: none), which changes no text. ``on_steps`` is called on the engine thread after
    every step with what it did, and must not block; what it raises ends :meth:`run`. ``parking`` waits for work on the
    engine's behalf (None: the model stays where it is).
    """

    def __init__(
        self,
        model: LoadedModel,
        bound: BoundModel,
        *,
        max_running: int,
        kv_budget_bytes: int,
        on_steps: Callable[[list[RequestStep]], None],
        prefix_caching: bool = True,
        max_draft_tokens: int = 0,
        parking: IdleParking | None = None,
    ) -> None:
        self._model = model
        self._bound = bound
        self._max_running = max_running
        self._on_steps = on_steps
        self._kv = KvCache(bound, kv_budget_bytes, model.prefixes, prefix_caching=prefix_caching)
        self._order = ServiceOrder()
        self._prefill = PrefillBudget()
        self._batch_share = BatchShare(self._prefill)
        self._max_draft_tokens = max_draft_tokens
        self._grammars = Grammars(model.open_text, model.plan.vocab_size, model.eos_token_ids)
        self._mailbox = Mailbox()
        self._parking = parking or IdleParking(bound)
        self._compiling: list[tuple[RunningRequest, Future[Any]]] = []
        self._waiting: list[RunningRequest] = []  # in service order
        self._running: list[RunningRequest] = []  # in service order
        self._reports = StepReports(model.text.token_bytes)
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_drafted = 0
        self._num_kept = 0
        self._statistics = EngineStatistics()

    # --- any thread ---

    def submit(self, request: AnyRequest) -> None:
        """Hand in a request; returns at once. Its outcome comes through ``on_steps``, an error included.

        A request id that is still known is superseded: the older run ends without a word.
        """
        self._mailbox.submit(request)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step, with error CANCELLED. Unknown ids are ignored."""
        self._mailbox.cancel(request_id)

    def stop(self) -> None:
        """Make :meth:`run` return after the step in progress. Unfinished requests end without a final step, so
        that their next run replays what was emitted."""
        self._mailbox.stop()

    def statistics(self) -> EngineStatistics:
        """The state after the latest step; requests still in the mailbox count as waiting."""
        latest = self._statistics
        return replace(latest, num_waiting=latest.num_waiting + self._mailbox.num_requests)

    # --- the engine thread ---

    def run(self) -> None:
        """Thread main: step while there is work, sleep while there is none, return after :meth:`stop`."""
        try:
            while True:
                has_work = bool(self._running or self._waiting)
                mail = self._mailbox.collect_nowait() if has_work else self._parking.wait_collect(self._mailbox)
                if mail.stop:
                    return
                self.run_round(mail)
        finally:
            for request in [*self._running, *self._waiting, *(request for request, _ in self._compiling)]:
                self._release(request)
            self._running.clear()
            self._waiting.clear()
            self._compiling.clear()
            self._grammars.close()

    def run_round(self, mail: Mail) -> None:
        """One turn of the loop: take mail, admit, step, report. Public for tests that drive the engine by hand."""
        for engine_request in mail.requests:
            self._accept(engine_request)
        for request_id in mail.cancelled:
            self._cancel(request_id)
        self._take_compiled()
        self._admit()
        self._grow()
        self._step()
        self._publish_statistics()
        steps = self._reports.take()
        if steps:
            self._on_steps(steps)
        if not self._running and not self._waiting:
            self.check_integrity()

    def check_integrity(self) -> None:
        """Check the books: every block is free, kept, or held by running choices as often as the pool says.

        Raises:
            EngineIntegrityError: a choice has too few blocks, or some that it must not have.
            BlockPoolIntegrityError: the pool's books do not agree.
        """
        held: list[int] = []
        for request in self._running:
            for choice in request.choices:
                held += choice.blocks
                num_slots = KV_BLOCK_TOKENS * len(choice.blocks)
                if choice.is_finished == bool(choice.blocks) or choice.num_computed > num_slots:
                    message = f"{choice.num_computed} tokens in {len(choice.blocks)} blocks"
                    raise EngineIntegrityError(f"{request.request_id}/{choice.index}: {message}")
        self._kv.pool.check_integrity(held)
        for request in self._waiting:
            if any(choice.blocks for choice in request.choices):
                raise EngineIntegrityError(f"{request.request_id} waits but holds KV blocks")

    # --- coming and going ---

    def _accept(self, engine_request: AnyRequest) -> None:
        self._forget(engine_request.request_id)
        self._num_arrivals += 1
        if isinstance(engine_request, TextRequest):
            self._reports.add(answer_text_request(engine_request, self._model.text))
            return
        try:
            request = prepare_request(engine_request, self._num_arrivals, self._model, self._kv)
        except Exception as error:  # one request's failure must not reach the others
            self._reports.fail(engine_request.request_id, describe_error(error))
            return
        grammar = request.request.sampling.grammar
        if grammar is None:
            self._enqueue(request)
            return
        compiled = self._grammars.compile(grammar)
        self._compiling.append((request, compiled))
        compiled.add_done_callback(lambda _: self._mailbox.wake())

    def _take_compiled(self) -> None:
        for entry in [entry for entry in self._compiling if entry[1].done()]:
            request, compiled = entry
            self._compiling.remove(entry)
            try:
                compiled.result()
                attach_grammar(request, self._grammars)
            except Exception as error:  # one request's failure must not reach the others
                self._fail(request, describe_error(error))
                continue
            self._enqueue(request)

    def _enqueue(self, request: RunningRequest) -> None:
        if request.unfinished and request.max_tokens > 0:
            self._order.join(request, [*self._waiting, *self._running])
            insort(self._waiting, request, key=lambda waiting: waiting.service_order)
            return
        self._end(request)  # an earlier run emitted everything but its end

    def _cancel(self, request_id: str) -> None:
        if self._forget(request_id):
            self._reports.fail(request_id, ErrorInfo(ErrorCode.CANCELLED, "the request was cancelled"))

    def _forget(self, request_id: str) -> bool:
        """Drop a request wherever it is, without reporting; whether it was known."""
        for entry in self._compiling:
            if entry[0].request_id == request_id:
                self._compiling.remove(entry)
                self._release(entry[0])
                return True
        for requests in (self._running, self._waiting):
            for request in requests:
                if request.request_id == request_id:
                    requests.remove(request)
                    self._release(request)
                    return True
        return False

    def _release(self, request: RunningRequest) -> None:
        for choice in request.choices:
            self._kv.close(choice)
        request.close()

    # --- admission ---

    def _admit(self) -> None:
        """Move requests from waiting to running, each tenant in turn (see :mod:`worker.engine.fairness`)."""
        while self._waiting:
            request = self._order.choose_next(self._waiting)
            while not self._has_room(request):
                victim = self._running[-1]
                if victim.service_order[0] <= request.service_order[0]:
                    return  # only a batch request gives way, and only to an interactive one
                self._preempt(victim)
            self._waiting.remove(request)
            try:
                self._kv.open(request)
                self._start(request)
            except Exception as error:  # a backend that refuses a prefix fails this request only
                self._fail(request, describe_error(error))
                continue
            insort(self._running, request, key=lambda running: running.service_order)

    def _has_room(self, request: RunningRequest) -> bool:
        if not self._running:
            return True  # it fits alone: intake saw to that
        num_running = sum(len(running.unfinished) for running in self._running)
        if num_running + len(request.unfinished) > self._max_running:
            return False
        # A block for each running sequence to grow into: else the newcomer would have to give way at once.
        return self._kv.has_room(request, num_spare_blocks=num_running)

    def _start(self, request: RunningRequest) -> None:
        leader = request.unfinished[0]
        if request.num_cached is None:
            request.num_cached = min(leader.num_computed, len(request.prompt))
        self._hand_on_prefix(request, leader)

    def _grow(self) -> None:
        """Have KV blocks for what the next step computes; the last in service order gives way."""
        for request in list(self._running):
            for choice in request.choices:
                # Its own preemption takes its blocks away, which ends the loop.
                while choice.blocks and not choice.awaits_prefix and not self._kv.try_grow(choice):
                    self._preempt(self._running[-1])

    def _preempt(self, request: RunningRequest) -> None:
        """Take a request's KV blocks; it waits, and computes what nobody kept of its tokens when its turn comes."""
        self._running.remove(request)
        for choice in request.choices:
            self._kv.close(choice)
        insort(self._waiting, request, key=lambda waiting: waiting.service_order)
        self._num_preemptions += 1
        _log.info("request_preempted", request_id=request.request_id)

    # --- one step ---

    def _step(self) -> None:
        candidates = [
            (request, choice) for request in self._running for choice in request.unfinished if not choice.awaits_prefix
        ]
        if not (candidates := self._batch_share.choose(candidates)):
            return
        views = [SequenceView(i, choice.num_pending) for i, (_, choice) in enumerate(candidates)]
        num_decodes = sum(view.num_pending == 1 for view in views)
        if len(views) - num_decodes > 1:
            views.sort(key=lambda view: self._order.rank(candidates[view.index][0]))
        shares = decide_step(views, prefill_tokens=self._batch_share.choose_prompt_tokens(num_decodes))
        turns = [Turn(*candidates[share.index], share) for share in shares]
        if self._max_draft_tokens:
            draft_ahead(turns, self._kv, self._max_draft_tokens)
        started_ns = time.monotonic_ns()
        try:
            computed_mono_ns = run_turns(self._bound, self._grammars, turns)
        except BackendLost:
            raise  # the worker ends, and its requests go on in another
        except Exception as error:  # the device failed: the batch ends, the engine stays
            _log.error("step_failed", exc_info=error, num_sequences=len(turns))
            info = ErrorInfo(ErrorCode.WORKER_FAILED, f"the worker failed in a step: {error}")
            for request in {id(turn.request): turn.request for turn in turns}.values():
                self._fail(request, info)
            return
        self._num_steps += 1
        elapsed_ns = computed_mono_ns - started_ns
        num_rows, num_drafted = sum(share.num_tokens for share in shares), sum(len(turn.drafted) for turn in turns)
        self._batch_share.observe(num_rows + num_drafted, elapsed_ns)
        if not num_drafted:  # which would look like slow decodes
            self._prefill.observe(num_decodes, num_rows - num_decodes, elapsed_ns)
        for turn in turns:
            if not turn.choice.blocks:
                continue  # another choice of its request failed in this step
            turn.choice.num_computed += turn.share.num_tokens
            self._order.charge(turn.request, turn.share.num_tokens)
            try:
                self._kv.remember(turn.request, turn.choice)
                self._hand_on_prefix(turn.request, turn.choice)
                self._take_sampled(turn, computed_mono_ns)
            except Exception as error:  # one request's failure must not reach the others
                self._fail(turn.request, describe_error(error))

    def _hand_on_prefix(self, request: RunningRequest, leader: Choice) -> None:
        """Give choices that wait for it the prompt's keys and values.

        All but the last token: each choice computes that one itself, for logits of its own.
        """
        num_tokens = len(request.prompt) - 1
        if len(request.choices) == 1 or leader.num_computed < num_tokens:
            return
        followers = [choice for choice in request.unfinished if choice.awaits_prefix]
        if followers:
            self._kv.hand_on(request, leader, followers)

    def _take_sampled(self, turn: Turn, computed_mono_ns: int) -> None:
        """Append what was sampled: the token behind the last one, and further ones while the guesses were right."""
        if turn.error is not None:
            raise turn.error
        choice, num_kept = turn.choice, 0
        for index, sampled in enumerate(turn.sampled):
            self._reports.push(turn.request, choice, sampled, computed_mono_ns)
            if choice.is_finished or index == len(turn.drafted) or sampled.token_id != turn.drafted[index]:
                break
            num_kept += 1
        if turn.drafted and choice.drafter is not None:
            choice.num_computed += num_kept
            choice.drafter.observe(len(turn.drafted), num_kept)
            self._order.charge(turn.request, num_kept)
            self._num_drafted += len(turn.drafted)
            self._num_kept += num_kept
        if choice.is_finished:
            self._kv.close(choice)
            if not turn.request.unfinished:
                self._running.remove(turn.request)
                self._end(turn.request)

    # --- reporting ---

    def _end(self, request: RunningRequest) -> None:
        self._reports.end(request)
        self._release(request)

    def _fail(self, request: RunningRequest, error: ErrorInfo) -> None:
        if request in self._running:
            self._running.remove(request)
        self._release(request)
        self._reports.fail(request.request_id, error)

    def _publish_statistics(self) -> None:
        self._statistics = EngineStatistics(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + len(self._compiling),
            kv_used_bytes=self._kv.used_bytes,
            tokens_generated=self._reports.tokens_generated,
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            kv_total_bytes=self._kv.pool.num_blocks * self._kv.block_bytes,
            kv_cached_bytes=self._kv.cached_bytes,
            num_prompt_tokens=self._kv.num_prompt_tokens,
            num_cached_tokens=self._kv.num_cached_tokens,
            num_drafted_tokens=self._num_drafted,
            num_kept_tokens=self._num_kept,
        )
