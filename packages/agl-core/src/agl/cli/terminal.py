"""Text for a terminal: aligned columns, durations, and nothing that could steer the terminal."""

import unicodedata
from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, columns as wide as their widest cell and two spaces apart."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def printable(text: str, longest: int | None = None) -> str:
    """`text` on one line without control characters, cut to `longest` characters."""
    clean = "".join(char if char.isprintable() else " " for char in text)
    return clean if longest is None or len(clean) <= longest else clean[: longest - 1] + "…"


def duration(ns: int) -> str:
    """`340 ms`, `1.24 s`, `2 min 05 s`; empty for what took no time."""
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
    """Columns that `text` takes: wide characters take two, combining ones none."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
