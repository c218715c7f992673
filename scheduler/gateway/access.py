"""Who may do what: the gate before every handler.

============================= ============================ ==========================================
the gateway listens on        there is a key file          then
============================= ============================ ==========================================
loopback                      no                           open, said once in the log
loopback                      yes                          keys are required
loopback, ``--no-auth``       either                       open, said once in the log
anything else                 no, or ``--no-auth``         it does not start, and says what to do
anything else                 yes                          keys are required
============================= ============================ ==========================================

Once keys have been required they stay required, also when the file disappears: then nobody gets in. A changed file is
read again within :data:`RECHECK_EVERY_S`; one that cannot be used leaves the keys as they were, and is an error in the
log. While open, a gateway answers only to names of this machine (``Host``) and to no foreign web page (``Origin``), so
that a page in the user's browser cannot reach it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import time
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from scheduler.api_keys import ApiKey, ApiKeyError, ApiKeySet, Scope, load_keys
from scheduler.contract.environment import SettingsError
from scheduler.contract.errors import GlowplugError
from scheduler.gateway.errors import HttpError, describe_refusal
from scheduler.gateway.gateway import GATEWAY
from scheduler.gateway.identity import ANONYMOUS, IDENTITY, Identity
from scheduler.gateway.response_headers import is_preflight, preflight_response

RECHECK_EVERY_S: Final = 0.2
FAILURE_LOG_EVERY_S: Final = 1.0
#: Paths that need no key: probes, which tell nothing about models or tenants, and what a browser loads first.
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/health", "/", "/favicon.ico"})
#: What the page at ``/`` consists of: it holds no data, and reads ``/admin`` with the key of whoever looks.
OPEN_PREFIX: Final = "/dashboard/"
#: First match wins; a path that matches none needs a key, of any scope.
SCOPES_BY_PREFIX: Final = (
    ("/admin", Scope.ADMIN),
    ("/metrics", Scope.ADMIN),
    ("/v1/files", Scope.BATCH),
    ("/v1/batches", Scope.BATCH),
    ("/v1", Scope.INFER),
    ("/tokenize", Scope.INFER),
    ("/detokenize", Scope.INFER),
)
#: In the audit log, of an order that was cut off or crashed before it had an answer.
UNANSWERED_STATUS: Final = 500
MAX_AUDITED_PATH_CHARS: Final = 200
HOW_TO_SEND: Final = "send it as `Authorization: Bearer KEY` (or x-api-key)"

_log = structlog.get_logger()


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def check_may_start(host: str, *, has_keys: bool, no_auth: bool) -> None:
    """Refuse to listen where strangers could come in without a key.

    Raises:
        SettingsError: listening beyond loopback without keys; names the remedy.
    """
    if is_loopback(host):
        return
    if no_auth:
        raise SettingsError(f"--no-auth works on loopback only, not on {host}: drop it, or listen on 127.0.0.1")
    if not has_keys:
        raise SettingsError(
            f"listening on {host} lets other machines in, and there are no API keys: make one with "
            "`glowplug keys api new`, or listen on 127.0.0.1"
        )


def scope_of(path: str) -> Scope | None:
    """The scope that ``path`` needs; None: any key."""
    for prefix, scope in SCOPES_BY_PREFIX:
        if path == prefix or path.startswith(prefix + "/"):
            return scope
    return None


def is_open(request: web.Request) -> bool:
    """Whether ``request`` needs no key."""
    return request.path in OPEN_PATHS or path_of_route(request).startswith(OPEN_PREFIX)


class AccessControl:
    """The keys of one gateway process. Event loop only, but for :meth:`load`."""

    def __init__(self, path: Path, *, no_auth: bool = False) -> None:
        self._path = path
        self._no_auth = no_auth
        self._keys: ApiKeySet | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._checked_mono_s = 0.0
        self._reloading = asyncio.Lock()
        self._failures_unlogged = 0
        self._failure_logged_mono_s = 0.0
        self._beyond_scope_unlogged = 0
        self._beyond_scope_logged_mono_s = 0.0

    @property
    def requires_keys(self) -> bool:
        return self._keys is not None and not self._no_auth

    def load(self, host: str) -> None:
        """Read the keys for the first time and decide whether the gateway may listen on ``host``. Blocks.

        Raises:
            SettingsError: it may not, or the file cannot be used.
        """
        self._stamp = self._read_stamp()
        try:
            self._keys = load_keys(self._path)
        except ApiKeyError as error:
            raise SettingsError(str(error)) from error
        check_may_start(host, has_keys=self._keys is not None, no_auth=self._no_auth)
        if not self.requires_keys:
            reason = "--no-auth" if self._no_auth else "no key file; `glowplug keys api new` closes it"
            _log.warning("gateway_open", host=host, reason=reason)

    async def identify(self, request: web.Request) -> Identity:
        """Who sent ``request``; it may do what its path needs.

        Raises:
            HttpError: 401 without a valid key, 403 with one that may not do this, or for a foreign page.
        """
        await self._ensure_fresh()
        if not self.requires_keys:
            if not is_open(request):
                check_not_foreign(request)
            return ANONYMOUS
        if is_open(request):
            return ANONYMOUS
        key = self._authenticate(request)
        scope = scope_of(path_of_route(request))
        if scope is not None and scope not in key.scopes:
            if scope is Scope.ADMIN:
                self._note_beyond_scope(request, key)
            raise HttpError(
                403,
                f'this key may not do that: {request.path[:100]} needs scope "{scope}", it has {", ".join(key.scopes)}',
                code="insufficient_scope",
                openai_type="permission_error",
            )
        return Identity(key)

    async def identify_key(self, key_id: str) -> Identity | None:
        """Who the key with this id is now, for work that goes on after its request; None: it may do nothing any more.

        An empty id is whoever needed no key, which counts for as long as nobody needs one.
        """
        await self._ensure_fresh()
        if not self.requires_keys:
            return ANONYMOUS
        key = None if self._keys is None else self._keys.get(key_id)
        is_usable = key is not None and key.state_at(time.time()) == "active" and Scope.BATCH in key.scopes
        return Identity(key) if is_usable else None

    def _authenticate(self, request: web.Request) -> ApiKey:
        token = read_token(request)
        if token is None:
            raise self._refuse(request, "missing", f"an API key is needed: {HOW_TO_SEND}")
        key = None if self._keys is None else self._keys.find(token)
        if key is None:
            raise self._refuse(request, "unknown", "this API key is not known here: check it, or ask for a new one")
        state = key.state_at(time.time())
        if state != "active":
            raise self._refuse(request, state, f"this API key is {state}: ask for a new one")
        return key

    def _note_beyond_scope(self, request: web.Request, key: ApiKey) -> None:
        """A key that is for less tried an admin path: a line of the audit log, at most one a second."""
        self._beyond_scope_unlogged += 1
        now_mono_s = time.monotonic()
        if now_mono_s - self._beyond_scope_logged_mono_s >= FAILURE_LOG_EVERY_S:
            path = request.path[:MAX_AUDITED_PATH_CHARS]
            facts = {"method": request.method, "path": path, "num_refused": self._beyond_scope_unlogged}
            request.app[GATEWAY].audit_nowait(key.id, "admin_refused", status=403, code="insufficient_scope", **facts)
            self._beyond_scope_unlogged, self._beyond_scope_logged_mono_s = 0, now_mono_s

    def _refuse(self, request: web.Request, reason: str, message: str) -> HttpError:
        """A 401; in the log at most once a second, so that who guesses cannot fill the disk."""
        self._failures_unlogged += 1
        request.app[GATEWAY].metrics.on_refused_key(reason)
        now_mono_s = time.monotonic()
        if now_mono_s - self._failure_logged_mono_s >= FAILURE_LOG_EVERY_S:
            _log.warning("access_refused", reason=reason, num_refused=self._failures_unlogged)
            self._failures_unlogged, self._failure_logged_mono_s = 0, now_mono_s
        return HttpError(
            401,
            message,
            code="missing_api_key" if reason == "missing" else "invalid_api_key",
            openai_type="authentication_error",
            headers={"WWW-Authenticate": 'Bearer realm="glowplug"'},
        )

    # --- reload -------------------------------------------------------------------------------------------------

    async def _ensure_fresh(self) -> None:
        now_mono_s = time.monotonic()
        if now_mono_s - self._checked_mono_s < RECHECK_EVERY_S:
            return
        self._checked_mono_s = now_mono_s
        if self._read_stamp() == self._stamp or self._reloading.locked():  # one stat of a local file: microseconds
            return
        async with self._reloading:
            stamp = self._read_stamp()
            try:
                found = await asyncio.to_thread(load_keys, self._path)
            except ApiKeyError as error:
                _log.error("api_keys_not_reloaded", error=str(error))
                if self._keys is None:  # somebody wants keys: until they can be read, nobody gets in
                    self._keys = ApiKeySet(())
            else:
                if found is None and self._keys is not None:
                    _log.error("api_keys_gone", path=str(self._path), remedy="put it back; nobody gets in until then")
                    found = ApiKeySet(())
                self._keys = found
                _log.info("api_keys_reloaded", num_keys=0 if found is None else len(found.keys))
            self._stamp = stamp

    def _read_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


def path_of_route(request: web.Request) -> str:
    """The path as the router understood it, so that no spelling of a path reaches a handler under another's scope."""
    resource = request.match_info.route.resource
    return request.path if resource is None else resource.canonical


