"""One sequence on its way to the client: tokens from the engine become text, up to a stop string or the end."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from agl_trainer.engine.http.detokenizer import Detokenizer, StopStrings
from agl_trainer.engine.protocol import EngineError, FinishReason, Generation, SampledToken


@dataclass(frozen=True, slots=True)
class Step:
    """What one sampled token adds to a choice: the token, and the text that is certain with it.

    The last step of a choice has no token, but the text that was held back, and `finished` set.
    """

    choice: "Choice"
    text: str
    token: SampledToken | None = None
    finished: bool = False


class Choice:
    """One of the answers to a request, as far as it has come. `steps` fills it."""

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        generation: Generation,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        stop_token_ids: frozenset[int],
    ) -> None:
        self.index = index
        self.prompt_ids = list(prompt_ids)
        self.tokens: list[SampledToken] = []
        """All sampled tokens: the stop token, and those that completed a stop string, included."""
        self.text = ""
        """The answer, cut before the stop."""
        self.finish_reason: FinishReason | None = None
        self._generation = generation
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._stop_token_ids = stop_token_ids

    @property
    def version(self) -> str:
        """The policy that answers; certain from the first token on."""
        return self._generation.version

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.matched

    def cancel(self) -> None:
        """Stop sampling; harmless after the end."""
        self._generation.cancel()

    async def steps(self) -> AsyncGenerator[Step]:
        """One step for each token, and a last one. Raises EngineError when sampling fails."""
        async for token in self._generation:
            self.tokens.append(token)
            piece = "" if token.token_id in self._stop_token_ids else self._detokenizer.feed(token.token_id)
            yield self._step(self._stops.feed(piece), token)
            if self._stops.matched is not None:
                break
        yield self._last_step()

    def _last_step(self) -> Step:
        rest = self._stops.feed(self._detokenizer.finish()) + self._stops.finish()
        self.finish_reason = "stop" if self._stops.matched is not None else self._generation.finish_reason
        if self.finish_reason is None:
            raise EngineError(f"{self.version} was stopped after {len(self.tokens)} tokens, before its answer ended")
        self.cancel()  # a stop string may have come where the engine would go on
        return self._step(rest, finished=True)

    def _step(self, text: str, token: SampledToken | None = None, finished: bool = False) -> Step:
        self.text += text
        return Step(self, text, token, finished)


async def run(choices: Sequence[Choice]) -> AsyncGenerator[Step]:
    """Steps of all choices as they come. However it ends, nothing is left sampling."""
    streams = {choice.index: choice.steps() for choice in choices}
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in streams.items()}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                step = task.result()
                if step.finished:
                    await streams[index].aclose()
                else:
                    waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield step
    finally:
        cancel(choices)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def cancel(choices: Iterable[Choice]) -> None:
    """Stop sampling all of them; harmless after the end."""
    for choice in choices:
        choice.cancel()
