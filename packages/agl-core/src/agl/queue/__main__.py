"""A writer in a process of its own, as `WriterPool` starts it: told what to do on stdin, it ends when stdin does.

So it ends with the pool, however that one ends; and no password stands in the list of processes.
"""

import json
import os
import sys
import threading
from contextlib import closing

from agl.config import QueueConfig
from agl.errors import AglError
from agl.queue.queue import SpanQueue
from agl.queue.writer import Writer
from agl.store import open_store


def main() -> None:
    told = json.loads(sys.stdin.buffer.readline())
    stop = threading.Event()
    threading.Thread(target=_await_end, args=(stop,), daemon=True).start()
    config = QueueConfig.model_validate(told["config"])
    try:
        with closing(SpanQueue(told["queue"], config)) as queue, closing(open_store(told["store"])) as store:
            Writer(told["name"], queue, store, config).run(stop)
    except AglError as error:
        sys.exit(f"agl.queue: the writer {told['name']} ends: {error}")


def _await_end(stop: threading.Event) -> None:
    while os.read(0, 1):
        pass
    stop.set()


main()