def read_token(request: web.Request) -> str | None:
    """The key that a request carries, None without one. A malformed header is a wrong key, not a missing one."""
    header = request.headers.get("Authorization")
    if header is not None:
        scheme, _, token = header.partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""
    return request.headers.get("x-api-key")


def check_not_foreign(request: web.Request) -> None:
    """While the gateway is open: this machine's own names, and no web page from elsewhere.

    Raises:
        HttpError: 403.
    """
    host = read_host_of(f"//{request.headers.get('Host', '')}")
    if "." in host and not is_loopback(host) and not _is_address(host):
        raise HttpError(
            403,
            f'without API keys only local names are answered, not Host "{host[:100]}": make a key with '
            "`glowplug keys api new`",
            code="foreign_host",
            openai_type="permission_error",
        )
    origin = request.headers.get("Origin")
    if origin is None or origin in request.app[GATEWAY].settings.cors_origins:
        return
    if not is_loopback(read_host_of(origin)):
        raise HttpError(
            403,
            "without API keys no page of another origin is answered: make a key, or allow the origin",
            code="foreign_origin",
            openai_type="permission_error",
        )


def read_host_of(origin: str) -> str:
    """The host of an ``Origin``; empty for ``null`` and for what is no origin."""
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@web.middleware
async def check_access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Set the request's identity, or refuse it before anything of it is read."""
    gateway = request.app[GATEWAY]
    if gateway.settings.cors_origins and is_preflight(request):
        return preflight_response()  # a preflight carries no key, and learns nothing
    identity = await gateway.access.identify(request)
    request[IDENTITY] = identity
    if request.method in ("GET", "HEAD") or scope_of(path_of_route(request)) is not Scope.ADMIN:
        return await handler(request)
    status, code = UNANSWERED_STATUS, None
    try:
        response = await handler(request)
        status = response.status
        return response
    except (GlowplugError, HttpError, web.HTTPException) as error:
        status, code = describe_refusal(error)
        raise
    finally:  # refused orders and crashes too: what was tried is as telling as what was done
        actor = identity.key_id or "loopback"
        path = request.path[:MAX_AUDITED_PATH_CHARS]
        gateway.audit_nowait(actor, "admin_request", method=request.method, path=path, status=status, code=code)
