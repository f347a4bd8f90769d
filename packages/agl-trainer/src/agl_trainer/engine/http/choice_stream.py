"""Turns the sampled tokens of one choice into text, up to a stop string or the end of the sequence."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from agl_trainer.engine.http.detokenizer import Detokenizer, StopStrings
from agl_trainer.engine.protocol import EngineError, FinishReason, Generation, SampledToken


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """A sampled token and the text that it completes; the last delta has the text withheld until then and no token."""

    choice: "ChoiceStream"
    text: str
    token: SampledToken | None = None
    is_last: bool = False


class ChoiceStream:
    """One choice of a response. Iterating `deltas` fills in its tokens, text and finish reason."""

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
        """All sampled tokens, including a stop token and the tokens of a stop string."""
        self.text = ""
        """The text before the stop string or stop token."""
        self.finish_reason: FinishReason | None = None
        self._generation = generation
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._stop_token_ids = stop_token_ids

    @property
    def version(self) -> str:
        """The policy version that samples the choice; final once the first token has arrived."""
        return self._generation.version

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the choice."""
        return self._stops.matched

    def cancel(self) -> None:
        """Stop sampling; has no effect after the end."""
        self._generation.cancel()

    async def deltas(self) -> AsyncGenerator[ChoiceDelta]:
        """One delta for each token, then the last one. Raises EngineError if sampling fails."""
        async for token in self._generation:
            self.tokens.append(token)
            piece = "" if token.token_id in self._stop_token_ids else self._detokenizer.feed(token.token_id)
            yield self._delta(self._stops.feed(piece), token)
            if self._stops.matched is not None:
                break
        yield self._last_delta()

    def _last_delta(self) -> ChoiceDelta:
        rest = self._stops.feed(self._detokenizer.finish()) + self._stops.finish()
        self.finish_reason = "stop" if self._stops.matched is not None else self._generation.finish_reason
        if self.finish_reason is None:
            raise EngineError(f"{self.version} was stopped after {len(self.tokens)} tokens, before its answer ended")
        self.cancel()  # after a stop string the engine would sample on
        return self._delta(rest, is_last=True)

    def _delta(self, text: str, token: SampledToken | None = None, is_last: bool = False) -> ChoiceDelta:
        self.text += text
        return ChoiceDelta(self, text, token, is_last)


async def merge_deltas(choices: Sequence[ChoiceStream]) -> AsyncGenerator[ChoiceDelta]:
    """Deltas of all choices as they arrive. However the generator ends, sampling of every choice is stopped."""
    streams = {choice.index: choice.deltas() for choice in choices}
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in streams.items()}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                delta = task.result()
                if delta.is_last:
                    await streams[index].aclose()
                else:
                    waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield delta
    finally:
        cancel_all(choices)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def cancel_all(choices: Iterable[ChoiceStream]) -> None:
    for choice in choices:
        choice.cancel()
