"""``/v1/files``: what batches read and what they have written.

A file is its tenant's: for every other key it does not exist. Source: the openai-openapi specification, schema
OpenAIFile.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any, Final

import msgspec
from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import BadHttpMessage
from multidict import CIMultiDict

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.gateway.batch_records import ENDED
from scheduler.gateway.errors import HttpError, bad_field, redis_within
from scheduler.gateway.file_store import (
    COPY_BYTES,
    StoredFile,
    Upload,
    create_file_id,
)
from scheduler.gateway.gateway import GATEWAY
from scheduler.gateway.settings import MIN_FILE_RETENTION_S

UPLOAD_PURPOSE: Final = "batch"
MAX_FIELD_BYTES: Final = 1024
MAX_PARTS: Final = 16
MAX_NAME_CHARS: Final = 255
DEFAULT_PAGE: Final = 1_000
MAX_PAGE: Final = 10_000
_NOT_SAFE: Final = re.compile(r"[^A-Za-z0-9._ -]")


class FileBody(msgspec.Struct):
    """A file as OpenAI's clients read it."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"
    status_details: None = None


def describe_file(found: StoredFile) -> FileBody:
    """The body that tells of a file."""
    return FileBody(found.id, found.bytes, found.created_at, found.expires_at, found.filename, found.purpose)


async def create_file(request: web.Request) -> web.Response:
    """Take a file in. Its bytes go to disk as they come; until the last one is there, there is no file."""
    gateway = request.app[GATEWAY]
    store, tenant = gateway.files, gateway.tenant_of(request)
    if not request.content_type.startswith("multipart/"):
        message = f"expected Content-Type: multipart/form-data with purpose and file, got {request.content_type[:100]}"
        raise HttpError(415, message, code="unsupported_media_type")
    upload = await asyncio.to_thread(store.begin_upload, tenant)
    try:
        async with asyncio.timeout(gateway.settings.upload_limit_s):
            fields, filename = await _read_parts(request, upload, gateway.settings.max_file_bytes)
        found = _check_fields(fields, filename, store.retention_s)
        stored = await asyncio.to_thread(store.publish, upload, tenant, found)
    except TimeoutError as error:
        message = f"the file did not arrive within {gateway.settings.upload_limit_s:g} s"
        raise HttpError(408, message, code="request_timeout", headers={"Connection": "close"}) from error
    finally:
        upload.__exit__(None, None, None)
    return _answer(describe_file(stored))


async def _read_parts(request: web.Request, upload: Upload, max_bytes: int) -> tuple[dict[str, str], str | None]:
    """Small fields by name, and the file's name; None when it was not sent."""
    fields: dict[str, str] = {}
    filename: str | None = None
    try:
        reader = await request.multipart()
        for _ in range(MAX_PARTS):
            part = await reader.next()
            if part is None:
                return fields, filename
            if isinstance(part, MultipartReader):
                raise bad_field("file", "parts within parts are not accepted")
            if part.name == "file":
                if filename is not None:
                    raise bad_field("file", "was sent twice: upload one file at a time")
                filename = _NOT_SAFE.sub("_", part.filename or "upload.jsonl")[-MAX_NAME_CHARS:]
                await _copy(part, upload, max_bytes)
            else:
                fields[part.name or ""] = (await _read_field(part)).decode("utf-8", "replace")
    except (
        ValueError,
        AssertionError,
        BadHttpMessage,
        web.RequestPayloadError,
    ) as error:  # aiohttp's, of broken bodies
        message = "the multipart body cannot be decoded: send purpose and file as multipart/form-data"
        raise HttpError(400, message, code="malformed_body", headers={"Connection": "close"}) from error
    raise HttpError(400, f"more than {MAX_PARTS} parts; expected purpose and file", code="malformed_body")


async def _copy(part: BodyPartReader, upload: Upload, max_bytes: int) -> None:
    while data := await part.read_chunk(COPY_BYTES):
        if upload.num_bytes + len(data) > max_bytes:
            message = f"the file is larger than {max_bytes} bytes: split it"
            raise GlowplugError(ErrorCode.REQUEST_TOO_LARGE, message, param="file")
        await asyncio.to_thread(upload.write, data)


