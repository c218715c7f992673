"""Files and batches over HTTP with OpenAI's own client, a real gateway and Valkey, and a scripted worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from openai.types import Batch

from scheduler.config import ModelPolicy, SchedulerConfig
from scheduler.contract import keys
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import GenerateRequest
from scheduler.contract.states import Priority, Tier
from scheduler.gateway.admission import Admission
from tests.batch_fixtures import batch_line, decode_rows, encode_lines
from tests.eventually import eventually
from tests.gateway_fixtures import MODEL, GatewayHarness, Publish, end, make_card, make_status, run_gateway, say

ENDED = ("completed", "failed", "expired", "cancelled")


class Held:
    """A worker that answers when ``gate`` is open; ``most`` requests were there at once."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.now = self.most = 0

    async def __call__(self, request: GenerateRequest, publish: Publish) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await self.gate.wait()
        self.now -= 1
        await say("done")(request, publish)


@pytest.fixture(autouse=True)
def _quick_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run looks at its clock more often than it need."""
    monkeypatch.setattr("scheduler.gateway.batch_run.WAIT_TURN_S", 0.1)
    monkeypatch.setattr("scheduler.gateway.batch_runner.LOOK_EVERY_S", 0.1)


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path, max_file_bytes=1 << 20, max_tenant_file_bytes=3 << 20) as running:
        yield running


def client_of(gateway: GatewayHarness, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, **options)


async def submit(client: openai.AsyncOpenAI, data: bytes, **fields: Any) -> Batch:
    uploaded = await client.files.create(file=("requests.jsonl", data), purpose="batch")
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **fields}
    return await client.batches.create(input_file_id=uploaded.id, **asked)


async def wait_status(client: openai.AsyncOpenAI, batch: Batch, *statuses: str) -> Batch:
    async def reached() -> Batch | None:
        found = await client.batches.retrieve(batch.id)
        return found if found.status in (statuses or ENDED) else None

    found: Batch = await eventually(reached, what=f"{batch.id} {statuses or ENDED}")
    return found


async def rows_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else decode_rows((await client.files.content(file_id)).content)


def set_policy(gateway: GatewayHarness, **policy: Any) -> None:
    gateway.server.gateway.admission = Admission(
        gateway.server.gateway.settings, SchedulerConfig(defaults=ModelPolicy(**policy))
    )


async def test_a_batch_from_upload_to_results(gateway: GatewayHarness) -> None:
    """Forty lines: every answer once, in order, at batch priority; one that is refused is told with its line."""
    client = client_of(gateway)
    lines = [batch_line(i) for i in range(40)]
    lines[7] = batch_line(7, temperature=9)
    batch = await submit(client, encode_lines(lines), metadata={"job": "nightly"})
    assert batch.status in ("validating", "in_progress")
    done = await wait_status(client, batch)
    assert (done.status, done.metadata) == ("completed", {"job": "nightly"})
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (40, 39, 1)
    rows = await rows_of(client, done.output_file_id)
    assert [row["custom_id"] for row in rows] == [f"r{i}" for i in range(40) if i != 7]
    assert {row["response"]["body"]["choices"][0]["message"]["content"] for row in rows} == {"Hello world"}
    (failed,) = await rows_of(client, done.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("r7", 400)
    assert (failed["error"]["line"], failed["error"]["param"]) == (8, "temperature")
    assert {request.priority for request in gateway.worker.seen} == {Priority.BATCH}
    assert len(gateway.worker.seen) == 39
    assert [one.id async for one in client.batches.list(limit=1)] == [batch.id]


async def test_a_batch_may_be_for_other_endpoints(gateway: GatewayHarness) -> None:
    """Completions and responses: each body in its own shape."""
    client = client_of(gateway)
    texts = []
    for url, body in (("/v1/completions", {"prompt": "once"}), ("/v1/responses", {"input": "once"})):
        done = await wait_status(
            client, await submit(client, encode_lines([batch_line(0, url=url, **body)]), endpoint=url)
        )
        (row,) = await rows_of(client, done.output_file_id)
        texts.append(row["response"]["body"])
    assert texts[0]["choices"][0]["text"] == texts[1]["output"][0]["content"][0]["text"] == "Hello world"


async def test_files_are_kept_listed_and_deleted(gateway: GatewayHarness) -> None:
    """What was uploaded comes back byte by byte; a deleted file is gone."""
    client = client_of(gateway)
    first = await client.files.create(
        file=("a b/../c.jsonl", b"one\n"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    second = await client.files.create(file=("two.jsonl", b"two\n" * 9000), purpose="batch")
    assert (first.bytes, first.filename, first.expires_at) == (4, "a b_.._c.jsonl", first.created_at + 7200)
    assert (await client.files.content(second.id)).content == b"two\n" * 9000
    assert {one.id async for one in client.files.list(limit=1)} == {first.id, second.id}
    assert (await client.files.delete(first.id)).deleted
    for name in (first.id, "file-../../../etc/passwd", "file-" + "0" * 32):
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(name)


@pytest.mark.parametrize(
    ("data", "purpose", "error"),
    [
        (b"x" * (1 << 20) + b"x", "batch", "larger than 1048576 bytes"),
        (b"x", "fine-tune", 'expected "batch", got "fine-tune"'),
    ],
)
async def test_an_upload_that_is_refused_leaves_nothing(
    gateway: GatewayHarness, data: bytes, purpose: Any, error: str
) -> None:
    """Too large, or for another purpose: an error that names the limit, and no file, not even half of one."""
    client = client_of(gateway)
    with pytest.raises(openai.APIStatusError, match=error):
        await client.files.create(file=("r.jsonl", data), purpose=purpose)
    folder = gateway.server.gateway.files.tenant_folder("").parent
    assert [path for path in folder.rglob("*") if path.is_file()] == []


async def test_a_tenant_has_room_for_so_much(gateway: GatewayHarness) -> None:
    """Beyond its bytes an upload is refused, and says what to do."""
    client = client_of(gateway)
    for _ in range(3):
        await client.files.create(file=("r.jsonl", b"x" * (1 << 20)), purpose="batch")
    with pytest.raises(openai.RateLimitError, match="delete some"):
        await client.files.create(file=("r.jsonl", b"x"), purpose="batch")


async def test_a_client_that_leaves_in_mid_upload_leaves_nothing(gateway: GatewayHarness) -> None:
    """A connection that breaks: what had come is dropped."""
    host, port = gateway.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Content-Length: 100000\r\n\r\n" + head + b"x" * 50_000
    )
    await writer.drain()
    folder = gateway.server.gateway.files.tenant_folder("").parent
    await eventually(lambda: folder.is_dir() and list(folder.iterdir()), what="an upload under way")
    writer.close()
    await eventually(lambda: not list(folder.iterdir()), what="an empty folder")


@pytest.mark.parametrize(
    ("lines", "code", "line"),
    [
        (b"", "empty_file", None),
        (encode_lines([batch_line(0)]) + b"{no json\n", "invalid_json_line", 2),
        (encode_lines([batch_line(0), batch_line(1), batch_line(0)]), "duplicate_custom_id", 3),
        (encode_lines([batch_line(0), batch_line(1, model="other")]), "mismatched_model", 2),
        (encode_lines([batch_line(0, url="/v1/embeddings")]), "mismatched_url", 1),
        (encode_lines([batch_line(0, stream=True)]), "invalid_request", 1),
    ],
)
async def test_a_file_with_a_wrong_line_fails_before_anything_runs(
    gateway: GatewayHarness, lines: bytes, code: str, line: int | None
) -> None:
    """The batch says which line, and why; no request was made of it."""
    client = client_of(gateway)
    failed = await wait_status(client, await submit(client, lines))
    assert failed.status == "failed"
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert (failed.errors.data[0].code, failed.errors.data[0].line) == (code, line)
    assert gateway.worker.seen == []


async def test_a_batch_that_is_cancelled_keeps_what_it_has(gateway: GatewayHarness) -> None:
    """Bounded lines are in flight; those are withdrawn, what was answered before is in the output."""
    client, held = client_of(gateway), Held()
    set_policy(gateway, batch_in_flight=4)
    gateway.worker.script = held
    batch = await submit(client, encode_lines(batch_line(i) for i in range(30)))
    await eventually(lambda: held.now == 4, what="four lines in flight")
    held.gate.set()
    await eventually(lambda: len(gateway.worker.seen) > 8, what="some answers")
    held.gate.clear()
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    done = await wait_status(client, batch)
    assert (done.status, held.most) == ("cancelled", 4)
    rows = await rows_of(client, done.output_file_id)
    assert done.request_counts is not None
    assert 0 < len(rows) == done.request_counts.completed < 30
    assert (await client.batches.cancel(batch.id)).status == "cancelled"


async def test_a_batch_whose_window_is_over_says_which_lines_never_ran(gateway: GatewayHarness) -> None:
    """Answered lines are kept, the others are errors with code batch_expired."""
    client, held = client_of(gateway), Held()
    set_policy(gateway, batch_in_flight=2)
    gateway.worker.script = held
    records = gateway.server.gateway.batches
    batch = await submit(client, encode_lines(batch_line(i) for i in range(5)), completion_window="1m")
    await eventually(lambda: held.now == 2, what="two lines in flight")
    # Its runner reads the clock, so the end is brought nearer under its hands: the next gateway sees another record.
    await gateway.server._batches.aclose()
    record = await records.find(batch.id)
    assert record is not None
    run = await records.try_acquire(batch.id)
    assert await records.update(msgspec.structs.replace(record, expires_at=record.created_at - 1), run)
    await records.release(batch.id, run)
    gateway.server._batches.start()
    done = await wait_status(client, batch)
    assert (done.status, done.output_file_id) == ("expired", None)
    rows = await rows_of(client, done.error_file_id)
    assert [(row["custom_id"], row["response"], row["error"]["code"]) for row in rows] == [
        (f"r{i}", None, "batch_expired") for i in range(5)
    ]


async def test_lines_that_fail_in_passing_are_tried_again(gateway: GatewayHarness) -> None:
    """A worker that is overloaded once, and one request that always fails: the one is answered, the other told."""
    client, seen = client_of(gateway), set[object]()

    async def script(request: GenerateRequest, publish: Publish) -> None:
        if "say 3" in str(request.prompt):
            publish(end(error=ErrorInfo(ErrorCode.GUEST_FAILED, "the guest trapped")))
        elif request.prompt not in seen:
            seen.add(request.prompt)
            publish(end(error=ErrorInfo(ErrorCode.OVERLOADED, "later")))
        else:
            await say("done")(request, publish)

    gateway.worker.script = script
    done = await wait_status(client, await submit(client, encode_lines(batch_line(i) for i in range(5))))
    rows, errors = await rows_of(client, done.output_file_id), await rows_of(client, done.error_file_id)
    assert [row["custom_id"] for row in rows] == ["r0", "r1", "r2", "r4"]
    assert [(row["custom_id"], row["error"]["code"], row["error"]["line"]) for row in errors] == [
        ("r3", "guest_failed", 4)
    ]


async def test_a_batch_that_may_not_wake_waits_until_somebody_else_did(gateway: GatewayHarness) -> None:
    """While the model sleeps nothing of the batch is queued, and it says what it waits for; then it runs."""
    client = client_of(gateway)
    set_policy(gateway, batch_wakes=False)
    batch = await submit(client, encode_lines(batch_line(i) for i in range(3)))

    async def waits_for() -> str | None:
        return (await client.batches.retrieve(batch.id)).to_dict().get("waits_for")  # type: ignore[return-value]

    await eventually(lambda: waits_for(), what="a reason to wait")
    assert (await waits_for(), gateway.worker.seen) == ("wake", [])
    await gateway.publish(make_card(), status=make_status(Tier.HOT, state="ready"))
    done = await wait_status(client, batch)
    assert (done.status, len(gateway.worker.seen)) == ("completed", 3)


def other_times() -> str:
    """A window that begins in six hours."""
    hour = datetime.now().astimezone().hour
    return f"{(hour + 6) % 24:02}:00-{(hour + 12) % 24:02}:00"


async def test_a_batch_waits_for_the_window_of_its_models_policy(gateway: GatewayHarness) -> None:
    """Outside of it nothing is queued, and the batch says so; as soon as the policy allows, it runs."""
    client = client_of(gateway)
    set_policy(gateway, batch_window=other_times())
    batch = await submit(client, encode_lines(batch_line(i) for i in range(3)))
    await eventually(lambda: is_waiting(client, batch, "window"), what="a batch that waits for its window")
    assert gateway.worker.seen == []
    set_policy(gateway)
    assert (await wait_status(client, batch)).status == "completed"


async def test_one_batch_may_wait_for_a_window_of_its_own(gateway: GatewayHarness) -> None:
    """Its lines stay where they are while another batch runs; what cannot be a window is refused."""
    client = client_of(gateway)
    waits = await submit(client, encode_lines([batch_line(0)]), extra_body={"run_window": other_times()})
    assert waits.to_dict()["run_window"] == other_times()
    await eventually(lambda: is_waiting(client, waits, "window"), what="a batch that waits for its window")
    other = await submit(client, encode_lines([batch_line(1)]))
    assert (await wait_status(client, other)).status == "completed"
    assert len(gateway.worker.seen) == 1
    await client.batches.cancel(waits.id)
    assert (await wait_status(client, waits)).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="22:00-06:00"):
        await submit(client, encode_lines([batch_line(0)]), extra_body={"run_window": "at night"})


async def is_waiting(client: openai.AsyncOpenAI, batch: Batch, reason: str) -> bool:
    return (await client.batches.retrieve(batch.id)).to_dict()["waits_for"] == reason


async def test_a_batch_that_waited_too_long_takes_the_order_of_interactive_requests(gateway: GatewayHarness) -> None:
    """Lines that nobody serves for batch_max_wait_s are withdrawn and queued among interactive requests."""
    client = client_of(gateway)
    set_policy(gateway, batch_max_wait_s=1.5, batch_in_flight=2)

    async def busy(request: GenerateRequest, publish: Publish) -> None:
        await (asyncio.Event().wait() if request.priority is Priority.BATCH else say("done")(request, publish))

    gateway.worker.script = busy
    done = await wait_status(client, await submit(client, encode_lines(batch_line(i) for i in range(4))))
    assert done.request_counts is not None
    assert (done.status, done.request_counts.completed) == ("completed", 4)
    redis: Any = gateway.redis
    queued = [request for request in gateway.worker.seen if request.priority is Priority.BATCH]
    assert len(queued) == 2
    assert all([await redis.exists(keys.cancelled(one.request_id)) for one in queued])


async def test_a_file_in_use_is_not_deleted(gateway: GatewayHarness) -> None:
    """409, naming the batch; after its end the file goes."""
    client, held = client_of(gateway), Held()
    gateway.worker.script = held
    batch = await submit(client, encode_lines([batch_line(0)]))
    await eventually(lambda: held.now == 1, what="the line in flight")
    with pytest.raises(openai.ConflictError, match=batch.id):
        await client.files.delete(batch.input_file_id)
    held.gate.set()
    await wait_status(client, batch)
    assert (await client.files.delete(batch.input_file_id)).deleted


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "1y"}, "completion_window"),
        ({"metadata": {"k": "v" * 600}}, "metadata"),
    ],
)
async def test_a_batch_that_cannot_be_is_refused_at_once(
    gateway: GatewayHarness, fields: dict[str, Any], param: str
) -> None:
    """400 that names the field."""
    with pytest.raises(openai.BadRequestError) as refused:
        await submit(client_of(gateway), encode_lines([batch_line(0)]), **fields)
    assert refused.value.param == param


async def test_a_batch_goes_on_at_another_gateway(gateway: GatewayHarness, redis_url: str, tmp_path: Path) -> None:
    """One that drains gives its batch back: the other answers what is left, and nothing twice."""
    client, held = client_of(gateway), Held()
    set_policy(gateway, batch_in_flight=4)
    gateway.worker.script = held
    batch = await submit(client, encode_lines(batch_line(i) for i in range(12)))
    held.gate.set()
    await eventually(lambda: len(gateway.worker.seen) >= 5, what="some answers")
    async with run_gateway(redis_url, tmp_path) as other:
        await gateway.server._batches.aclose()
        done = await wait_status(client_of(other), batch)
        rows = await rows_of(client_of(other), done.output_file_id)
    assert done.status == "completed"
    assert [row["custom_id"] for row in rows] == [f"r{i}" for i in range(12)]
    assert done.to_dict()["model"] == MODEL


async def test_metrics_tell_of_lines_and_ages(gateway: GatewayHarness) -> None:
    """While lines are held: how many run, wait and are done; afterwards only the counter is left."""
    held = Held()
    gateway.worker.script = held
    set_policy(gateway, batch_in_flight=3)
    client = client_of(gateway)
    lines = [batch_line(i) for i in range(8)] + [batch_line(8, temperature=9)]
    batch = await submit(client, encode_lines(lines))

    async def metrics() -> dict[str, float]:
        text = (await client.with_options(base_url=gateway.url).get("/metrics", cast_to=str)).splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in text if line[0] != "#")}

    async def told() -> dict[str, float] | None:
        found = await metrics()
        return found if found.get(f'glowplug_batch_lines{{model="{MODEL}",state="in_flight"}}') == 3 else None

    found = await eventually(told, what="three lines in flight")
    assert found[f'glowplug_batch_lines{{model="{MODEL}",state="waiting"}}'] == 6
    assert found['glowplug_batches{status="in_progress"}'] == 1
    assert 0 <= found['glowplug_batch_oldest_age_seconds{status="in_progress"}'] < 3600
    held.gate.set()
    assert (await wait_status(client, batch)).status == "completed"
    after = await metrics()
    assert after[f'glowplug_batch_answers_total{{model="{MODEL}",outcome="completed"}}'] == 8
    assert after[f'glowplug_batch_answers_total{{model="{MODEL}",outcome="failed"}}'] == 1
    assert not [name for name in after if name.startswith("glowplug_batches{")]
