"""The queue's contract: arq's names and layout, and what is refused when it does not decode."""

from __future__ import annotations

import pickle
from typing import Any

import arq.constants
import msgspec
import pytest
from arq.jobs import deserialize_job_raw
from hypothesis import given
from hypothesis import strategies as st

from scheduler.contract import codec, job_queue, keys, token_log
from scheduler.contract.connection import connection_options
from scheduler.contract.errors import ContractError
from scheduler.contract.messages import GenerateRequest
from tests.queue_fixtures import make_request, make_step


def test_key_prefixes_are_those_of_arq() -> None:
    """The keys that arq's worker reads and writes are spelled as arq spells them."""
    assert keys.job("x") == arq.constants.job_key_prefix + "x"
    assert keys.in_progress("x") == arq.constants.in_progress_key_prefix + "x"
    assert keys.result("x") == arq.constants.result_key_prefix + "x"
    assert keys.retry("x") == arq.constants.retry_key_prefix + "x"


def test_arq_reads_our_job_body() -> None:
    """A body written without arq is what arq's own reader expects, with the request as one opaque argument."""
    request = make_request("r1")
    body = job_queue.encode_job(request, 1234)
    function, arguments, keywords, job_try, enqueued_ms = deserialize_job_raw(body, deserializer=msgspec.msgpack.decode)
    assert (function, keywords, job_try, enqueued_ms) == (keys.JOB_FUNCTION, {}, None, 1234)
    assert codec.decode(arguments[0], GenerateRequest) == request
    assert job_queue.decode_job(body) == request


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x93",
        msgspec.msgpack.encode({"f": "generate"}),
        msgspec.msgpack.encode({"a": []}),
        msgspec.msgpack.encode({"a": [b"junk"]}),
        pickle.dumps({"a": [b""]}),
    ],
)
def test_malformed_job_body_is_a_contract_error(body: bytes) -> None:
    """Nothing but a ContractError comes out of a bad body, and nothing is unpickled."""
    with pytest.raises(ContractError):
        job_queue.decode_job(body)


@given(st.lists(st.tuples(st.text(), st.integers(0, 2**31), st.binary())))
def test_token_messages_round_trip(items: list[tuple[str, int, bytes]]) -> None:
    """What one side encodes, the other decodes to the same items."""
    assert token_log.decode_items(token_log.encode_items(items)) == items


@given(st.binary())
def test_any_bytes_decode_or_raise_contract_error(data: bytes) -> None:
    """Bytes from elsewhere never raise anything but ContractError."""
    for decode in (token_log.decode_items, codec.decode_frame):
        try:
            decode(data)
        except ContractError:
            pass


def test_oversized_message_is_refused_before_parsing() -> None:
    """The size cap is checked first."""
    with pytest.raises(ContractError, match="at most"):
        token_log.decode_items(bytes(codec.MAX_MESSAGE_BYTES + 1))


def test_terminal_kind_is_seen_without_parsing() -> None:
    """The scripts look at the kind byte only."""
    assert not codec.is_terminal(codec.encode_frame(make_step(1)))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("unix:///run/a.sock", {"unix_socket_path": "/run/a.sock"}),
        ("redis://user:secret@host:7000/3", {"host": "host", "port": 7000, "db": 3, "username": "user"}),
        ("rediss://host:7001", {"host": "host", "port": 7001, "ssl": True}),
    ],
)
def test_connection_options_follow_the_url(url: str, expected: dict[str, Any]) -> None:
    """Socket, address, database, credentials and TLS come from the URL; retries are always on."""
    options = connection_options(url)
    assert expected.items() <= options.items()
    assert options["retry"] is not None
