"""The reward of Python code: whether it runs, and the share of its tests that it passes, in a sandbox."""

import json
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

from agl.errors import RewardError
from agl.rewards.combinators import find
from agl.rewards.sandbox import Sandbox, SandboxKind, SandboxLimits
from agl.rewards.score import ScoredRollout

_FENCE = re.compile(r"```(?:\w*[^\S\n]*\n)?(.*?)(?:```|\Z)", re.DOTALL)
_HARNESS: Final = """
import json, os, sys
spec = json.load(sys.stdin)
report = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
passed = []
for test in spec["tests"]:
    read, write = os.pipe()
    answers, asks = os.pipe()
    child = os.fork()
    if not child:
        os.close(report), os.close(read), os.close(asks)
        space = {"__name__": "solution"}
        exec(compile(spec["code"], "solution.py", "exec"), space)
        exec(compile(test, "test.py", "exec"), space)
        # Only now does this process learn the word that reports success: code that exits early does not know it.
        os.write(write, b"?")
        os.write(write, os.read(answers, 64))
        os._exit(0)
    os.close(write), os.close(answers)
    if os.read(read, 1) == b"?":
        word = os.urandom(16).hex().encode()
        os.write(asks, word)
        passed.append(os.read(read, 64) == word)
    else:
        passed.append(False)
    os.close(read), os.close(asks)
    try:
        os.kill(child, 9)
    except ProcessLookupError:
        pass
    os.waitpid(child, 0)
os.write(report, json.dumps({"word": spec["word"], "passed": passed}).encode())
"""


class CodeTests:
    """Scorer of the parts runs (1 if the code runs without an error) and tests (share of the tests that pass).

    The code runs alone in one sandbox, and again with the tests in a second, fresh one, so that nothing that it left
    behind is there. `tests` finds a list of Python statements in the task, e.g. `assert add(2, 3) == 5`; each runs in a
    process of its own, after the code. Of an answer with a ``` fence the first fenced block is the code.

    The sandbox protects the machine. It does not keep code from cheating its tests by what Python allows, such as an
    object that equals everything: look at what earns 1. Raises RewardError if the sandbox cannot run here.
    """

    def __init__(
        self,
        *,
        tests: Callable[[Any], Sequence[str]] | str = "tests",
        answer: Callable[[Any], str] | str | None = None,
        sandbox: SandboxKind = "bubblewrap",
        limits: SandboxLimits | None = None,
    ) -> None:
        self._tests, self._answer = tests, answer
        self._sandbox = Sandbox(sandbox, limits)

    def __call__(self, task: Any, answer: Any, rollout: ScoredRollout | None = None) -> dict[str, float]:
        tests = find(task, self._tests, "task")
        tests = [tests] if isinstance(tests, str) else list(tests)
        if not tests:
            raise RewardError("the task has no tests, expected at least one Python statement")
        text = str(find(answer, self._answer, "answer") or "")
        fence = _FENCE.search(text)
        code = fence[1] if fence else text
        runs = bool(code.strip()) and self._sandbox.run(code).code == 0
        passed = self._passed(code, tests) if runs else [False] * len(tests)
        return {"runs": float(runs), "tests": sum(passed) / len(tests)}

    def _passed(self, code: str, tests: Sequence[str]) -> list[bool]:
        word = secrets.token_hex(16)
        spec = {"code": code, "tests": tests, "word": word}
        ended = self._sandbox.run(_HARNESS, json.dumps(spec).encode())
        try:
            report = json.loads(ended.output)
            passed = [result is True for result in report["passed"]]
        except (ValueError, LookupError, TypeError):  # it ran out of time, or the code killed its tests
            return [False] * len(tests)
        return passed if report["word"] == word and len(passed) == len(tests) else [False] * len(tests)
