"""Headers of every answer: what browsers may not do with it, and which pages of other origins may read it."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from scheduler.gateway.settings import GatewaySettings

#: An answer of the API is no document: nothing may run, load or frame it. Source: OWASP REST Security Cheat Sheet.
FIXED_HEADERS: Final = {
    "Server": "glowplug",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
#: For our own pages: scripts and styles from this server only, none inline, never framed.
PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HSTS: Final = "max-age=31536000"
CORS_MAX_AGE_S: Final = 600
CORS_METHODS: Final = "GET, POST, DELETE, OPTIONS"
CORS_HEADERS: Final = (
    "Authorization, Content-Type, x-api-key, X-Request-Id, Last-Event-ID, traceparent, tracestate, "
    "anthropic-version, anthropic-beta, anthropic-dangerous-direct-browser-access"
)
CORS_EXPOSED: Final = (
    "X-Request-Id, X-Trace-Id, Retry-After, X-Cold-Start, Server-Timing, openai-processing-ms, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
#: Set by handlers, sent by :func:`add_response_headers`, on streams too.
RATE_LIMIT_HEADERS: Final = web.RequestKey("rate_limit_headers", dict[str, str])


def add_response_headers(request: web.Request, response: web.StreamResponse, settings: GatewaySettings) -> None:
    """Complete the headers of ``response``; what a handler set itself stays."""
    headers = response.headers
    is_page = headers.get("Content-Type", "").startswith("text/html")
    for name, value in FIXED_HEADERS.items():
        if name == "Content-Security-Policy" and is_page:
            value = PAGE_POLICY
        if name == "Server":
            headers[name] = value
        else:
            headers.setdefault(name, value)
    if settings.tls_certificate is not None:
        headers["Strict-Transport-Security"] = HSTS
    headers.update(request.get(RATE_LIMIT_HEADERS, {}))
    if settings.cors_origins:
        headers.update(cors_headers(request.headers.get("Origin"), settings.cors_origins))


def cors_headers(origin: str | None, allowed: tuple[str, ...]) -> dict[str, str]:
    """What lets a page of ``origin`` read the answer; only ``Vary`` when it may not."""
    if origin is None or (origin not in allowed and "*" not in allowed):
        return {"Vary": "Origin"}
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": CORS_EXPOSED, "Vary": "Origin"}


def is_preflight(request: web.Request) -> bool:
    """Whether a browser asks if it may send a request of another origin."""
    return request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers


def preflight_response() -> web.Response:
    """The answer to a preflight; the origin's own headers are added as to every answer."""
    return web.Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": CORS_METHODS,
            "Access-Control-Allow-Headers": CORS_HEADERS,
            "Access-Control-Max-Age": str(CORS_MAX_AGE_S),
        },
    )
