"""Asking our own gateway whether it can serve. Only the standard library: on the path of a cold start from nothing."""

from __future__ import annotations

import json
import os
import socket
from typing import Final

#: Set where the gateway serves TLS.
TLS_CERT: Final = "GLOWPLUG_TLS_CERT"
PROBE_LIMIT_S: Final = 1.0
MAX_ANSWER_BYTES: Final = 4096
#: Where this machine reaches a server that listens on all addresses.
LOOPBACK_OF: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def own_scheme() -> str:
    """``https`` where the gateway serves TLS."""
    return "https" if os.environ.get(TLS_CERT) else "http"


def find_what_is_missing(address: tuple[str, int]) -> str:
    """Why the gateway cannot serve yet: Redis, a scheduler or a node agent is missing; empty when it can. Blocks,
    bounded."""
    host, port = address
    try:
        with _connect(LOOPBACK_OF.get(host, host), port) as client:
            client.sendall(b"GET /readyz HTTP/1.0\r\nHost: glowplug\r\n\r\n")
            answer = client.recv(MAX_ANSWER_BYTES)
            if answer.split(b" ", 2)[1:2] == [b"200"]:
                return ""
            while len(answer) < MAX_ANSWER_BYTES and (more := client.recv(MAX_ANSWER_BYTES)):
                answer += more
    except OSError as error:
        return f"the gateway does not answer ({error})"
    try:
        return "; ".join(map(str, json.loads(answer.partition(b"\r\n\r\n")[2])["reasons"]))
    except (ValueError, LookupError, TypeError):
        return "the gateway is not ready"


def _connect(host: str, port: int) -> socket.socket:
    client = socket.create_connection((host, port), timeout=PROBE_LIMIT_S)
    if own_scheme() == "http":
        return client
    import ssl  # only who serves TLS pays for it

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the certificate is for clients to check: it is our own server
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(client)
