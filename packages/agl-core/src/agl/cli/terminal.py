"""Text for a terminal: aligned columns, durations, and no control characters."""

import json
import logging
import re
import unicodedata
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

_CONTROLS: Final = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
"""Characters, besides a line break, that move the cursor, change or reorder what is shown, or cannot be written."""


def stack(rows: Sequence[Sequence[str]], width: int = 80) -> list[str]:
    """`align`, with columns that exceed `width` in further tables below, each with the first column.

    A row that is empty in a table is left out of it.
    """
    labels, *columns = zip(*rows, strict=True)
    tables = [[labels]]
    for column in columns:
        if len(tables[-1]) > 1 and max(map(_width, align(list(zip(*tables[-1], column, strict=True))))) > width:
            tables.append([labels])
        tables[-1].append(column)
    return [line for table in tables for line in align([row for row in zip(*table, strict=True) if any(row[1:])])]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line per row. Columns are as wide as their widest cell, and two spaces apart."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def printable(text: str, max_chars: int | None = None) -> str:
    """`text` on one line without control characters, cut to `max_chars` characters."""
    clean = "".join(char if char.isprintable() else " " for char in text)
    return clean if max_chars is None or len(clean) <= max_chars else clean[: max_chars - 1] + "…"


def escaped(text: str) -> str:
    """`text` with `\\u001b` and the like in place of control characters; line breaks stay."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that a terminal can show."""
    return escaped(json.dumps(value, ensure_ascii=False, indent=indent))


class LineFormatter(logging.Formatter):
    """One line for each record, without control characters; names in it may be chosen by others."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record)).replace("\n", "\\n")

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return escaped(super().formatException(ei)).replace("\n", "\n  ")


def duration(ns: int) -> str:
    """`340 ms`, `1.24 s`, `2 min 05 s`; empty for 0 or less."""
    if ns <= 0:
        return ""
    if ns < 1_000_000:
        return "<1 ms"
    if ns < 999_500_000:
        return f"{ns / 1e6:.0f} ms"
    if ns < 119_995_000_000:
        return f"{ns / 1e9:.2f} s"
    minutes, seconds = divmod(round(ns / 1e9), 60)
    return f"{minutes} min {seconds:02d} s"


def counted(number: int, noun: str) -> str:
    """`1 call`, `2 calls`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _width(text: str) -> int:
    """Terminal columns of `text`: 2 for a wide character, 0 for a combining one."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
