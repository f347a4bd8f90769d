"""Ctrl-C or SIGTERM during a command: the first ends it in order, the second at once."""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def on_signals(stop: Callable[[], None]) -> None:
    """Have each Ctrl-C and SIGTERM call `stop`."""
    for number in _SIGNALS:
        signal.signal(number, lambda *_: stop())


@contextmanager
def stops_in_order(line: str) -> Iterator[None]:
    """The first signal writes `line` and interrupts the block, the second one ends the process.

    In between, logs and warnings are muted: they are about the work that is cut short.
    """

    def stop(*_: Any) -> None:
        for number in _SIGNALS:
            signal.signal(number, lambda *_: os._exit(INTERRUPTED))
        logging.disable()
        warnings.simplefilter("ignore")
        # Not through `sys.stderr`, which the interrupted code may be writing to.
        os.write(2, f"{chr(10) if os.isatty(2) else ''}{line}; Ctrl-C again ends at once\n".encode())
        raise KeyboardInterrupt

    muted = logging.root.manager.disable
    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.disable(muted)
        for number, handler in before.items():
            signal.signal(number, handler)
