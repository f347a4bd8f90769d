"""`tls`: certificate and key of a server."""

from agl.config.section import FilePath, Section


class TlsConfig(Section):
    """Paths of PEM files."""

    certificate: FilePath
    """The certificate, followed by its chain of intermediate certificates."""
    key: FilePath
    client_ca: FilePath | None = None
    """Certificate authority of the clients; without it clients need no certificate."""
