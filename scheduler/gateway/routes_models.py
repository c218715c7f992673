"""``GET /v1/models`` and ``/v1/models/{id}``: from cards and the last report, at zero workers too, waking nothing."""

from __future__ import annotations

from typing import Final

import msgspec
from aiohttp import web

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import ModelCard, ModelStatus
from scheduler.contract.states import Task, Tier
from scheduler.gateway.gateway import GATEWAY, Gateway
from scheduler.gateway.identity import IDENTITY
from scheduler.gateway.tool_styles import find_tool_style

OWNER: Final = "glowplug"


class ModelDocument(msgspec.Struct):
    """A model in OpenAI's shape, and beyond it: ``status`` is cold, loading, warm or refused; ``tools`` whether it can
    call functions."""

    id: str
    created: int
    status: str
    tier: Tier | None
    context_length: int
    architecture: str
    weight_format: str
    system_fingerprint: str
    task: Task
    tools: bool
    object: str = "model"
    owned_by: str = OWNER


class ModelList(msgspec.Struct):
    data: list[ModelDocument]
    object: str = "list"


async def list_models(request: web.Request) -> web.Response:
    """All models that the key may see, by name."""
    directory, identity = request.app[GATEWAY].directory, request[IDENTITY]
    await directory.ensure_fresh()
    visible = sorted(filter(identity.may_see, directory.cards))
    found = [build_document(directory.cards[name], request.app[GATEWAY]) for name in visible]
    return web.Response(body=msgspec.json.encode(ModelList(found)), content_type="application/json")


async def get_model(request: web.Request) -> web.Response:
    """One model, also a refused one."""
    directory, name = request.app[GATEWAY].directory, request.match_info["model"]
    await directory.ensure_fresh()
    card = directory.find_card(name, request[IDENTITY])
    if card is None:
        raise GlowplugError(
            ErrorCode.MODEL_NOT_FOUND, f'no model "{name[:200]}" here; GET /v1/models lists them', param="model"
        )
    return web.Response(
        body=msgspec.json.encode(build_document(card, request.app[GATEWAY])), content_type="application/json"
    )


def build_document(card: ModelCard, gateway: Gateway) -> ModelDocument:
    directory = gateway.directory
    status = directory.status_of(card.name)
    return ModelDocument(
        id=card.name,
        created=int(card.created_at_s),
        status=choose_status(card, status, is_hot=directory.is_hot(card.name)),
        tier=None if status is None else status.tier,
        context_length=card.context_length,
        architecture=card.architecture,
        weight_format=card.weight_format,
        system_fingerprint=f"fp_{card.snapshot_id}",
        task=card.task,
        tools=gateway.templates.takes_tools(card) and find_tool_style(card.chat_template or "") is not None,
    )


def choose_status(card: ModelCard, status: ModelStatus | None, *, is_hot: bool) -> str:
    """One word for people."""
    if card.refused is not None:
        return "refused"
    if is_hot:
        return "warm"
    return "loading" if status is not None and status.workers else "cold"
