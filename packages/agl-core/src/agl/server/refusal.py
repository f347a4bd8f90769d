"""Errors of the gateway itself, as an OpenAI client reads them."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from agl.errors import GatewayError
from agl.tokens.capture import Json

_SERVER_ERROR = 500


class Refusal(GatewayError):
    """Why a call is not answered: HTTP status, message and a code for programs.

    `retry_after_s`: the same call may be answered that much later.
    """

    def __init__(self, http_status: int, code: str, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.http_status = http_status
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> Json:
        kind = "server_error" if self.http_status >= _SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.http_status, self.headers())


def error_message(error: Any) -> str:
    """The message of an OpenAI-style `error` value."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


async def refuse_route(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for paths and methods that no route has (Starlette's HTTPException)."""
    status = getattr(error, "status_code", _SERVER_ERROR)
    refusal = Refusal(status, "unknown_url", f"the gateway does not serve {request.method} {request.url.path}")
    return refusal.response()
