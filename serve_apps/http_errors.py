"""Refusals as HTTP: the OpenAI error body on ``/v1``, problem+json (RFC 9457) elsewhere."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from attribution.errors import Refusal, Rejected, Unavailable

log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_NO_FIELDS = ("body", "str", "int", "float", "NamedTool")  # the branches of unions; lists have a bracket
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "body_too_slow", 413: "body_too_large"}


def status_of(refusal: Refusal) -> int:
    if isinstance(refusal, Rejected):
        return refusal.http_status
    return 503 if isinstance(refusal, Unavailable) else 500


def openai_error(refusal: Refusal) -> dict[str, Any]:
    status = status_of(refusal)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": refusal.message, "type": kind, "param": refusal.field or None, "code": refusal.code}
    return {"error": error}


def problem(refusal: Refusal) -> dict[str, Any]:
    body = {
        "type": "about:blank",
        "title": refusal.code,
        "status": status_of(refusal),
        "detail": refusal.message,
    }
    return {**body, "code": refusal.code, "field": refusal.field}


def respond(request: Request, refusal: Refusal) -> JSONResponse:
    headers = {}
    if isinstance(refusal, Unavailable):
        headers["Retry-After"] = str(max(1, round(refusal.retry_after_s)))
    if status_of(refusal) == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if request.url.path.startswith("/v1/"):
        return JSONResponse(openai_error(refusal), status_of(refusal), headers)
    return JSONResponse(problem(refusal), status_of(refusal), headers, media_type="application/problem+json")


def install(app: FastAPI) -> None:
    """Every error of ``app`` leaves in one of the two shapes; what nobody foresaw is logged, not shown."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        if status_of(error) == 500:
            log.error("%s %s: %s", request.method, request.url.path, error.message)
        return respond(request, error)

    async def malformed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        field = ".".join(
            str(part) for part in first["loc"] if part not in _NO_FIELDS and "[" not in str(part)
        )
        unknown = first["type"] == "extra_forbidden"
        code = "unknown_parameter" if unknown else "invalid_value"
        return respond(request, Rejected(code, f"{field or 'body'}: {first['msg']}", field=field))

    async def routed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = _CODES.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return respond(request, Rejected(code, message, http_status=error.status_code))

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        body = Unavailable("internal_error", "something failed here; it is logged")
        return JSONResponse(openai_error(body), 500)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, routed)
    app.add_exception_handler(Exception, unforeseen)
