"""`tls`: certificate and key of a server."""

from pathlib import Path

from agl.config.section import Section


class TlsConfig(Section):
    """Paths of PEM files."""

    certificate: Path
    """The certificate, followed by its chain of intermediate certificates."""
    key: Path
    client_ca: Path | None = None
    """Certificate authority of the clients; without it clients need no certificate."""
