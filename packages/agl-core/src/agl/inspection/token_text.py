"""The text of each token, by the tokenizer that a training left in its folder."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

TOKENIZER: Final = "tokenizer.json"
"""File in the folder of a run, in the format of the package `tokenizers`."""


def tokenizer_in(folder: str | None) -> tuple[Any, str | None]:
    """The tokenizer of the run in `folder`; else None and why."""
    if folder is None:
        return None, "the store knows no training run of this rollout, so only the ids of its tokens are known"
    path = Path(folder) / TOKENIZER
    try:
        return _load(str(path), path.stat().st_mtime_ns), None
    except ImportError:
        return None, "install the package `tokenizers` to see the text of each token"
    except Exception as error:  # noqa: BLE001 - the package raises Exception itself for a file that it cannot read
        return None, f"the tokenizer of the run cannot be read, so only the ids of its tokens are known: {error}"


@lru_cache(maxsize=4)
def _load(path: str, _changed_ns: int) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[str | None]:
    """The text that each token adds; empty for a token that ends within a character."""
    if tokenizer is None:
        yield from [None] * len(ids)
        return
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    for token in ids:
        yield stream.step(tokenizer, token) or ""
