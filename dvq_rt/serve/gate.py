"""What every request passes on its way in and out: its id, the key, the headers, a line in the log, the counters."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dvq_rt.serve.errors import GONE, ApiError, api_error
from dvq_rt.serve.metrics import Metrics

LOG = logging.getLogger("dvq_rt.serve")
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN_PATHS = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")
"""For which no key is needed, with what lies under /page/."""
FOREIGN = ("cross-site", "same-site")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class JsonLines(logging.Formatter):
    """A log in which each line is a JSON object: time, level, logger, message, the request's id, and what the record
    has as ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": REQUEST_ID.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value is not None}, ensure_ascii=True)


class Gate:
    """The outermost application.

    Args:
        app: what answers.
        key: that a client must know; None for no key.
        metrics: counters.
    """

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics) -> None:
        self.app, self.key, self.metrics = app, key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        identity = given if GIVEN_ID.fullmatch(given) else secrets.token_hex(8)
        token = REQUEST_ID.set(identity)
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "X-Request-Id": identity}.items():
                    answer[name] = value
            await send(message)

        fields: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = fields
        try:
            try:
                self._check(scope, headers)
                await self.app(scope, receive, send_on)
            except Exception as error:
                if "error" not in fields:  # else the application has told it already
                    answer = refusal(scope, error, self.metrics)
                    if not status:
                        await answer.response()(scope, receive, send_on)
        except asyncio.CancelledError:
            status = GONE
            raise
        finally:
            seconds = time.perf_counter() - began
            path = route_path(scope)
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            line = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4), **fields}
            LOG.info("request", extra={"fields": line})
            REQUEST_ID.reset(token)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """
        Raises:
            ApiError: the key is missing or wrong, or the page of another site sent the request.
        """
        site, origin = (
            headers.get("sec-fetch-site"),
            headers.get("origin"),
        )  # the first comes by https and to loopback alone
        foreign = origin and urlsplit(origin).netloc != headers.get("host") if site is None else site in FOREIGN
        if foreign and scope["method"] not in ("GET", "HEAD"):
            raise ApiError(403, "pages of other sites may not use this server; call it from your own server instead")
        path = scope["path"]
        if self.key is None or path in OPEN_PATHS or path.startswith("/page/"):
            return
        scheme, _, word = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(word.strip().encode(), self.key.encode()):
            raise ApiError(
                401,
                "the key is missing or wrong; send the header Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def refusal(scope: MutableMapping[str, Any], error: Exception, metrics: Metrics) -> ApiError:
    """The answer to an exception, which is counted and logged."""
    answer = api_error(error)
    if answer.code == "internal_error":
        LOG.error("the request failed", exc_info=error)
    metrics.errors.labels(answer.code or answer.kind).inc()
    scope["state"]["log"]["error"] = answer.message
    return answer


def route_path(scope: MutableMapping[str, Any]) -> str:
    """The path of a request as its route is declared, so that there are few of them; ``other`` for unknown ones."""
    return str(getattr(scope.get("route"), "path", "other"))
