"""A gateway's share of the batches: it takes leases on those that nobody runs, and runs a few at once.

Any gateway that sees a batch's input file may run it. One that dies loses its leases within
:data:`batch_records.LEASE_MS`; one that drains gives them back at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import Final

import structlog
from redis.exceptions import RedisError

from scheduler.contract.errors import GlowplugError
from scheduler.gateway.batch_records import ENDED, RENEW_EVERY_S, BatchRecord, BatchRecords
from scheduler.gateway.batch_run import BatchRun, LeaseLost
from scheduler.gateway.file_store import FileStore
from scheduler.gateway.gateway import Gateway

LOOK_EVERY_S: Final = 1.0
SWEEP_EVERY_S: Final = 60.0
RETRY_AFTER_S: Final = 5.0  # a batch whose run failed: a full disk does not empty itself in a second

_log = structlog.get_logger()


class BatchRunner:
    """The loop and its runs. ``start`` and ``aclose`` once each, on the event loop."""

    def __init__(self, gateway: Gateway, records: BatchRecords, store: FileStore) -> None:
        self._gateway = gateway
        self._records = records
        self._store = store
        self._max_runs = gateway.settings.batches_at_once
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._tenants: dict[str, str] = {}  # of the batches in _runs
        self._not_before_mono_s: dict[str, float] = {}
        self._news = asyncio.Event()
        self._swept_mono_s = time.monotonic()
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for batches."""
        self._loop_task = asyncio.create_task(self._loop(), name="batches")

    def notify(self) -> None:
        """There is a new batch: look now."""
        self._news.set()

    async def aclose(self) -> None:
        """Stop every run, its lines withdrawn and its lease given back. Idempotent."""
        tasks = [task for task in (self._loop_task, *self._runs.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _loop(self) -> None:
        while True:
            self._news.clear()
            try:
                await self._look()
            except (RedisError, OSError) as error:  # away or full: it passes, and runs fail by themselves
                _log.warning("batches_not_read", error=str(error))
            except Exception:  # a bug here must not end all batches for ever
                _log.exception("batches_look_failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._news.wait()

    async def _look(self) -> None:
        if time.monotonic() - self._swept_mono_s >= SWEEP_EVERY_S:
            self._swept_mono_s = time.monotonic()
            await asyncio.to_thread(self._store.drop_expired, time.time())
        if len(self._runs) >= self._max_runs:
            return
        others = [batch_id for batch_id in await self._records.list_active() if batch_id not in self._runs]
        found = await self._records.find_all(others)
        missing = set(others) - {record.id for record in found}
        for batch_id in missing:  # its record ran out: taking the lease clears the name away
            await self._records.try_acquire(batch_id)
        while found and len(self._runs) < self._max_runs:
            running = Counter(self._tenants.values())
            record = min(found, key=lambda one: (running[one.tenant], one.created_at, one.id))
            found.remove(record)
            await self._try_begin(record)

    async def _try_begin(self, record: BatchRecord) -> None:
        if time.monotonic() < self._not_before_mono_s.get(record.id, 0.0):
            return
        is_here = await asyncio.to_thread(self._store.data_path(record.tenant, record.input_file_id).exists)
        if not is_here and time.time() < record.expires_at:
            return  # another gateway may see the file; after its window anybody may end it
        run = await self._records.try_acquire(record.id)
        if not run:
            return
        current = await self._records.find(record.id)  # as the run before left it
        if current is None or current.status in ENDED:
            await self._records.release(record.id, run)
            return
        self._tenants[record.id] = record.tenant
        task = asyncio.create_task(self._run(current, run), name=f"batch:{record.id}")
        self._runs[record.id] = task
        task.add_done_callback(lambda _: self._on_done(record.id))

    def _on_done(self, batch_id: str) -> None:
        del self._runs[batch_id], self._tenants[batch_id]
        self._news.set()

    async def _run(self, record: BatchRecord, run: int) -> None:
        log = _log.bind(batch_id=record.id, run=run)
        work = asyncio.create_task(
            BatchRun(self._gateway, self._records, self._store, record, run).execute(), name=f"batch run:{record.id}"
        )
        renewing = asyncio.create_task(self._renew(record.id, run), name=f"batch lease:{record.id}")
        try:
            await asyncio.wait({work, renewing}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                log.warning("batch_lease_lost")
        except LeaseLost:
            log.warning("batch_lease_lost")
        except (GlowplugError, RedisError, OSError) as error:
            self._not_before_mono_s[record.id] = time.monotonic() + RETRY_AFTER_S
            log.error("batch_run_failed", error=f"{type(error).__name__}: {error}", again_in_s=RETRY_AFTER_S)
        except Exception:  # a bug of ours: the next run may fare better, and people see why
            self._not_before_mono_s[record.id] = time.monotonic() + RETRY_AFTER_S
            log.exception("batch_run_crashed")
        finally:
            for task in (work, renewing):
                task.cancel()
            await asyncio.gather(work, renewing, return_exceptions=True)
            with contextlib.suppress(RedisError, OSError):
                await self._records.release(record.id, run)

    async def _renew(self, batch_id: str, run: int) -> None:
        """Return when the lease is lost; a server that is away loses it only when it has run out there."""
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            try:
                if not await self._records.renew(batch_id, run):
                    return
            except (RedisError, OSError) as error:
                _log.warning("batch_lease_not_renewed", batch_id=batch_id, error=str(error))
