"""Ports for servers of the tests."""

import secrets
import socket

_PORTS = range(10_000, 32_768)
"""Below the ports that the kernel assigns to connections and to servers on port 0. Several test processes run at once,
and none may take a port that another has chosen but not yet bound."""


def free_port() -> int:
    """A port that is free on every address of this machine, so that several servers can share its number."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
