"""The gateway process: from settings to a listener, and back to nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import secrets
import signal
import ssl
from typing import Final

import structlog
import uvloop
from aiohttp import web

from scheduler.api_keys import key_file_path
from scheduler.audit_log import open_audit_log
from scheduler.contract import job_queue
from scheduler.contract.config_file import find_changed
from scheduler.contract.connection import connect
from scheduler.contract.environment import ProcessSettings, SettingsError, read_process_settings
from scheduler.contract.errors import GlowplugError
from scheduler.contract.reloading import GATEWAY as GATEWAY_PART
from scheduler.contract.reloading import ReloadListener
from scheduler.contract.telemetry import configure_logging
from scheduler.gateway import (
    health,
    openapi,
    resumption,
    routes_admin,
    routes_batches,
    routes_chat,
    routes_completions,
    routes_dashboard,
    routes_dialects,
    routes_embeddings,
    routes_files,
    routes_models,
    routes_operations,
    routes_tokens,
)
from scheduler.gateway.access import AccessControl, check_access
from scheduler.gateway.admission import Admission
from scheduler.gateway.batch_runner import BatchRunner
from scheduler.gateway.errors import redis_within
from scheduler.gateway.gateway import FILES_FOLDER, GATEWAY, Gateway
from scheduler.gateway.hub import Hub
from scheduler.gateway.listener import ListeningSite, load_certificate, make_tls_context
from scheduler.gateway.presence import Presence
from scheduler.gateway.request_log import add_standard_headers, observe_request
from scheduler.gateway.settings import GatewaySettings, read_gateway_settings

BACKGROUND_LIMIT_S: Final = 2.0

_log = structlog.get_logger()


def build_app(gateway: Gateway) -> web.Application:
    """The application around ``gateway``; its hub must be started before the first request."""
    app = web.Application(middlewares=[observe_request, check_access], client_max_size=gateway.settings.max_body_bytes)
    app[GATEWAY] = gateway
    routes_dashboard.prepare_watchers(app)
    app.on_response_prepare.append(add_standard_headers)
    app.add_routes(
        [
            web.post("/v1/chat/completions", routes_chat.create_chat_completion),
            web.post("/v1/completions", routes_completions.create_completion),
            web.post("/v1/responses", routes_dialects.create_response),
            web.post("/v1/messages", routes_dialects.create_message),
            web.post("/v1/responses/input_tokens", routes_tokens.count_response_tokens),
            web.post("/v1/messages/count_tokens", routes_tokens.count_message_tokens),
            web.post("/tokenize", routes_tokens.tokenize),
            web.post("/v1/tokenize", routes_tokens.tokenize),
            web.post("/detokenize", routes_tokens.detokenize),
            web.post("/v1/detokenize", routes_tokens.detokenize),
            web.get("/v1/requests/{request_id}/stream", resumption.resume_stream),
            web.post("/v1/embeddings", routes_embeddings.create_embeddings),
            web.post("/v1/files", routes_files.create_file),
            web.get("/v1/files", routes_files.list_files),
            web.get("/v1/files/{file_id}", routes_files.get_file),
            web.get("/v1/files/{file_id}/content", routes_files.get_file_content),
            web.delete("/v1/files/{file_id}", routes_files.delete_file),
            web.post("/v1/batches", routes_batches.create_batch),
            web.get("/v1/batches", routes_batches.list_batches),
            web.get("/v1/batches/{batch_id}", routes_batches.get_batch),
            web.post("/v1/batches/{batch_id}/cancel", routes_batches.cancel_batch),
            web.get("/v1/models", routes_models.list_models),
            web.get("/v1/models/{model:.+}", routes_models.get_model),
            web.get("/healthz", health.get_liveness),
            web.get("/readyz", health.get_readiness),
            web.get("/health", health.get_readiness),
            web.get("/openapi.json", openapi.get_document),
            web.get("/metrics", routes_admin.get_metrics),
            web.get("/admin/status", routes_admin.get_status),
            web.get("/admin/traces/{request_id}", routes_admin.get_trace),
            web.get("/admin/usage", routes_admin.get_usage),
            web.post("/admin/models/{model:.+}:{act:[a-z]+}", routes_operations.post_model_act),
            web.post("/admin/nodes/{node:.+}:{act:[a-z]+}", routes_operations.post_node_act),
            web.post("/admin/config:reload", routes_operations.post_reload),
            web.get("/admin/live", routes_dashboard.watch_live),
            web.get("/", routes_dashboard.get_page),
            web.get("/dashboard/{name}", routes_dashboard.get_asset),
        ]
    )
    return app


class GatewayServer:
    """A listening gateway. ``start`` and ``aclose`` once each, on one loop."""

    def __init__(self, settings: GatewaySettings, process: ProcessSettings) -> None:
        self._settings = settings
        self._redis = connect(process.redis_url)
        gateway_id = f"{process.node_id}:{os.getpid()}:{secrets.token_hex(3)}"
        self._hub = Hub(self._redis, gateway_id)
        self._state_dir = process.state_dir
        access = AccessControl(key_file_path(process.state_dir), no_auth=settings.no_auth)
        files_dir = settings.files_dir or process.state_dir / FILES_FOLDER
        admission = _read_admission(process, settings)
        self.gateway = Gateway(settings, self._redis, self._hub, gateway_id, access, admission, files_dir)
        self._batches = BatchRunner(self.gateway, self.gateway.batches, self.gateway.files)
        self.gateway.on_batch = self._batches.notify
        self.gateway.reload = self.reload
        self._config_path = process.config_path
        self._tls: ssl.SSLContext | None = None
        self._presence = Presence(self._redis, gateway_id)
        self._reloading = ReloadListener(self._redis, GATEWAY_PART, gateway_id, self.reload)
        self._runner = web.AppRunner(
            build_app(self.gateway),
            handler_cancellation=True,
            # aiohttp waits this long for a handler, then as long again before it cancels it: two halves of the grace.
            shutdown_timeout=settings.drain_grace_s / 2,
        )
        self.host, self.port = settings.host, settings.port

    async def start(self) -> None:
        """Subscribe, then listen. On success ``host`` and ``port`` are the real ones and the ready descriptor is told.

        Raises:
            OSError: the address cannot be bound.
            SettingsError: strangers could come in, or key or certificate files cannot be used.
        """
        settings = self._settings
        self.gateway.access.load(settings.host)  # before anything listens
        self.gateway.audit = open_audit_log(self._state_dir)
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self._tls = make_tls_context(settings.tls_certificate, settings.tls_key)
        # Imports that the first request needs go on in a thread while this one waits for Redis.
        preloading = asyncio.create_task(asyncio.to_thread(self._preload), name="preload")
        await self._hub.start()
        self._presence.start()
        self._reloading.start()
        await self._runner.setup()
        await ListeningSite(self._runner, settings, self._tls).start()
        self.host, self.port = self._runner.addresses[0][:2]
        self._announce()
        await preloading
        await self._warm_up()
        self._batches.start()
        gc.collect()
        gc.freeze()  # what lives now lives for ever; without it, full collections pause all streams for 9 to 15 ms
        _log.info("gateway_ready", host=self.host, port=self.port, gateway_id=self.gateway.gateway_id)

    async def aclose(self) -> None:
        """Stop accepting, let streams finish within the grace period, then cut them. Idempotent."""
        self.gateway.draining = True
        await self._batches.aclose()  # another gateway goes on with them
        await self._runner.cleanup()
        await self.gateway.wait_background(BACKGROUND_LIMIT_S)
        await self.gateway.tracing.aclose()
        await self.gateway.quotas.aclose()
        await self.gateway.usage.aclose()
        await self._hub.aclose()
        await self._reloading.aclose()
        await self._presence.aclose()
        await self._redis.aclose()
        if self.gateway.audit is not None:
            self.gateway.audit.close()

    def reload_certificate(self) -> None:
        """Read the certificate again, for connections from now on; one that cannot be used changes nothing."""
        settings = self._settings
        if self._tls is None or settings.tls_certificate is None or settings.tls_key is None:
            return
        try:
            load_certificate(self._tls, settings.tls_certificate, settings.tls_key)
            _log.info("certificate_reloaded")
        except SettingsError as error:
            _log.error("certificate_not_reloaded", error=str(error))

    async def reload(self) -> tuple[str, ...]:
        """Read certificate and configuration again; streams go on. What cannot be used changes nothing.

        Returns the settings in the file that hold after a restart only.

        Raises:
            SettingsError: the configuration is not valid; names file, line and remedy.
        """
        self.reload_certificate()
        path = self._config_path
        if path is None:
            return ()
        from scheduler.config import load_config  # YAML is not imported where there is no file

        self.gateway.admission.set_config(await asyncio.to_thread(load_config, path))
        if self.gateway.admission.has_quotas:
            await asyncio.to_thread(self.gateway.quotas.ensure_ready)
        return await asyncio.to_thread(find_changed, ("gateway", "logging"))

    def reload_in_background(self) -> None:
        """:meth:`reload`, for a signal handler; an error goes to the log."""
        self._reloading.reload_in_background()

    def _preload(self) -> None:
        self.gateway.metrics.ensure_ready()
        self.gateway.tracing.ensure_ready()
        if self.gateway.admission.has_quotas:
            self.gateway.quotas.ensure_ready()
        import jinja2.sandbox  # noqa: F401  (imported for its side effect: the next import is a look-up)

    async def _warm_up(self) -> None:
        """Read the models (which compiles their chat templates) and load the queue's scripts before they are needed."""
        try:
            await self.gateway.directory.refresh()
            async with redis_within(self._settings.redis_limit_s, "loading the queue's scripts"):
                for script in (job_queue.ENQUEUE, job_queue.CANCEL):
                    await self._redis.script_load(script)
        except GlowplugError as error:  # Redis went away again; the first request will load them
            _log.warning("warm_up_incomplete", error=error.info.message)

    def _announce(self) -> None:
        """Tell the parent process where we listen: one JSON line on the descriptor it gave us."""
        if self._settings.ready_fd is None:
            return
        line = json.dumps({"host": self.host, "port": self.port}) + "\n"
        with os.fdopen(self._settings.ready_fd, "wb") as pipe:
            pipe.write(line.encode())


