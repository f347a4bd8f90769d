"""TLS of a server: the configured files in the form that its ports need, and the handshakes of HTTP connections."""

import asyncio
import os
import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Final

import grpc

from agl.config import TlsConfig
from agl.errors import ConfigError
from agl.server.protocol import HttpProtocol

HANDSHAKE_S: Final = 10.0
_SHUTDOWN_S: Final = 5.0


class TlsProtocol(asyncio.Protocol):
    """The TLS handshake of a connection, which `http` serves afterwards.

    While it lasts, at most HANDSHAKE_S seconds, `http.peers` may close the connection like one that waits for a head.
    """

    context: ClassVar[ssl.SSLContext]
    http: ClassVar[type[HttpProtocol]]

    def __init__(self, **options: Any) -> None:
        self._new_http = partial(self.http, **options)
        self.peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        address = transport.get_extra_info("peername")
        self.peer = address[0] if address else ""
        # The transport has read nothing yet, and does no handshake: one with TLS takes its socket over.
        connection = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        transport.close()
        self._handshake = asyncio.get_running_loop().create_task(self._shake_hands(connection))
        self.http.peers.wait(self)
        self.http.peers.open()

    async def _shake_hands(self, connection: socket.socket) -> None:
        times = {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": _SHUTDOWN_S}
        try:
            with suppress(OSError):
                loop = asyncio.get_running_loop()
                await loop.connect_accepted_socket(self._new_http, connection, ssl=self.context, **times)
        finally:
            self.http.peers.proceed(self)
            self.http.peers.close()

    def abort(self) -> None:
        self._handshake.cancel()


def grpc_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Credentials of `grpc.Server`. Raises ConfigError if the files cannot be loaded together."""
    server_context(tls)
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=tls.client_ca.read_bytes() if tls.client_ca else None,
        require_client_auth=tls.client_ca is not None,
    )


def server_context(tls: TlsConfig) -> ssl.SSLContext:
    """Settings of an HTTP server. Raises ConfigError if the files cannot be loaded together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password, here the empty one, OpenSSL asks for it on the terminal.
        context.load_cert_chain(tls.certificate, tls.key, password="")
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError.
        files = ", ".join(str(path) for path in (tls.certificate, tls.key, tls.client_ca) if path)
        raise ConfigError(f"tls: {files} cannot be used: {error}") from error
    return context
