"""Text from tokens as they are sampled: whole characters only, and nothing that may still become a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What decoders put for bytes that are not, or not yet, a character."""


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], special: bool = False) -> str:
    """Text of `token_ids`, spaces as they were sampled; `special` keeps special tokens."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def overlap(text: str, patterns: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins, but does not complete, one of `patterns`."""
    longest = min(len(text), max((len(pattern) for pattern in patterns), default=1) - 1)
    lengths = range(longest, 0, -1)
    return next((n for n in lengths if any(len(p) > n and p.startswith(text[-n:]) for p in patterns)), 0)


class Detokenizer:
    """Pieces whose concatenation is the text of all tokens fed; a character is held back until its last byte came.

    Each step decodes the tokens of the last piece and those after it, never the whole answer. The last piece is there
    because some decoders write a token differently at the start of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0
        self._given_text = ""

    def feed(self, token_id: int) -> str:
        """The text that this token completes, often its own, or empty."""
        self._window.append(token_id)
        text = decode(self._tokenizer, self._window)
        piece = "" if text.endswith(_INCOMPLETE) else text[len(self._given_text) :]
        if piece:
            del self._window[: self._given]
            self._given = len(self._window)
            self._given_text = decode(self._tokenizer, self._window)
        return piece

    def finish(self) -> str:
        """What is still held: bytes that never became a character, as the decoder writes them."""
        return decode(self._tokenizer, self._window)[len(self._given_text) :]


class StopStrings:
    """Cuts a text before the first stop string to complete, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def feed(self, piece: str) -> str:
        """Text that certainly belongs to the answer. After a match there is no more."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, cut, self.matched = min(found)
        else:
            cut = len(text) - overlap(text, self._stops)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """The text still held when no stop string can come any more."""
        return "" if self.matched is not None else self._held
