"""Errors of the gateway itself, as an OpenAI client reads them."""

from starlette.requests import Request
from starlette.responses import JSONResponse

from agl.capture import Json
from agl.errors import GatewayError

_SERVER_ERROR = 500


class Refusal(GatewayError):
    """Why a call is not answered: HTTP status, message and a code for programs."""

    def __init__(self, http_status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.http_status = http_status
        self.code = code

    def body(self) -> Json:
        kind = "server_error" if self.http_status >= _SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.http_status)


async def refuse_route(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for paths and methods that no route has (Starlette's HTTPException)."""
    status = getattr(error, "status_code", _SERVER_ERROR)
    refusal = Refusal(status, "unknown_url", f"the gateway does not serve {request.method} {request.url.path}")
    return refusal.response()
