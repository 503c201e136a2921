"""What a client is told when something is wrong: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from runtimes.errors import BackendError, ClosedError, DvqError, EngineError, short

INVALID = "invalid_request_error"
GONE = 499
"""Status in the log of a request whose client has left."""
RESTART_SECONDS = 5
"""After which a client that met a closing server may find another one in its place."""


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        message: what is wrong, and the way out.
        kind: a class of errors, as OpenAI's API names them.
        code: one word for programs.
        param: the field of the request that is wrong.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def closing() -> ApiError:
    headers = {"Retry-After": str(RESTART_SECONDS)}
    message = f"the server is closing; try another one, or this one again in {RESTART_SECONDS} s"
    return ApiError(503, message, kind="server_error", code="closing", headers=headers)


def api_error(error: Exception) -> ApiError:
    """The answer to any exception. The text of one that is the server's own fault stays in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClosedError):
        return closing()
    if isinstance(error, ClientDisconnect):
        return ApiError(GONE, "the client has gone", code="client_gone")
    if isinstance(error, HTTPException):
        message = {
            404: "there is nothing under this path; /docs lists what there is",
            405: "this path takes another method; /docs lists what there is",
        }.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, code=str(error.detail).lower().replace(" ", "_"))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return ApiError(400, f"{where} is {short(first.get('input'))}: {first['msg']}", param=where, code=first["type"])
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=True)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        message = f"{where} is {short(first['input'])}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            message = f"{where} is no field of this request; leave it out. /docs lists the fields"
        if first["type"] == "json_invalid":
            message = f"the body is no JSON: {first['msg']}"
        return ApiError(400, message, param=where, code=first["type"])
    if isinstance(error, DvqError) and not isinstance(error, EngineError | BackendError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(
        500,
        "the engine failed on this request; try again, and if it fails again ask whoever runs this server to look "
        "for the request's id (header X-Request-Id) in the log",
        kind="server_error",
        code="internal_error",
    )
