"""Incremental detokenization: whole characters only, and nothing that may become part of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""Written by decoders for bytes that do not form a character, or not yet."""


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], special: bool = False) -> str:
    """Text of `token_ids` without any clean-up of spaces; `special` keeps special tokens."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def overlap(text: str, patterns: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of `patterns`."""
    longest = min(len(text), max((len(pattern) for pattern in patterns), default=1) - 1)
    lengths = range(longest, 0, -1)
    return next((n for n in lengths if any(len(p) > n and p.startswith(text[-n:]) for p in patterns)), 0)


class Detokenizer:
    """Yields pieces of text whose concatenation is the text of all tokens; withholds incomplete characters.

    Each step decodes only the tokens of the last piece and the new ones. The last piece is included because some
    decoders write a token differently at the start of a text. `tokenizers.DecodeStream` is faster, but it never yields
    an incomplete character at the end, and raises an error for some byte sequences that a model may sample.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0
        """Tokens of the window whose text was yielded."""
        self._given_text = ""

    def feed(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        self._window.append(token_id)
        text = decode(self._tokenizer, self._window)
        piece = "" if text.endswith(_INCOMPLETE) else text[len(self._given_text) :]
        if piece:
            del self._window[: self._given]
            self._given = len(self._window)
            self._given_text = decode(self._tokenizer, self._window)
        return piece

    def finish(self) -> str:
        """The text still withheld: bytes that form no character, as the decoder writes them."""
        return decode(self._tokenizer, self._window)[len(self._given_text) :]


class StopStrings:
    """Cuts a text before the stop string that completes first, however the text is split into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._withheld = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def feed(self, piece: str) -> str:
        """Text that cannot be part of a stop string; empty after a match."""
        if self.matched is not None:
            return ""
        text = self._withheld + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, cut, self.matched = min(found)
        else:
            cut = len(text) - overlap(text, self._stops)
        self._withheld = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """The text still withheld, once no more text follows."""
        return "" if self.matched is not None else self._withheld
