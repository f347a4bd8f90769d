"""A rollout's texts in lines for a terminal."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from agl.cli.terminal import counted, printable
from agl.inspection.transcript import Said

_MAX_CHARS: Final = 1200
_MAX_LINES: Final = 24
_LABEL_WIDTH: Final = 9


def lines_of(texts: Sequence[Said], indent: str, width: int) -> Iterator[str]:
    """`texts` in lines of at most `width` characters, the label in front; long texts are cut, with what is left out."""
    room = max(width - len(indent) - _LABEL_WIDTH - 1, 20)
    for label, text in texts:
        lines = [part for line in text[:_MAX_CHARS].splitlines() for part in _wrapped(line, room)]
        left = len(text) - sum(map(len, lines[:_MAX_LINES]))
        cut = [f"... {counted(left, 'more character')}; --json has all"] if len(lines) > _MAX_LINES else []
        if len(text) > _MAX_CHARS and not cut:
            cut = [f"... {counted(len(text) - _MAX_CHARS, 'more character')}; --json has all"]
        labels = [printable(label, _LABEL_WIDTH)]
        for line in [*lines[:_MAX_LINES], *cut] or [""]:
            yield f"{indent}{labels.pop() if labels else '':{_LABEL_WIDTH}} {line}".rstrip()


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(printable(line), width, replace_whitespace=False, drop_whitespace=False) or [""]
