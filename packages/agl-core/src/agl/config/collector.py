"""`collector`: the OTLP receivers and their limits."""

from pathlib import Path
from typing import Final, Self

from pydantic import model_validator

from agl.config.section import Count, Section
from agl.config.tls import TlsConfig

TOKEN_VARIABLE: Final = "AGL_TOKEN"
"""Environment variable of the token, for servers and clients; unlike an argument, other users cannot see it."""


class CollectorConfig(Section):
    """What receives spans, over OTLP/HTTP and OTLP/gRPC (`agl serve`)."""

    max_body_bytes: Count = 64 * 2**20
    """Largest request, after decompression."""
    max_pending_bytes: Count = 128 * 2**20
    """Most bytes of requests that are not committed yet; above it senders are asked to send again."""
    token_file: Path | None = None
    """Bearer tokens, one a line, beside `--token`; a request needs one of them."""
    tls: TlsConfig | None = None

    @model_validator(mode="after")
    def _leave_room(self) -> Self:
        if self.max_pending_bytes < 2 * self.max_body_bytes:
            raise ValueError("max_pending_bytes must be twice max_body_bytes: a body is held compressed and plain")
        return self
