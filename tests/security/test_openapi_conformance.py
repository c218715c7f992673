"""``/openapi.json`` against the gateway: the same routes, and no answer that it does not name.

Requests are made from the document by Schemathesis; a scripted worker answers those that are valid.
``GLOWPLUG_TEST_API_EXAMPLES=200`` makes it a longer search (requests an operation; printed with ``-s``).
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from scheduler.contract.messages import GenerateRequest, StepFrame, TokenEvent, VectorFrame
from scheduler.contract.states import Task
from scheduler.gateway.app import build_app
from scheduler.gateway.openapi import build_document, list_operations
from tests.gateway_fixtures import TOOL_TEMPLATE, GatewayHarness, Publish, end, make_card, run_gateway, say

NUM_EXAMPLES = int(os.environ.get("GLOWPLUG_TEST_API_EXAMPLES", "4"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ENDLESS = "/admin/live"
VECTORS = "vectors"


async def answer(request: GenerateRequest, publish: Publish) -> None:
    """A worker for every kind of request."""
    if request.embedding is not None:
        for index in range(len(request.embedding.inputs)):
            publish(VectorFrame(index, 1, 2, 0, bytes(8)))
        publish(end())
    elif request.text_only:
        is_text = isinstance(request.prompt, str)
        publish(StepFrame((TokenEvent(0, 7 if is_text else -1, "" if is_text else "text"),), time.monotonic_ns()))
        publish(end())
    else:
        await say('<tool_call>{"name": "f", "arguments": {}}', "</tool_call> and text")(request, publish)


def test_the_document_is_valid_openapi() -> None:
    """By the specification's own schema."""
    schemathesis.openapi.from_dict(json.loads(build_document())).validate()


async def test_every_route_is_in_the_document(redis_url: str, tmp_path: Path) -> None:
    """And nothing else is."""
    async with run_gateway(redis_url, tmp_path) as harness:
        app = build_app(harness.server.gateway)
        routes = {
            (route.method.lower(), route.resource.canonical)
            for route in app.router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
        status, _, document = await harness.get("/openapi.json")
        assert status == 200
    assert {(op.method, op.path) for op in list_operations()} == routes
    assert {(method, path) for path, found in document["paths"].items() for method in found} == routes


def search(url: str, document: dict[str, Any], path: str, method: str, seen: Counter[int]) -> None:
    """Send generated requests to one operation. Blocks; not on the loop's thread."""
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path][method.upper()]
    model = VECTORS if path == "/v1/embeddings" else "tiny"

    def send(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and len(str(case.body["model"])) % 3:
            case.body["model"] = model
        response = case.call(base_url=url, timeout=60)
        seen[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        try:
            strategy = operation.as_strategy(generation_mode=mode)
            settings(
                max_examples=NUM_EXAMPLES,
                deadline=None,
                database=None,
                derandomize=NUM_EXAMPLES <= 10,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(case=strategy)(send))()
        except schemathesis.errors.InvalidSchema:
            raise
        except Exception as error:  # an operation without input has nothing that could be wrong
            if "SkipTest" not in type(error).__name__ and "Unsatisfiable" not in type(error).__name__:
                raise


OPERATIONS = [op for op in list_operations() if op.path != ENDLESS]


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> Any:
    async with run_gateway(redis_url, tmp_path, answer) as harness:
        await harness.publish(
            make_card(chat_template=TOOL_TEMPLATE), make_card(VECTORS, task=Task.EMBED, vector_size=2)
        )
        yield harness


@pytest.mark.timeout(120 + 20 * NUM_EXAMPLES)  # 200 of them take some minutes
async def test_no_answer_is_undocumented(gateway: GatewayHarness) -> None:
    """Valid and invalid requests to every operation: no 5xx, and only statuses, types and bodies that are named."""
    document = json.loads(build_document())
    seen: Counter[int] = Counter()
    for op in OPERATIONS:
        await asyncio.to_thread(search, gateway.url, document, op.path, op.method, seen)
    print(f"{sum(seen.values())} requests to {len(OPERATIONS)} operations: {dict(sorted(seen.items()))}")
    assert seen[200] > len(OPERATIONS)
    assert seen[400] > len(OPERATIONS)
