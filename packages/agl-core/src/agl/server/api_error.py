"""Errors that a server answers with, in the form that clients of OpenAI's API read."""

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


def error_message(error: Any) -> str:
    """The message in the `error` field of an OpenAI-style error body."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


async def unknown_route(request: Request, error: Exception) -> JSONResponse:
    """Starlette exception handler for a path or method without a route (HTTPException 404 or 405)."""
    message = f"the gateway does not serve {request.method} {request.url.path}"
    return ApiError(getattr(error, "status_code", _SERVER_ERROR), "unknown_url", message).response()
