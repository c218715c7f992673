"""One trace from a client through real processes: gateway, queue and a worker that was cold, at an OTLP receiver."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from tests.eventually import eventually
from tests.fleet_fixtures import CHAT, started_fleet
from tests.otlp_receiver import run_receiver
from tests.worker_fixtures import MODEL, copy_state_dir

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"


async def test_a_cold_start_is_one_trace_from_client_to_worker(short_tmp_path: Path) -> None:
    """Configured by the file alone: the wake's phases under the request, the worker's log with the trace's id."""
    state_dir = copy_state_dir(short_tmp_path / "state")
    async with run_receiver() as receiver:
        (state_dir / "glowplug.yaml").write_text(f"tracing: {{endpoint: '{receiver.url}', service_name: shop}}\n")
        async with started_fleet(state_dir, gateways=1, OTEL_BSP_SCHEDULE_DELAY="50") as fleet:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "a secret"}], "max_tokens": 4}
            parent = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"}
            url = fleet.urls["gateway-0"] + CHAT
            async with aiohttp.ClientSession() as client, client.post(url, json=body, headers=parent) as response:
                assert response.status == 200, await response.text()
                assert response.headers["X-Trace-Id"] == TRACE
            spans = {span.name: span for span in await receiver.wait_root(TRACE)}
            await eventually(lambda: fleet.log_events("agent", "request_ended"), what="the worker's log line")
            (ended,) = fleet.log_events("agent", "request_ended")
    top, part, wake = spans[f"POST {CHAT}"], spans[f"chat {MODEL}"], spans["wake"]
    assert (top.parent_id, part.parent_id, wake.parent_id) == (CLIENT_SPAN, top.span_id, part.span_id)
    for name in ("verify", "spawn", "device", "map", "restore"):
        assert spans[name].parent_id == wake.span_id
        assert part.start_ns <= wake.start_ns <= spans[name].start_ns <= spans[name].end_ns <= wake.end_ns
    assert wake.end_ns <= spans["prefill"].end_ns <= part.end_ns
    assert {span.service for span in spans.values()} == {"shop", "shop-worker"}
    assert part.attributes["glowplug.cold_start"] in ("disk", "snapshot")
    assert "glowplug.clock.error_ms" not in wake.attributes  # one host, one clock
    assert (ended["trace_id"], ended["request_id"]) == (TRACE, part.attributes["gen_ai.response.id"])
    assert "secret" not in repr(receiver.spans)
