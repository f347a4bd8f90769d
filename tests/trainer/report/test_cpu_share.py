"""The progress shows when other programs use the CPUs."""

import io
import os
import re
import subprocess
import sys
import time

import pytest

from agl_trainer.report.cpu_share import others_share, shows_cpu_share
from agl_trainer.report.progress import Progress


def test_the_share_is_what_neither_this_program_nor_nobody_used() -> None:
    """Of 20 s on two CPUs 16 were busy, 4 of them with this program."""
    assert others_share((100.0, 50.0, 10.0), (120.0, 66.0, 14.0)) == pytest.approx(0.6)
    assert others_share((100.0, 50.0, 10.0), (120.0, 66.0, 30.0)) == 0.0
    assert others_share((100.0, 50.0, 10.0), (100.0, 50.0, 10.0)) == 0.0


def test_another_program_that_computes_is_shown() -> None:
    """It is started by a child that ends, and therefore no child of this process."""
    spin = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    start = (
        "from subprocess import *; import sys; print(Popen([sys.executable, '-c', sys.argv[1]], stdout=DEVNULL).pid)"
    )
    found = [
        int(subprocess.run([sys.executable, "-c", start, spin], stdout=subprocess.PIPE, check=True).stdout)
        for _ in os.sched_getaffinity(0)
    ]
    stream = io.StringIO()
    try:
        with Progress(stream, every_s=0) as shown, shown.phase("grpo"), shows_cpu_share(shown, every_s=0.5):
            deadline = time.monotonic() + 30
            while "cpu shared" not in stream.getvalue():
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        for process in found:
            os.kill(process, 9)
    (share, *_) = re.findall(r"cpu shared: (\d+) %", stream.getvalue())
    assert 20 <= int(share) <= 100
