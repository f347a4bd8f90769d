"""The process of a writer, which `WriterPool` starts. Reads its settings from stdin, and ends when stdin is closed.

So it ends with the pool, also if the pool is killed, and the list of processes shows no password.
"""

import json
import os
import sys
import threading
from contextlib import closing

from agl.config.queue import QueueConfig
from agl.errors import AglError
from agl.queue.queue import SpanQueue
from agl.queue.writer import Writer
from agl.store import open_store


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    stop = threading.Event()
    threading.Thread(target=_wait_for_close, args=(stop,), daemon=True).start()
    config = QueueConfig.model_validate(settings["config"])
    try:
        with (
            closing(SpanQueue(settings["queue"], config)) as queue,
            closing(open_store(settings["store"])) as store,
            closing(Writer(settings["name"], queue, store, config, samples=settings["samples"])) as writer,
        ):
            writer.run(stop)
    except AglError as error:
        sys.exit(f"agl.queue: the writer {settings['name']} ends: {error}")


def _wait_for_close(stop: threading.Event) -> None:
    while os.read(0, 1):
        pass
    stop.set()


main()
