"""An unmodified program as an agent."""

import asyncio
import json
import os
import shlex
import shutil
import signal
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import agl
from agl.context import current_rollout
from agl.errors import AgentError, ConfigError
from agl.runner.child import child_command
from agl.runner.log_events import record_line

_TAIL_LINES: Final = 20
_MAX_LINE: Final = 16 * 2**20
_MAX_VARIABLE: Final = 120_000
"""Linux refuses an environment variable of 128 KiB and more."""
_PIPES_S: Final = 5.0
"""Longest wait for output after the end of the program."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where an agent sends its model calls and its spans."""

    gateway: str
    """Base URL without `/v1`."""
    collector: str
    token: str = ""
    """That gateway and collector ask for, if they do."""

    def variables(self, path: str = "") -> dict[str, str]:
        """Environment variables for the process of an agent function; `path` is that of the rollout in the gateway."""
        base_url = f"{self.gateway}{path}/v1"
        header = f"authorization={quote(f'Bearer {self.token}', safe='')}"
        headers = {"OTEL_EXPORTER_OTLP_HEADERS": header} if self.token else {}
        return {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": self.token or "agl", **headers}

    def all_variables(self, path: str) -> dict[str, str]:
        """Those for a program of its own, which may have an old client, and its own exporter of spans."""
        variables = self.variables(path)
        return variables | {
            "OPENAI_API_BASE": variables["OPENAI_BASE_URL"],
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.collector,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }


@dataclass(frozen=True, slots=True)
class Command:
    """Runs `arguments` for each task; the answer is the last line of its standard output, None without output.

    The program reads the task as JSON from its standard input or from `AGL_TASK`, and finds the gateway in the usual
    variables, as a URL that names rollout and attempt. Its output is recorded as events of the rollout's span. An exit
    code other than 0 raises AgentError with the end of its standard error. A cancellation kills the program, and its
    end what it has started.
    """

    arguments: tuple[str, ...]
    addresses: Addresses
    memory_bytes: int = 0

    @classmethod
    def parse(cls, text: str, addresses: Addresses, memory_bytes: int = 0) -> "Command":
        """From a command line as in a shell, without a shell's operators. Raises ConfigError if there is no program."""
        try:
            arguments = tuple(shlex.split(text))
        except ValueError as error:
            raise ConfigError(f"train.command: {text}: {error}") from error
        if not arguments:
            raise ConfigError("train.command is empty; write e.g. `python my_agent.py`")
        if shutil.which(arguments[0]) is None:
            raise ConfigError(
                f"train.command: there is no program {arguments[0]!r} on PATH or in {os.getcwd()}; install it on this "
                "machine, or name its path"
            )
        # The first one: a later one may be a file that the program writes. With a space it may be a line of `sh -c`.
        script = next((name for name in arguments[1:] if name.endswith((".py", ".sh", ".js"))), None)
        if script and " " not in script and not Path(script).exists():
            raise ConfigError(f"train.command: there is no file {script!r} in {os.getcwd()}; run it in its folder")
        return cls(arguments, addresses, memory_bytes)

    async def __call__(self, task: Any) -> str | None:
        command = child_command(self.arguments, memory_bytes=self.memory_bytes)
        text = json.dumps(task)
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment(text)},
            start_new_session=True,
        )
        out_and_err = (_follow(process.stdout, "stdout"), _follow(process.stderr, "stderr"))
        talk = asyncio.gather(_write(process, text), *out_and_err)
        try:
            while not talk.done() and process.returncode is None:  # What it has started may keep the pipes open.
                await asyncio.wait({talk}, timeout=0.2)
            if talk.done():
                talk.result()
                await process.wait()
            _kill(process)
            _, out, err = await asyncio.wait_for(talk, _PIPES_S)
        except TimeoutError as error:
            process._transport.close()  # type: ignore[attr-defined]  # asyncio has no other way to close the pipes
            raise AgentError(
                f"{self.arguments[0]} ended, but its output did not within {_PIPES_S:g} s: what it started in a "
                "session of its own (setsid) holds it, and may still run; give that another output"
            ) from error
        finally:
            _kill(process)
            talk.cancel()
        if process.returncode:
            raise AgentError(f"{self.arguments[0]} {_ended(process.returncode)}: {' | '.join(err) or 'no message'}")
        return out[-1] if out else None

    def _environment(self, task: str) -> dict[str, str]:
        active = current_rollout()
        ids = (active.rollout_id, active.attempt_id) if active else ()
        path = "/rollout/{}/attempt/{}".format(*(quote(name, safe="") for name in ids)) if ids else ""
        variables = self.addresses.all_variables(path) | agl.environment()
        if len(task.encode()) < _MAX_VARIABLE:
            return variables | {"AGL_TASK": task}
        record_line("agl", "warning", f"AGL_TASK is not set: the task has {len(task)} characters; read standard input")
        return variables


async def _write(process: asyncio.subprocess.Process, text: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError, ConnectionResetError):  # A program need not read it.
        process.stdin.write(text.encode())
        await process.stdin.drain()
    process.stdin.close()


async def _follow(stream: asyncio.StreamReader | None, source: str) -> deque[str]:
    """Record the lines of `stream` as they come; returns the last ones that are not empty."""
    assert stream is not None
    last: deque[str] = deque(maxlen=_TAIL_LINES)
    async for line in _lines(stream):
        if line.strip():
            last.append(line)
            record_line(source, "info", line)
    return last


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    rest = bytearray()
    while chunk := await stream.read(2**16):
        rest += chunk
        if b"\n" in chunk:
            *lines, last = rest.split(b"\n")
            for line in lines:
                yield line.decode(errors="replace").rstrip("\r")
            rest = bytearray(last)
        if len(rest) > _MAX_LINE:
            raise AgentError(f"it wrote a line of more than {_MAX_LINE} bytes")
    if rest:
        yield rest.decode(errors="replace")


def _kill(process: asyncio.subprocess.Process) -> None:
    """End the process and all of its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _ended(code: int) -> str:
    return f"exited with {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
