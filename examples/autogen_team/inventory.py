"""The stock of a small shop, and the tool that queries it."""

import zlib
from itertools import product

from autogen_core.tools import FunctionTool

ITEMS = ("mug", "bowl", "plate", "lamp", "chair", "vase", "towel", "clock")
COLOURS = ("red", "blue", "green", "white", "black", "grey")


def article_of(item: str, colour: str) -> str:
    """Code of an article, e.g. `mug-red`."""
    return f"{item}-{colour}"


PIECES = {code: 10 + zlib.crc32(code.encode()) % 90 for code in (article_of(*pair) for pair in product(ITEMS, COLOURS))}
"""Pieces of each article: two digits, the same in every process."""


def stock(article: str) -> int:
    """Number of pieces of `article` in stock. Raises LookupError for an unknown code."""
    if article not in PIECES:
        raise LookupError(f"no article {article!r}")
    return PIECES[article]


STOCK = FunctionTool(stock, description="Pieces on the shelf.")