async def run_gateway(settings: GatewaySettings, process: ProcessSettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the draining at once."""
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = GatewayServer(settings, process)
    loop.add_signal_handler(signal.SIGHUP, server.reload_in_background)
    stopped = asyncio.create_task(first.wait(), name="signal")
    starting = asyncio.create_task(server.start(), name="start")
    await asyncio.wait({stopped, starting}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        await starting  # raises what stopped it
        await stopped
    else:
        starting.cancel()
    _log.info("gateway_draining", grace_s=settings.drain_grace_s)
    closing = asyncio.create_task(server.aclose(), name="drain")
    hurry = asyncio.create_task(second.wait(), name="second signal")
    await asyncio.wait({closing, hurry}, return_when=asyncio.FIRST_COMPLETED)
    if closing.done():
        await closing
        hurry.cancel()
    else:
        closing.cancel()
        _log.warning("gateway_stopped_at_once")


def raise_file_limit() -> None:
    """Allow as many connections as the hard limit permits; each client is one descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _read_admission(process: ProcessSettings, settings: GatewaySettings) -> Admission:
    """Policies of models and tenants, from the configuration file if there is one.

    Raises:
        SettingsError: the file is not valid.
    """
    if process.config_path is None:
        return Admission(settings)
    from scheduler.config import load_config  # YAML is not imported where there is no file

    return Admission(settings, load_config(process.config_path))


def main() -> int:
    """Entry point of ``python -m scheduler gateway``; its exit code."""
    process = read_process_settings()
    configure_logging(
        component="gateway", level=process.log_level, log_format=process.log_format, log_dir=process.log_dir
    )
    raise_file_limit()
    uvloop.run(run_gateway(read_gateway_settings(), process))
    return 0
