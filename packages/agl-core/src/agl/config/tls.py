"""`tls`: certificate and key of a server."""

from agl.config.section import FilePath, Section


class TlsConfig(Section):
    """Paths of PEM files."""

    certificate: FilePath
    """PEM file of the certificate, followed by its chain of intermediate certificates."""
    key: FilePath
    """PEM file of the private key of the certificate."""
    client_ca: FilePath | None = None
    """Certificate authority of the clients; without it clients need no certificate."""
