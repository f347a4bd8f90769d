"""Ctrl-C and SIGTERM: the first ends a command in order and without noise, the second at once."""

import signal
import subprocess
import sys
import time

import pytest

COMMAND = """
import logging, sys, time, warnings
from agl.cli.interrupt import stops_in_order
try:
    with stops_in_order("stopping"):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            logging.error("a call was cut short")
            warnings.warn("a coroutine was never awaited")
            time.sleep(float(sys.argv[1]))
except KeyboardInterrupt:
    logging.error("this is news again")
    sys.exit(130)
"""


def start(cleanup_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, str(cleanup_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_prints_one_line_and_lets_the_block_clean_up(number: signal.Signals) -> None:
    process = start(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines() == ["stopping; Ctrl-C again ends at once", "ERROR:root:this is news again"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once(number: signal.Signals) -> None:
    process = start(60)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None and process.stderr.readline().startswith("stopping")
    sent = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == 130 and time.monotonic() - sent < 20
    process.communicate()