async def _read_field(part: BodyPartReader) -> bytes:
    found = b""
    while data := await part.read_chunk(MAX_FIELD_BYTES):
        found += data
        if len(found) > MAX_FIELD_BYTES:
            raise bad_field(str(part.name)[:40], f"more than {MAX_FIELD_BYTES} bytes")
    return found


def _check_fields(fields: dict[str, str], filename: str | None, retention_s: int) -> StoredFile:
    purpose = fields.get("purpose")
    if purpose != UPLOAD_PURPOSE:
        seen = "none" if purpose is None else f'"{purpose[:40]}"'
        raise bad_field("purpose", f'expected "{UPLOAD_PURPOSE}", got {seen}')
    if filename is None:
        raise bad_field("file", "is required: the JSON lines, as a part with a file name")
    now, life_s = int(time.time()), retention_s
    text = fields.get("expires_after[seconds]")
    if text is not None:
        is_number = text.isascii() and text.isdigit() and len(text) <= 9
        if not is_number or not MIN_FILE_RETENTION_S <= int(text) <= retention_s:
            wanted = f"{MIN_FILE_RETENTION_S} to {retention_s} seconds after created_at"
            raise bad_field("expires_after", f"expected {wanted}, got {text[:20]!r}")
        life_s = int(text)
    return StoredFile(create_file_id(), filename, 0, UPLOAD_PURPOSE, now, now + life_s)


async def list_files(request: web.Request) -> web.Response:
    """The tenant's files, newest first; ``after``, ``limit``, ``order`` and ``purpose`` as at OpenAI."""
    gateway = request.app[GATEWAY]
    limit = read_limit(request, DEFAULT_PAGE, MAX_PAGE)
    found = await asyncio.to_thread(gateway.files.list_files, gateway.tenant_of(request))
    if request.query.get("order") == "asc":
        found.reverse()
    if purpose := request.query.get("purpose"):
        found = [one for one in found if one.purpose == purpose]
    if after := request.query.get("after"):
        places = [index for index, one in enumerate(found) if one.id == after]
        found = found[places[0] + 1 :] if places else []
    page = [describe_file(one) for one in found[:limit]]
    return _answer(build_page(page, has_more=len(found) > limit))


def read_limit(request: web.Request, default: int, high: int) -> int:
    """The query's ``limit``.

    Raises:
        GlowplugError: not a number in range.
    """
    text = request.query.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= high):
        raise bad_field("limit", f"expected 1 to {high}, got {text[:20]!r}")
    return int(text)


def build_page(data: list[Any], *, has_more: bool) -> dict[str, Any]:
    """A list as OpenAI's clients page through it."""
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0].id if data else None,
        "last_id": data[-1].id if data else None,
    }


async def get_file(request: web.Request) -> web.Response:
    """What is known of a file."""
    return _answer(describe_file(await _find(request)))


async def get_file_content(request: web.Request) -> web.StreamResponse:
    """The bytes of a file, from disk to the socket."""
    gateway, found = request.app[GATEWAY], await _find(request)
    headers = CIMultiDict({"Content-Disposition": f'attachment; filename="{found.filename}"'})
    path = gateway.files.data_path(gateway.tenant_of(request), found.id)
    response = web.FileResponse(path, headers=headers)
    response.content_type = "application/octet-stream"
    return response


async def delete_file(request: web.Request) -> web.Response:
    """Delete a file that no batch reads."""
    gateway, found = request.app[GATEWAY], await _find(request)
    async with redis_within(gateway.settings.redis_limit_s, "reading the batches"):
        active = await gateway.batches.find_all(await gateway.batches.list_active())
    users = [one.id for one in active if one.input_file_id == found.id and one.status not in ENDED]
    if users:
        raise HttpError(409, f"batch {users[0]} reads this file: wait until it has ended, or cancel it", code="in_use")
    await asyncio.to_thread(gateway.files.delete, gateway.tenant_of(request), found.id)
    return _answer({"id": found.id, "object": "file", "deleted": True})


async def _find(request: web.Request) -> StoredFile:
    gateway, file_id = request.app[GATEWAY], request.match_info["file_id"]
    found = await asyncio.to_thread(gateway.files.find, gateway.tenant_of(request), file_id)
    if found is None:
        message = f'no file "{file_id[:64]}"; GET /v1/files lists yours (they expire)'
        raise HttpError(404, message, code="file_not_found")
    return found


def _answer(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
