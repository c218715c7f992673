"""``/v1/batches``: many requests in a file, answered when there is room for them.

A batch is its tenant's, as files are. Source: the openai-openapi specification, schema Batch.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import msgspec
from aiohttp import web

from scheduler.config import is_day_window
from scheduler.gateway import batch_records
from scheduler.gateway.batch_lines import ENDPOINTS
from scheduler.gateway.batch_policy import read_window_s
from scheduler.gateway.batch_records import BatchesFull, BatchRecord, LineError, create_batch_id, is_batch_id
from scheduler.gateway.errors import HttpError, bad_field, redis_within
from scheduler.gateway.field_reader import FieldReader, json_type
from scheduler.gateway.file_store import create_file_id
from scheduler.gateway.gateway import GATEWAY
from scheduler.gateway.identity import IDENTITY
from scheduler.gateway.request_body import read_json_body
from scheduler.gateway.routes_files import UPLOAD_PURPOSE, build_page, read_limit

MAX_METADATA: Final = 16
MAX_METADATA_KEY_CHARS: Final = 64
MAX_METADATA_VALUE_CHARS: Final = 512
DEFAULT_PAGE: Final = 20
MAX_PAGE: Final = 100


class RequestCounts(msgspec.Struct):
    total: int
    completed: int
    failed: int


class BatchErrors(msgspec.Struct):
    data: list[LineError]
    object: str = "list"


class BatchBody(msgspec.Struct):
    """A batch as OpenAI's clients read it. Ours are ``waits_for`` ("window", "wake", or null while it may run) and
    ``run_window``."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    created_at: int
    expires_at: int
    errors: BatchErrors | None
    output_file_id: str | None
    error_file_id: str | None
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None
    model: str | None
    waits_for: str | None
    run_window: str | None
    object: str = "batch"


def describe_batch(record: BatchRecord) -> BatchBody:
    """The body that tells of a batch."""
    has_ended = record.status in batch_records.ENDED
    at = record.reached_at.get
    return BatchBody(
        id=record.id,
        endpoint=record.endpoint,
        input_file_id=record.input_file_id,
        completion_window=record.completion_window,
        status=record.status,
        created_at=record.created_at,
        expires_at=record.expires_at,
        errors=BatchErrors(list(record.errors)) if record.errors else None,
        output_file_id=record.output_file_id or None if has_ended and not record.errors else None,
        error_file_id=record.error_file_id or None if has_ended and not record.errors else None,
        in_progress_at=at(batch_records.IN_PROGRESS),
        finalizing_at=at(batch_records.FINALIZING),
        completed_at=at(batch_records.COMPLETED),
        failed_at=at(batch_records.FAILED),
        expired_at=at(batch_records.EXPIRED),
        cancelling_at=at(batch_records.CANCELLING),
        cancelled_at=at(batch_records.CANCELLED),
        request_counts=RequestCounts(record.total, record.completed, record.failed),
        metadata=record.metadata,
        model=record.model or None,
        waits_for=record.waits_for or None,
        run_window=record.run_window or None,
    )


