"""A sampler that plays scripts, a small real tokenizer to write them with, and the engine's app on loopback."""

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from agl_trainer.engine.protocol import EngineError, FinishReason, SampledToken, SamplingParams, UnknownModelError

PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Knows no tools, as SmolLM2's."""

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall as <tool_call>:{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.get('tool_calls') or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Knows tools, in the manner of Qwen2.5's."""


def small_tokenizer(chat_template: str | None = PLAIN_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 400 tokens: most characters outside ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        [PLAIN_TEMPLATE, 'hello there, <tool_call>{"name": "add"}</tool_call>', "éé éé"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
        chat_template=chat_template,
    )


@dataclass
class Submitted:
    """What the app asked the sampler for, and what became of it."""

    prompt_ids: list[int]
    model: str
    params: SamplingParams
    cancelled: threading.Event = field(default_factory=threading.Event)
    played: int = 0


@dataclass(frozen=True)
class Script:
    """Token ids to play; then `error` is raised, or nothing more comes until the sequence is cancelled (`hangs`)."""

    token_ids: Sequence[int]
    error: EngineError | None = None
    hangs: bool = False


class ScriptedGeneration:
    """Plays one script."""

    def __init__(self, script: Script, submitted: Submitted) -> None:
        self._script = script
        self._submitted = submitted
        self.finish_reason: FinishReason | None = None

    @property
    def version(self) -> str:
        """As in an engine that updates its weights between a request and its first token."""
        return "writer@3" if self._submitted.played else "writer@2"

    def cancel(self) -> None:
        if self.finish_reason is None:
            self._submitted.cancelled.set()

    async def __aiter__(self) -> AsyncIterator[SampledToken]:
        params = self._submitted.params
        for number, token_id in enumerate(self._script.token_ids, start=1):
            await asyncio.sleep(0)
            if self._submitted.cancelled.is_set():
                return
            self._submitted.played = number
            stopped = token_id in params.stop_token_ids
            self.finish_reason = "stop" if stopped else "length" if number == params.max_tokens else None
            yield SampledToken(token_id, -number / 8, tuple((k + 3, -1.0 - k) for k in range(params.top_logprobs)))
            if self.finish_reason:
                return
        while self._script.hangs and not self._submitted.cancelled.is_set():
            await asyncio.sleep(0.01)
        if not self._script.hangs:
            raise self._script.error or EngineError("the script has neither a stop token nor enough tokens")


class ScriptedSampler:
    """Each submitted sequence plays the next script."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.scripts: deque[Script] = deque()
        self.submitted: list[Submitted] = []

    def reset(self) -> None:
        self.scripts.clear()
        self.submitted.clear()

    def say(self, *texts: str) -> list[list[int]]:
        """Let the next sequences answer `texts`, each ended by the stop token; returns their token ids."""
        answers = [self.ids(text + "<|im_end|>") for text in texts]
        self.scripts.extend(Script(ids) for ids in answers)
        return answers

    def ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def models(self) -> list[str]:
        return ["base", "writer", "writer@3"]

    def submit(self, prompt_ids: Sequence[int], model: str, params: SamplingParams) -> ScriptedGeneration:
        if model not in self.models():
            raise UnknownModelError(f"model {model!r} is not served here; known are {', '.join(self.models())}")
        submitted = Submitted(list(prompt_ids), model, params)
        self.submitted.append(submitted)
        return ScriptedGeneration(self.scripts.popleft(), submitted)


@contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """Run `app` on a free loopback port in a thread; yields its base URL without `/v1`."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def events(lines: Iterator[str]) -> list[dict]:
    """Chunks of a stream of server-sent events. The stream must end with `[DONE]`."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]
