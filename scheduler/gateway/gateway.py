"""Everything that the handlers of one gateway process share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.audit_log import AuditLog
from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.environment import default_state_dir
from scheduler.contract.errors import GlowplugError
from scheduler.contract.messages import GenerateRequest, ModelCard
from scheduler.dispatch import Dispatcher
from scheduler.gateway.admission import Admission
from scheduler.gateway.batch_records import BatchRecords
from scheduler.gateway.file_store import FileStore
from scheduler.gateway.hub import Hub
from scheduler.gateway.identity import IDENTITY
from scheduler.gateway.metrics import GatewayMetrics
from scheduler.gateway.model_directory import ModelDirectory
from scheduler.gateway.paced_writes import PacedWrites
from scheduler.gateway.quotas import Quotas
from scheduler.gateway.settings import GatewaySettings
from scheduler.gateway.traces import TraceStore
from scheduler.gateway.tracing import Tracing
from scheduler.gateway.usage import UsageRecorder

if TYPE_CHECKING:
    from scheduler.gateway.access import AccessControl  # which itself needs GATEWAY

FILES_FOLDER: Final = "files"  # in the state folder


class Gateway:
    """The gateway's parts. Made once a process, before the listener; the caller starts and stops ``hub``.

    ``admission`` holds the policies of models and tenants; the settings' own where it is not given.
    ``files_dir`` is where uploaded files and results of batches are.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        redis: Redis,
        hub: Hub,
        gateway_id: str,
        access: AccessControl,
        admission: Admission | None = None,
        files_dir: Path | None = None,
    ) -> None:
        self.settings = settings
        self.redis = redis
        self.hub = hub
        self.dispatcher = Dispatcher(redis)
        self.gateway_id = gateway_id
        self.access = access
        self.audit: AuditLog | None = None
        self.bodies_bytes = 0  # being read now; see request_body
        self.admission = admission or Admission(settings)
        self.quotas = Quotas(redis, settings.redis_limit_s)
        self.usage = UsageRecorder(redis)
        self.templates = ChatTemplates()
        self.directory = ModelDirectory(redis, settings.redis_limit_s, self._on_card, lambda: hub.cut_off_for_s)
        self.metrics = GatewayMetrics()
        self.writes = PacedWrites()
        self.traces = TraceStore(redis)
        self.tracing = Tracing(settings.tracing, gateway_id)
        self.files = FileStore(
            files_dir or default_state_dir() / FILES_FOLDER,
            max_tenant_bytes=settings.max_tenant_file_bytes,
            max_tenant_files=settings.max_tenant_files,
            retention_s=settings.file_retention_s,
        )
        self.batches = BatchRecords(
            redis,
            gateway_id,
            max_active=settings.max_batches,
            max_active_of_tenant=settings.max_tenant_batches,
        )
        self.on_batch: Callable[[], None] | None = None  # told of each new one; set by what runs them
        self.draining = False
        self.reload: Callable[[], Awaitable[tuple[str, ...]]] | None = None  # reads certificate and configuration again
        self._background: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()

    def _on_card(self, card: ModelCard) -> None:
        """Compile a new model's chat template now, mostly in a health probe, so that its first request does not pay."""
        if card.chat_template is not None and card.refused is None:
            try:
                self.templates.ensure_compiled(card)
            except GlowplugError as error:  # its requests get this error; other models serve
                self._log.error("chat_template_refused", model=card.name, error=error.info.message)

    def tenant_of(self, request: web.Request) -> str:
        """Whose request it is; empty where there are no keys."""
        return request[IDENTITY].tenant

    def cancel_in_background(self, request: GenerateRequest) -> None:
        """Tell queue and workers that nobody waits for ``request`` any more. Returns at once; never raises."""
        self.run_in_background(self._cancel(request), name=f"cancel:{request.request_id}")

    async def _cancel(self, request: GenerateRequest) -> None:
        try:
            await self.dispatcher.cancel(request.request_id, request.model, self.gateway_id)
        except (RedisError, OSError) as error:
            self._log.warning("cancel_failed", request_id=request.request_id, error=str(error))

    def run_in_background(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run ``work`` beside the handler that asked; kept referenced, and a crash of it is logged."""
        # A handler that is being cancelled cannot await its own clean-up; these tasks outlive it.
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._on_background_done)
        return task

    def _on_background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("background_task_failed", task=task.get_name(), exc_info=error)

    def audit_nowait(self, actor: str, act: str, **facts: Any) -> None:
        """Append to the audit log, off the loop. Returns at once; never raises."""
        if self.audit is not None:
            self.run_in_background(asyncio.to_thread(self.audit.write, actor, act, **facts), name=f"audit:{act}")

    async def wait_background(self, limit_s: float) -> None:
        """Wait for cancellations and trace writes under way, at most ``limit_s``."""
        if self._background:
            await asyncio.wait(set(self._background), timeout=limit_s)


GATEWAY: Final = web.AppKey("gateway", Gateway)