async def create_batch(request: web.Request) -> web.Response:
    """Begin a batch over an uploaded file. Its lines are checked, and run, after the answer."""
    gateway, identity = request.app[GATEWAY], request[IDENTITY]
    reader = FieldReader(await read_json_body(request, gateway.settings))
    endpoint = reader.string("endpoint", max_chars=64) or ""
    if endpoint not in ENDPOINTS:
        raise bad_field("endpoint", f'expected {" or ".join(ENDPOINTS)}, got "{endpoint}"')
    window = reader.string("completion_window", max_chars=8) or "24h"
    window_s = read_window_s(window)
    if window_s is None:
        raise bad_field("completion_window", f'expected such as "24h", "90m" or "2d" (1m to 7d), got "{window}"')
    run_window = reader.string("run_window", max_chars=16) or ""
    if not is_day_window(run_window):
        raise bad_field("run_window", f'expected local times of day such as "22:00-06:00", got "{run_window}"')
    metadata = _read_metadata(reader)
    file_id = reader.string("input_file_id", max_chars=64) or ""
    found = await asyncio.to_thread(gateway.files.find, identity.tenant, file_id)
    if found is None or found.purpose != UPLOAD_PURPOSE:
        raise bad_field("input_file_id", f'no file "{file_id}" with purpose "{UPLOAD_PURPOSE}": POST /v1/files first')
    now = int(time.time())
    if found.expires_at < now + window_s:
        raise bad_field("input_file_id", f'"{file_id}" expires before the completion window of {window} is over')
    record = BatchRecord(
        id=create_batch_id(),
        tenant=identity.tenant,
        key_id=identity.key_id,
        endpoint=endpoint,
        input_file_id=file_id,
        completion_window=window,
        created_at=now,
        expires_at=now + window_s,
        output_file_id=create_file_id(),
        error_file_id=create_file_id(),
        run_window=run_window,
        metadata=metadata,
    )
    try:
        async with redis_within(gateway.settings.redis_limit_s, "keeping the batch"):
            await gateway.batches.create(record)
    except BatchesFull as full:
        headers = {"Retry-After": "60", "x-should-retry": "true"}
        raise HttpError(
            429, str(full), code="too_many_batches", openai_type="rate_limit_error", headers=headers
        ) from full
    if gateway.on_batch is not None:
        gateway.on_batch()
    return _answer(describe_batch(record))


def _read_metadata(reader: FieldReader) -> dict[str, str] | None:
    found = reader.mapping("metadata")
    if found is None:
        return None
    if len(found) > MAX_METADATA:
        raise bad_field("metadata", f"{len(found)} pairs; at most {MAX_METADATA} are accepted")
    for key, value in found.items():
        if not isinstance(value, str):
            raise bad_field("metadata", f"expected strings, got {json_type(value)}")
        if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_VALUE_CHARS:
            limits = f"{MAX_METADATA_KEY_CHARS} characters, values at most {MAX_METADATA_VALUE_CHARS}"
            raise bad_field("metadata", f'"{key[:40]}": keys have at most {limits}')
    return found


async def list_batches(request: web.Request) -> web.Response:
    """The tenant's batches, newest first; ``after`` and ``limit`` as at OpenAI."""
    gateway = request.app[GATEWAY]
    limit = read_limit(request, DEFAULT_PAGE, MAX_PAGE)
    after = request.query.get("after")
    if after is not None and not is_batch_id(after):
        raise bad_field("after", f'"{after[:64]}" is no batch id')
    async with redis_within(gateway.settings.redis_limit_s, "reading the batches"):
        ids = await gateway.batches.list_ids(gateway.tenant_of(request), after, limit + 1)
        found = await gateway.batches.find_all(ids[:limit])
    return _answer(build_page([describe_batch(one) for one in found], has_more=len(ids) > limit))


async def get_batch(request: web.Request) -> web.Response:
    """How far a batch is."""
    return _answer(describe_batch(await _find(request)))


async def cancel_batch(request: web.Request) -> web.Response:
    """End a batch early; what has been answered is kept. One that has ended stays as it is."""
    gateway, record = request.app[GATEWAY], await _find(request)
    if record.status not in batch_records.ENDED:
        async with redis_within(gateway.settings.redis_limit_s, "cancelling the batch"):
            await gateway.batches.ask_cancel(record.id, int(time.time()))
        record = await _find(request)
    return _answer(describe_batch(record))


async def _find(request: web.Request) -> BatchRecord:
    gateway, batch_id = request.app[GATEWAY], request.match_info["batch_id"]
    record: BatchRecord | None = None
    if is_batch_id(batch_id):
        async with redis_within(gateway.settings.redis_limit_s, "reading the batch"):
            record = await gateway.batches.find(batch_id)
    if record is None or record.tenant != gateway.tenant_of(request):
        raise HttpError(404, f'no batch "{batch_id[:64]}"; GET /v1/batches lists yours', code="batch_not_found")
    return record


def _answer(body: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
