"""The shop: a SQLite file generated from a seed, and one guarded function to query it.

The agent and the reward read the same file. A query may only select, and its work and its rows are limited, so that a
careless cross join ends with an error instead of hanging.
"""

import os
import random
import sqlite3
import tempfile
import zlib
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

SEED = 1
CUSTOMERS, PRODUCTS, ORDERS = 400, 120, 1600

CITIES = (
    *("Oslo", "Paris", "Rome", "Lima", "Cairo", "Delhi", "Tokyo", "Berlin"),
    *("Madrid", "Dublin", "Boston", "Austin", "Vienna", "Prague", "Athens", "Milan"),
)
SEGMENTS = ("private", "business", "school")
CATEGORIES = ("toys", "books", "garden", "kitchen", "music", "sports", "games", "shoes")
STATUSES = ("open", "packed", "shipped", "returned", "cancelled")
PAYMENTS = ("card", "cash", "invoice", "voucher")
YEARS = (2021, 2022, 2023, 2024)

MAX_WORK = 50_000
"""Limit of one query in units of work. The heaviest gold query needs about 1,600."""
STEPS_PER_UNIT = 10
"""Steps of SQLite's virtual machine in one unit of work."""
MAX_ROWS = 1000
MAX_VALUE_BYTES = 10_000
"""Longest string that a query may build."""

_SCHEMA = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, segment TEXT);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, price INTEGER, stock INTEGER);
CREATE TABLE orders (
    id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers, status TEXT, payment TEXT, year INTEGER
);
CREATE TABLE order_items (order_id INTEGER REFERENCES orders, product_id INTEGER REFERENCES products, quantity INTEGER);
CREATE INDEX customers_city ON customers (city);
CREATE UNIQUE INDEX products_name ON products (name);
CREATE INDEX products_category ON products (category);
CREATE INDEX orders_customer ON orders (customer_id);
CREATE INDEX orders_status ON orders (status);
CREATE INDEX items_order ON order_items (order_id);
CREATE INDEX items_product ON order_items (product_id);
"""

_FIRST_NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ines", "Jon"),
    *("Kira", "Leo", "Mia", "Nils", "Olga", "Paul", "Rosa", "Sam", "Tara", "Udo"),
)
_LAST_NAMES = (
    *("Adler", "Brook", "Costa", "Dahl", "Engel", "Frost", "Grant", "Hill", "Ivers", "Jung"),
    *("Klein", "Lund", "Moss", "Nash", "Ohm", "Pike", "Quist", "Ross", "Stone", "Voss"),
)
_COLOURS = ("Red", "Blue", "Green", "Black", "White")
_NOUNS = {
    "toys": ("Robot", "Kite", "Puzzle"),
    "books": ("Novel", "Atlas", "Diary"),
    "garden": ("Rake", "Hose", "Spade"),
    "kitchen": ("Pan", "Kettle", "Mug"),
    "music": ("Drum", "Flute", "Guitar"),
    "sports": ("Ball", "Racket", "Helmet"),
    "games": ("Chess", "Cards", "Dice"),
    "shoes": ("Boot", "Sandal", "Sneaker"),
}

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_building = Lock()

Row = tuple[Any, ...]


class QueryError(Exception):
    """SQLite rejected the query, or it exceeded a limit. The agent sees the message."""


@dataclass
class Result:
    """Rows of a query."""

    rows: list[Row]

    def is_empty(self) -> bool:
        """Whether there is no row or only NULL values, as from an aggregate over no rows."""
        return all(value is None for row in self.rows for value in row)


def build(path: Path, seed: int = SEED) -> None:
    """Write the shop to `path`, atomically. The same seed gives the same bytes."""
    handle, half = tempfile.mkstemp(dir=path.parent, suffix=".db")
    os.close(handle)
    with closing(sqlite3.connect(half)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.executescript(_SCHEMA)
        for table, rows in _rows(random.Random(seed)).items():
            marks = ", ".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        connection.commit()
        connection.execute("ANALYZE")
    os.replace(half, path)


@lru_cache(maxsize=1)
def shop() -> Path:
    """The shop's file beside this module, built on first use and again whenever this module changes."""
    source = Path(__file__)
    path = source.with_name(f"shop-{zlib.crc32(source.read_bytes()):08x}.db")
    with _building:
        if not path.exists():
            build(path)
    return path


def query(sql: str, path: Path | None = None) -> Result:
    """Run one SELECT on a separate connection, so that any number of threads can call this at once.

    Raises QueryError if `sql` is not one valid SELECT, or exceeds MAX_WORK or MAX_ROWS.
    """
    with closing(sqlite3.connect(f"{(path or shop()).as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        _guard(connection)
        try:
            rows = connection.execute(sql).fetchmany(MAX_ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise QueryError("query takes too long" if str(error) == "interrupted" else str(error)) from error
    if len(rows) > MAX_ROWS:
        raise QueryError(f"more than {MAX_ROWS} rows")
    return Result(rows)


def failure(sql: str) -> str | None:
    """Why `sql` is no good answer as far as the database can tell: its error, or that it found nothing."""
    if not sql:
        return "no query"
    try:
        return "no rows" if query(sql).is_empty() else None
    except QueryError as error:
        return str(error)


def _guard(connection: sqlite3.Connection) -> None:
    """Restrict `connection` to SELECT, and its next query to MAX_WORK."""
    units = count()
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY)
    connection.set_progress_handler(lambda: next(units) >= MAX_WORK, STEPS_PER_UNIT)


def _rows(rng: random.Random) -> dict[str, list[Row]]:
    orders = list(_orders(rng))
    return {
        "customers": list(_customers(rng)),
        "products": list(_products(rng)),
        "orders": orders,
        "order_items": list(_items(rng, [order[0] for order in orders])),
    }


def _customers(rng: random.Random) -> Iterable[Row]:
    names = [f"{first} {last}" for first in _FIRST_NAMES for last in _LAST_NAMES]
    for number, name in enumerate(rng.sample(names, CUSTOMERS), start=1):
        yield number, name, rng.choice(CITIES), rng.choices(SEGMENTS, (5, 3, 2))[0]


def _products(rng: random.Random) -> Iterable[Row]:
    """Products with unique names, prices and stocks, so that ORDER BY one of them has no ties."""
    kinds = [
        (f"{colour} {noun}", category) for category in CATEGORIES for noun in _NOUNS[category] for colour in _COLOURS
    ]
    rng.shuffle(kinds)
    prices, stocks = rng.sample(range(5, 400), PRODUCTS), rng.sample(range(1000), PRODUCTS)
    for number, ((name, category), price, stock) in enumerate(zip(kinds, prices, stocks, strict=True), start=1):
        yield number, name, category, price, stock


def _orders(rng: random.Random) -> Iterable[Row]:
    for number in range(1, ORDERS + 1):
        status, payment = rng.choices(STATUSES, (3, 2, 9, 2, 2))[0], rng.choices(PAYMENTS, (6, 2, 3, 1))[0]
        yield number, rng.randint(1, CUSTOMERS), status, payment, rng.choice(YEARS)


def _items(rng: random.Random, orders: list[int]) -> Iterable[Row]:
    """One to four products per order. Some products sell far better than others, so that the best are not tied."""
    popularity = [1 / (1 + rng.random() * 8) for _ in range(PRODUCTS)]
    for order in orders:
        bought = set(rng.choices(range(1, PRODUCTS + 1), popularity, k=rng.randint(1, 4)))
        yield from ((order, product, rng.randint(1, 5)) for product in sorted(bought))
