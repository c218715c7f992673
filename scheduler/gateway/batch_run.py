"""One run of a batch, by the gateway that holds its lease: check the input, answer the lines, put the output together.

At most a few lines are in flight, so that queues stay short and a batch that is cancelled, or loses to interactive
requests, has little to take back. What was answered is on disk before it counts; a run that dies leaves the rest to the
next one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec
import structlog

from scheduler.contract.states import Priority
from scheduler.gateway import batch_records
from scheduler.gateway.batch_input import BatchLine, UnansweredLines, check_input, parse_line, read_lines
from scheduler.gateway.batch_lines import answer_line
from scheduler.gateway.batch_policy import decide_wait
from scheduler.gateway.batch_records import BatchRecord, BatchRecords, LineError
from scheduler.gateway.batch_results import Answers, ResultRow, RunFile, build_unanswered, encode_row
from scheduler.gateway.file_store import FileStore, StoredFile
from scheduler.gateway.gateway import Gateway
from scheduler.gateway.identity import Identity

TURN_S: Final = 1.0  # how often a run looks at its clock, and tells how far it is
WAIT_TURN_S: Final = 2.0  # likewise while it may not run
OUTPUT_PURPOSE: Final = "batch_output"

_log = structlog.get_logger()


class LeaseLost(Exception):
    """Another gateway runs the batch now."""


class BatchRun:
    """One run. ``execute`` once; cancel it to stop: then the lines in flight are withdrawn, and nothing is lost."""

    def __init__(
        self, gateway: Gateway, records: BatchRecords, store: FileStore, record: BatchRecord, run: int
    ) -> None:
        self._gateway = gateway
        self._records = records
        self._store = store
        self._record = record
        self._run = run
        self._input = store.data_path(record.tenant, record.input_file_id)
        self._folder: Path = store.tenant_folder(record.tenant)
        self._tasks: dict[asyncio.Task[tuple[bool, ResultRow]], tuple[int, BatchLine]] = {}
        self._progress_mono_s = time.monotonic()
        self._saved_mono_s = self._checked_mono_s = 0.0
        self._end = ""

    async def execute(self) -> None:
        """Bring the batch to its end.

        Raises:
            LeaseLost: another gateway runs it.
            GlowplugError: the disk is full or fails; OSError and RedisError likewise. The batch can be run again.
        """
        identity = await self._gateway.access.identify_key(self._record.key_id)
        if identity is None or identity.tenant != self._record.tenant:
            message = "the API key that made the batch may not do so any more"
            await self._fail(LineError("key_not_valid", message))
            return
        if not await asyncio.to_thread(self._input.exists):
            await self._fail(LineError("input_file_gone", "the input file was deleted, or has expired"))
            return
        if self._record.status == batch_records.VALIDATING and not await self._validate():
            return
        await self._answer_all(identity)
        await self._finish()

    # --- the record -----------------------------------------------------------------------------------------------

    async def _change(self, **changes: object) -> None:
        self._record = msgspec.structs.replace(self._record, **changes)
        self._saved_mono_s = time.monotonic()
        if not await self._records.update(self._record, self._run):
            raise LeaseLost(self._record.id)

    async def _reach(self, status: str, **changes: object) -> None:
        reached_at = {**self._record.reached_at, status: int(time.time())}
        await self._change(status=status, reached_at=reached_at, waits_for="", in_flight=0, **changes)
        _log.info("batch_status", batch_id=self._record.id, status=status, run=self._run)

    async def _fail(self, *errors: LineError) -> None:
        await self._reach(batch_records.FAILED, errors=errors)

    async def _validate(self) -> bool:
        facts = await asyncio.to_thread(
            check_input, self._input, self._record.endpoint, self._gateway.settings.max_batch_lines
        )
        if facts.errors:
            await self._fail(*facts.errors)
            return False
        await self._reach(batch_records.IN_PROGRESS, total=facts.num_requests, model=facts.model)
        return True

    # --- answering ------------------------------------------------------------------------------------------------

    async def _answer_all(self, identity: Identity) -> None:
        answers = await asyncio.to_thread(Answers, self._folder, self._record.id)
        await self._change(completed=answers.num_completed, failed=answers.num_failed)
        lines = UnansweredLines(self._input, answers)
        file = await asyncio.to_thread(RunFile, self._folder, self._record.id, self._run)
        try:
            has_more = True
            while has_more or self._tasks:
                self._end = await self._decide_end()
                if self._end:
                    return
                waits_for = await self._decide_wait() if has_more else ""
                room = self._gateway.admission.model_policy(self._record.model).batch_in_flight - len(self._tasks)
                if has_more and not waits_for and room > 0:
                    found = await asyncio.to_thread(lines.read_some, room)
                    has_more = bool(found)
                    self._begin(identity, found)
                await self._wait_turn(waits_for)
                await self._keep_answers(file)
                if await self._tell_progress(file, waits_for):
                    withdrawn = list(self._tasks.values())
                    await self._withdraw()
                    self._begin(identity, withdrawn)  # now in the order of interactive requests
        finally:
            await self._withdraw()
            await asyncio.to_thread(file.close)

    def _begin(self, identity: Identity, lines: list[tuple[int, BatchLine]]) -> None:
        for number, line in lines:
            work = answer_line(self._gateway, identity, line, number, self._choose_priority)
            self._tasks[asyncio.create_task(work, name=f"batch line {number}")] = (number, line)

    def _choose_priority(self) -> Priority:
        return Priority.INTERACTIVE if self._record.is_promoted else Priority.BATCH

    async def _decide_end(self) -> str:
        if time.time() >= self._record.expires_at:
            return batch_records.EXPIRED
        now_mono_s = time.monotonic()
        if now_mono_s - self._checked_mono_s < TURN_S:
            return ""
        self._checked_mono_s = now_mono_s
        return batch_records.CANCELLED if await self._records.is_cancelled(self._record.id) else ""

    async def _decide_wait(self) -> str:
        if self._record.is_promoted:
            return ""
        policy, directory = self._gateway.admission.model_policy(self._record.model), self._gateway.directory
        is_hot = True
        if not policy.batch_wakes:
            await directory.ensure_fresh()
            is_hot = directory.is_hot(self._record.model)
        now = datetime.now().astimezone()
        windows = (policy.batch_window, self._record.run_window)
        return decide_wait(windows, now.hour * 60 + now.minute, may_wake=policy.batch_wakes, is_hot=is_hot)

    async def _wait_turn(self, waits_for: str) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=TURN_S, return_when=asyncio.FIRST_COMPLETED)
        elif waits_for:
            await asyncio.sleep(WAIT_TURN_S)

    async def _keep_answers(self, file: RunFile) -> None:
        ended = [task for task in self._tasks if task.done()]
        if not ended:
            return
        rows = [(self._tasks[task][0], *task.result()) for task in ended]
        await asyncio.to_thread(file.append, rows)
        for task in ended:
            del self._tasks[task]
        num_completed = sum(ok for _, ok, _ in rows)
        model = self._record.model if self._record.model in self._gateway.directory.cards else None
        for _, ok, _ in rows:
            self._gateway.metrics.on_batch_line(model, ok=ok)
        self._progress_mono_s = time.monotonic()
        self._record = msgspec.structs.replace(
            self._record,
            completed=self._record.completed + num_completed,
            failed=self._record.failed + len(rows) - num_completed,
        )

    async def _tell_progress(self, file: RunFile, waits_for: str) -> bool:
        """Once a turn: sync and write the counts. Whether, from now on, the lines have waited too long for theirs."""
        now_mono_s = time.monotonic()
        if waits_for or not self._tasks:
            self._progress_mono_s = now_mono_s  # it does not wait for others, but for its own policy
        max_wait_s = self._gateway.admission.model_policy(self._record.model).batch_max_wait_s
        is_starved = not self._record.is_promoted and now_mono_s - self._progress_mono_s >= max_wait_s
        if now_mono_s - self._saved_mono_s < TURN_S and not is_starved:
            return False
        await asyncio.to_thread(file.sync)
        is_promoted = self._record.is_promoted or is_starved
        await self._change(waits_for=waits_for, in_flight=len(self._tasks), is_promoted=is_promoted)
        if is_starved:
            _log.warning("batch_promoted", batch_id=self._record.id, waited_s=round(max_wait_s))
        return is_starved

    async def _withdraw(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    # --- the end --------------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        await self._reach(batch_records.FINALIZING)
        has_output, has_errors = await asyncio.to_thread(self._put_together)
        record = self._record
        await self._reach(
            self._end or batch_records.COMPLETED,
            output_file_id=record.output_file_id if has_output else "",
            error_file_id=record.error_file_id if has_errors else "",
        )
        answers = await asyncio.to_thread(Answers, self._folder, record.id)
        await asyncio.to_thread(answers.drop)

    def _put_together(self) -> tuple[bool, bool]:
        """Write both files, whole; which of them have lines. In a thread.

        Raises:
            GlowplugError: the disk is full or fails.
        """
        answers, record = Answers(self._folder, self._record.id), self._record
        with self._store.begin_output() as output:
            for _, row in answers.read_rows(ok=True):
                output.write(row)
            if has_output := output.num_bytes > 0:
                self._store.publish(output, record.tenant, self._describe(record.output_file_id, "output"))
        with self._store.begin_output() as errors:
            for _, row in answers.read_rows(ok=False):
                errors.write(row)
            if self._end == batch_records.EXPIRED:
                self._write_unanswered(errors.write, answers)
            if has_errors := errors.num_bytes > 0:
                self._store.publish(errors, record.tenant, self._describe(record.error_file_id, "errors"))
        return has_output, has_errors

    def _write_unanswered(self, write: Callable[[bytes], None], answers: Answers) -> None:
        message = f"the batch's {self._record.completion_window} were over before this line ran"
        for number, data in read_lines(self._input):
            if number not in answers:
                write(encode_row(build_unanswered(parse_line(data).custom_id, "batch_expired", message, number)))

    def _describe(self, file_id: str, what: str) -> StoredFile:
        now = int(time.time())
        name = f"{self._record.id}_{what}.jsonl"
        return StoredFile(file_id, name, 0, OUTPUT_PURPOSE, now, now + self._store.retention_s)
