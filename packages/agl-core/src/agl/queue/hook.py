"""Notifies an autoscaler, for example, that the queue is long."""

import json
import logging
import os
import shlex
import subprocess
import threading
import urllib.request
from http.client import HTTPException
from typing import Final
from urllib.error import HTTPError, URLError

from pydantic import SecretStr

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 60


class QueueHook:
    """`target` is a URL that gets a POST with the numbers as JSON, or a command that gets them in its environment as
    `SPAN_QUEUE_LENGTH` and `SPAN_QUEUE_WRITERS`. The command runs without a shell. Logs do not show the target.
    """

    def __init__(self, target: SecretStr) -> None:
        self._target = target
        self._thread: threading.Thread | None = None

    def call(self, length: int, writers: int) -> None:
        """Call the target in the background, unless the last call still runs. Failures are logged."""
        if self._thread is None or not self._thread.is_alive():
            numbers = {"span_queue_length": length, "span_queue_writers": writers}
            self._thread = threading.Thread(target=self._notify, args=(numbers,), name="agl-queue-hook", daemon=True)
            self._thread.start()

    def _notify(self, numbers: dict[str, int]) -> None:
        target = self._target.get_secret_value()
        try:
            if target.startswith(("http://", "https://")):
                _post(target, numbers)
            else:
                _run(target, numbers)
        except (OSError, ValueError, subprocess.SubprocessError, HTTPException) as error:
            logger.warning("queue.on_queue_high failed: %s", _reason(error))


def _reason(error: Exception) -> str:
    """Without the text of `error` where it quotes the URL or the command."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"the command ended with exit code {error.returncode}"
    if isinstance(error, HTTPError):
        return f"the URL answered {error.code} {error.reason}"
    reason = error.reason if isinstance(error, URLError) else error
    return (reason.strerror if isinstance(reason, OSError) else None) or type(reason).__name__


def _post(url: str, numbers: dict[str, int]) -> None:
    request = urllib.request.Request(url, json.dumps(numbers).encode(), {"content-type": "application/json"})
    urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()


def _run(command: str, numbers: dict[str, int]) -> None:
    named = {name.upper(): str(value) for name, value in numbers.items()}
    subprocess.run(
        shlex.split(command), env=os.environ | named, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S, check=True
    )
