"""The text of each token, by the tokenizer that a training left in its folder."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

_TOKENIZER: Final = "tokenizer.json"
"""File in the folder of a run, in the format of the package `tokenizers`. If the run has several base models, there is
one for each role, which begins with its name."""


def tokenizer_file(role: str | None) -> str:
    """Name of the file of `role`, of all roles if None."""
    return Path(f"{role}.{_TOKENIZER}").name if role else _TOKENIZER


def tokenizer_in(folder: str | None, role: str | None = None) -> tuple[Any, str | None]:
    """The tokenizer of `role` in the run in `folder`; else None and why."""
    if folder is None:
        return None, "the store knows no training run of this rollout, so only the ids of its tokens are known"
    of_role = Path(folder) / tokenizer_file(role)
    path = of_role if of_role.exists() else Path(folder) / tokenizer_file(None)
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
