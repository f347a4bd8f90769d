"""TLS settings of a server: the configured files in the form that uvicorn and gRPC need."""

import ssl
from typing import Any

import grpc

from agl.config import TlsConfig
from agl.errors import ConfigError


def uvicorn_options(tls: TlsConfig) -> dict[str, Any]:
    """Settings of `uvicorn.Config`. Raises ConfigError if the files cannot be loaded together."""
    _check(tls)
    options = {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
    if tls.client_ca is None:
        return options
    return options | {"ssl_ca_certs": str(tls.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}


def grpc_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Credentials of `grpc.Server`. Raises ConfigError if the files cannot be loaded together."""
    _check(tls)
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=tls.client_ca.read_bytes() if tls.client_ca else None,
        require_client_auth=tls.client_ca is not None,
    )


def _check(tls: TlsConfig) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password, here the empty one, OpenSSL asks for it on the terminal.
        context.load_cert_chain(tls.certificate, tls.key, password="")
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError.
        files = ", ".join(str(path) for path in (tls.certificate, tls.key, tls.client_ca) if path)
        raise ConfigError(f"tls: {files} cannot be used: {error}") from error
