"""API keys: who may ask, for what, as which tenant. A small file that only its owner can read, and no secret in it.

A key is ``gp_ID_SECRET``: an id to recognise it by, and 256 random bits. The file holds a BLAKE2b digest of each key,
salted with its id. A slow password hash would add nothing: nobody can search 2**256 secrets, and 50 ms of work for
every wrong key would be an attack of its own. Digests are compared in constant time, and an unknown id costs the same
comparison as a known one.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import msgspec

#: Path of the key file, instead of the one in the state folder.
API_KEYS: Final = "GLOWPLUG_API_KEYS"

TOKEN_PREFIX: Final = "gp_"
ID_CHARS: Final = 8
ID_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
SECRET_BYTES: Final = 32
MAX_TOKEN_CHARS: Final = 128
MAX_NAME_CHARS: Final = 64
MAX_KEYS: Final = 10_000
MAX_FILE_BYTES: Final = 8 * 1024 * 1024
FILE_VERSION: Final = 1
_PERSON: Final = b"glowplug-api-key"  # 16 bytes: BLAKE2b's personalisation
_NOBODYS_DIGEST: Final = hashlib.blake2b(b"", digest_size=32).hexdigest()


class ApiKeyError(Exception):
    """The key file cannot be used or changed; the message says why and what to do."""


class Scope(StrEnum):
    """What a key may do."""

    INFER = "infer"  # /v1: completions, embeddings, models
    BATCH = "batch"  # /v1/files and /v1/batches
    ADMIN = "admin"  # /admin and /metrics


class ApiKey(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One key, without its secret. ``models`` are names or patterns with ``*``; empty: every model."""

    id: str
    digest: str  # hex
    tenant: str
    scopes: tuple[Scope, ...]
    created_at_s: int
    models: tuple[str, ...] = ()
    expires_at_s: int | None = None
    revoked_at_s: int | None = None
    note: str = ""

    @property
    def prefix(self) -> str:
        """What may be shown of the key."""
        return f"{TOKEN_PREFIX}{self.id}"

    def state_at(self, now_s: float) -> str:
        """``active``, ``expired`` or ``revoked``. Wall clock: an expiry is a date."""
        if self.revoked_at_s is not None:
            return "revoked"
        return "expired" if self.expires_at_s is not None and now_s >= self.expires_at_s else "active"

    def may_see(self, model: str) -> bool:
        """Whether ``model`` exists for this key."""
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    keys: tuple[ApiKey, ...]


class ApiKeySet:
    """The keys of one file, for look-ups. Immutable."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self.keys = keys
        self._by_id = {key.id: key for key in keys}

    def get(self, key_id: str) -> ApiKey | None:
        """The key with this id, whatever its state. Proves nothing about who asks."""
        return self._by_id.get(key_id)

    def find(self, token: str) -> ApiKey | None:
        """The key that ``token`` is, whatever its state; None for anything else. Constant time in the secret."""
        key_id = split_token(token)
        key = self._by_id.get(key_id)
        expected = _NOBODYS_DIGEST if key is None else key.digest
        matches = hmac.compare_digest(digest_token(token, key_id), expected)
        return key if matches else None


def split_token(token: str) -> str:
    """The id inside a token; empty when it is not one of ours."""
    if not token.startswith(TOKEN_PREFIX) or len(token) > MAX_TOKEN_CHARS or not token.isascii():
        return ""
    key_id, separator, _ = token[len(TOKEN_PREFIX) :].partition("_")
    return key_id if separator and len(key_id) == ID_CHARS else ""


def digest_token(token: str, key_id: str) -> str:
    """Hex digest of a whole token. Source: BLAKE2b with salt and personalisation, RFC 7693 and the BLAKE2 paper."""
    salt = key_id.encode().ljust(hashlib.blake2b.SALT_SIZE, b"\0")
    data = token.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=32, salt=salt, person=_PERSON).hexdigest()


def create_key(
    tenant: str,
    scopes: tuple[Scope, ...],
    *,
    models: tuple[str, ...] = (),
    expires_at_s: int | None = None,
    note: str = "",
) -> tuple[ApiKey, str]:
    """A new key and its token, which is nowhere kept.

    Raises:
        ApiKeyError: a name is empty, too long, or has other than printable characters.
    """
    for what, name in (("tenant", tenant), *(("model", model) for model in models)):
        if not 0 < len(name) <= 4 * MAX_NAME_CHARS or not name.isprintable():
            raise ApiKeyError(f"{what} {name[:80]!r}: expected 1 to {4 * MAX_NAME_CHARS} printable characters")
    if not scopes:
        raise ApiKeyError(f"a key needs a scope: {', '.join(Scope)}")
    key_id = "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_CHARS))
    token = f"{TOKEN_PREFIX}{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    key = ApiKey(
        id=key_id,
        digest=digest_token(token, key_id),
        tenant=tenant,
        scopes=scopes,
        created_at_s=int(time.time()),
        models=models,
        expires_at_s=expires_at_s,
        note=note[:MAX_NAME_CHARS],
    )
    return key, token


# --- the file ---------------------------------------------------------------------------------------------------


def key_file_path(state_dir: Path) -> Path:
    """Where the key file is: GLOWPLUG_API_KEYS, else in the state folder."""
    named = os.environ.get(API_KEYS)
    return Path(named).absolute() if named else state_dir / "keys" / "api.keys.json"


def load_keys(path: Path) -> ApiKeySet | None:
    """The keys in ``path``; None when there is no such file. Reads a file: blocks.

    Raises:
        ApiKeyError: others than its owner may read or change it, or it is not a key file.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ApiKeyError(f"{path}: cannot be read: {error.strerror}") from error
    if stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ApiKeyError(f"{path} has mode {mode:04o}: expected 0600; chmod 600 it, and revoke what others may have")
    if status.st_uid not in (os.getuid(), 0):
        raise ApiKeyError(f"{path} belongs to user {status.st_uid}: expected {os.getuid()} or root")
    return ApiKeySet(_parse(path, data))


def _parse(path: Path, data: bytes) -> tuple[ApiKey, ...]:
    if len(data) > MAX_FILE_BYTES:
        raise ApiKeyError(f"{path}: more than {MAX_FILE_BYTES} bytes")
    try:
        found = msgspec.json.decode(data, type=_KeyFile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiKeyError(f"{path}: not a key file: {error}") from error
    if found.version != FILE_VERSION or len(found.keys) > MAX_KEYS:
        raise ApiKeyError(
            f"{path}: version {found.version} with {len(found.keys)} keys; expected {FILE_VERSION}, {MAX_KEYS} at most"
        )
    return found.keys


def change_keys(path: Path, change: Callable[[tuple[ApiKey, ...]], tuple[ApiKey, ...]]) -> None:
    """Replace the keys in ``path`` by ``change(keys)``, alone among all who do so; the file is made if need be.

    On failure: the file is as it was. Blocks.

    Raises:
        ApiKeyError: the file cannot be read or written, or has no room.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(path):
            before = load_keys(path)
            keys = change(() if before is None else before.keys)
            if len(keys) > MAX_KEYS:
                raise ApiKeyError(f"{path} holds {MAX_KEYS} keys already: start another file with {API_KEYS}")
            _write(path, msgspec.json.format(msgspec.json.encode(_KeyFile(FILE_VERSION, keys)), indent=1) + b"\n")
    except OSError as error:
        raise ApiKeyError(f"{path}: cannot be written: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
