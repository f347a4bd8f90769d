"""Ports for servers of the tests."""

import socket


def free_port() -> int:
    """One that nothing has, on any address of this machine: several servers may take it, each on one of its own."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
