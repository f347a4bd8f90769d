"""`tls`: certificate and key of a port."""

from pathlib import Path

from agl.config.section import Section


class TlsConfig(Section):
    """PEM files."""

    certificate: Path
    """The certificate, followed by those that it rests on."""
    key: Path
    client_ca: Path | None = None
    """Who signs the certificates of senders; without one senders need none."""
