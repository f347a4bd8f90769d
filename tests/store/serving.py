"""`agl serve` in a separate process."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AGL = Path(sys.executable).with_name("agl")


@contextmanager
def serving(uri: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Process of a server of the store at `uri`, and the URL of its OTLP/HTTP receiver. Killed at the end."""
    ports = ("--port", "0", "--otlp-http-port", "0", "--otlp-grpc-port", "0")
    process = subprocess.Popen(
        [AGL, "serve", "--store", uri, *ports, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        match = re.search(r"http://\S+/v1/traces", process.stdout.readline())
        assert match is not None
        while not process.stdout.readline().startswith("waiting"):
            assert process.poll() is None
        yield process, match[0]
    finally:
        process.kill()
        process.wait()
