"""`collector`: the OTLP receivers and their limits."""

from typing import Final, Self

from pydantic import model_validator

from agl.config.section import Count, FilePath, Section
from agl.config.tls import TlsConfig

TOKEN_VARIABLE: Final = "AGL_TOKEN"
"""Environment variable of the token, for servers and clients; unlike an argument, other users cannot see it."""


class CollectorConfig(Section):
    """The receivers of spans over OTLP/HTTP and OTLP/gRPC (`agl serve`)."""

    max_body_bytes: Count = 64 * 2**20
    """Largest request body, after decompression."""
    max_pending_bytes: Count = 128 * 2**20
    """Limit on the request bytes in memory that are not committed yet; above it senders are asked to retry."""
    token_file: FilePath | None = None
    """File of bearer tokens, one per line. A request needs one of them or `--token`."""
    tls: TlsConfig | None = None

    @model_validator(mode="after")
    def _leave_room(self) -> Self:
        if self.max_pending_bytes < 2 * self.max_body_bytes:
            raise ValueError("max_pending_bytes must be twice max_body_bytes: memory holds a body compressed and plain")
        return self
