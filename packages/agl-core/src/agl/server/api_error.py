"""Errors that a server answers with, in the form that clients of OpenAI's API read."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from agl.errors import AglError, GatewayError

_SERVER_ERROR = 500


class ApiError(GatewayError):
    """A request fails with this HTTP status, message, and code for programs.

    `retry_after_s`: seconds after which the client may repeat the same request; None: no hint.
    """

    def __init__(self, http_status: int, code: str, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.http_status = http_status
        self.code = code
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: AglError) -> "ApiError":
        """`error` itself, or a 500 with its message."""
        return error if isinstance(error, ApiError) else cls(_SERVER_ERROR, "gateway_error", str(error))

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.http_status >= _SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.http_status, self.headers())


def error_in(body: Any) -> ApiError | None:
    """The error that an engine's JSON holds, whatever its HTTP status; None if it holds none.

    The forms of OpenAI (`{"error": ...}`), of older engines (`{"object": "error", ...}`) and of FastAPI (`detail`). An
    error without a status of its own is the engine's: 502.
    """
    if not isinstance(body, dict):
        return None
    error = body.get("error") or (body if body.get("object") == "error" or body.keys() == {"detail"} else None)
    if not error:
        return None
    fields = error if isinstance(error, dict) else {}
    message, status = fields.get("message") or fields.get("detail") or error, fields.get("code")
    if not isinstance(status, int) or not 400 <= status < 600:
        status = 502
    return ApiError(status, "engine_error" if status >= _SERVER_ERROR else str(status), str(message))


def error_text(body: bytes) -> str:
    """The message of the body of an error response; of one in no known form, its start."""
    try:
        error = error_in(json.loads(body))
    except (ValueError, RecursionError):
        error = None
    return str(error) if error else body[:1000].decode(errors="replace")


async def unknown_route(request: Request, error: Exception) -> JSONResponse:
    """Starlette exception handler for a path or method without a route (HTTPException 404 or 405)."""
    message = f"the gateway does not serve {request.method} {request.url.path}"
    response = ApiError(getattr(error, "status_code", _SERVER_ERROR), "unknown_url", message).response()
    response.headers.update(getattr(error, "headers", None) or {})  # `Allow`, which a 405 must have.
    return response
