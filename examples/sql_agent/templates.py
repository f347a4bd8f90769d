"""Families of questions: templates filled with columns and values, each with its gold query.

A family yields every combination of its template. Each column carries its wording in English, so a family is one line
of English and one line of SQL.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product

from examples.sql_agent.database import CATEGORIES, CITIES, PAYMENTS, SEGMENTS, STATUSES, YEARS


@dataclass(frozen=True)
class Column:
    """A column, the values that questions filter on, and its wording in English before or after the noun."""

    table: str
    name: str
    values: Sequence[str | int]
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Filter:
    """`column = value`."""

    column: Column
    value: str | int

    @property
    def sql(self) -> str:
        return f"{self.column.name} = {self.value!r}"


@dataclass(frozen=True)
class Combination:
    """One template with one choice of columns and values: wordings of the question, and its gold query."""

    id: str
    questions: tuple[str, ...]
    gold: str


CITY = Column("customers", "city", CITIES, after="in {}")
SEGMENT = Column("customers", "segment", SEGMENTS, before="{}")
CATEGORY = Column("products", "category", CATEGORIES, before="{}")
STATUS = Column("orders", "status", STATUSES, before="{}")
PAYMENT = Column("orders", "payment", PAYMENTS, after="paid by {}")
YEAR = Column("orders", "year", YEARS, after="from {}")

CUSTOMER, ORDER = (CITY, SEGMENT), (STATUS, PAYMENT, YEAR)
COLUMNS = (*CUSTOMER, CATEGORY, *ORDER)
ORDERS_OF_CUSTOMERS = "orders JOIN customers ON customers.id = customer_id"
SALES_OF_PRODUCTS = "order_items JOIN products ON products.id = product_id"

Filters = tuple[Filter, ...]


def count() -> Iterator[Combination]:
    for filters in _filters(COLUMNS, 1):
        yield _count(filters)


def count_two() -> Iterator[Combination]:
    for filters in _filters(COLUMNS, 2):
        yield _count(filters)


def _count(filters: Filters) -> Combination:
    what = _phrase(filters)
    questions = (f"How many {what} are there?", f"Count the {what}.")
    return _combine(filters, "", questions, f"SELECT COUNT(*) FROM {filters[0].column.table} WHERE {_where(filters)}")


def names() -> Iterator[Combination]:
    for filters in chain(_filters((*CUSTOMER, CATEGORY), 1), _filters(CUSTOMER, 2)):
        what = _phrase(filters)
        questions = (f"List the names of {what}.", f"What are the {what} called?")
        yield _combine(filters, "", questions, f"SELECT name FROM {filters[0].column.table} WHERE {_where(filters)}")


def aggregate() -> Iterator[Combination]:
    functions = {"average": "AVG", "highest": "MAX", "lowest": "MIN"}
    for filters, word, measure in product(_filters((CATEGORY,), 1), functions, ("price", "stock")):
        what = f"{word} {measure} of {_phrase(filters)}"
        sql = f"SELECT {functions[word]}({measure}) FROM products WHERE {_where(filters)}"
        yield _combine(filters, f"{word} {measure}", (f"What is the {what}?", f"Give the {what}."), sql)


def compare() -> Iterator[Combination]:
    limits = {"price": (100, 150, 200, 250), "stock": (300, 400, 500, 600)}
    signs = {"over": ">", "under": "<"}
    for filters, measure, word in product(_filters((CATEGORY,), 1), limits, signs):
        for limit in limits[measure]:
            detail = f"{measure} {word} {limit}"
            sql = f"SELECT name FROM products WHERE {_where(filters)} AND {measure} {signs[word]} {limit}"
            yield _combine(filters, detail, (f"Which {_phrase(filters)} have a {detail}?",), sql)


def top() -> Iterator[Combination]:
    orders = {"cheapest": "price", "most expensive": "price DESC", "scarcest": "stock"}
    for filters, word, k in product(_filters((CATEGORY,), 1), orders, range(2, 6)):
        what = _phrase(filters)
        questions = (f"Name the {k} {word} {what}.", f"Which {k} {what} are the {word}?")
        sql = f"SELECT name FROM products WHERE {_where(filters)} ORDER BY {orders[word]} LIMIT {k}"
        yield _combine(filters, f"{k} {word}", questions, sql)


def group() -> Iterator[Combination]:
    for filters, by in product(chain(_filters(COLUMNS, 1), _filters(ORDER, 2)), COLUMNS):
        used = [item.column for item in filters]
        if by.table == used[0].table and by not in used:
            yield _group(filters, by, by.table)


def _group(filters: Filters, by: Column, source: str) -> Combination:
    what = _phrase(filters)
    questions = (f"How many {what} are there for each {by.name}?", f"Count the {what} by {by.name}.")
    sql = f"SELECT {by.name}, COUNT(*) FROM {source} WHERE {_where(filters)} GROUP BY {by.name}"
    return _combine(filters, f"by {by.name}", questions, sql)


def join_count() -> Iterator[Combination]:
    for who, what in product(_filters(CUSTOMER, 1), _filters(ORDER, 1)):
        questions = (
            f"How many {_phrase(what)} belong to {_phrase(who)}?",
            f"Count the {_phrase(what)} of {_phrase(who)}.",
        )
        sql = f"SELECT COUNT(*) FROM {ORDERS_OF_CUSTOMERS} WHERE {_where(who + what)}"
        yield _combine(who + what, "", questions, sql)


def join_names() -> Iterator[Combination]:
    for who, what in product(_filters(CUSTOMER, 1), _filters(ORDER, 1)):
        sql = f"SELECT DISTINCT name FROM {ORDERS_OF_CUSTOMERS} WHERE {_where(who + what)}"
        yield _combine(who + what, "", (f"Which {_phrase(who)} have {_phrase(what)}?",), sql)


def join_group() -> Iterator[Combination]:
    for filters, by in product(chain(_filters(ORDER, 1), _filters(ORDER, 2)), CUSTOMER):
        yield _group(filters, by, ORDERS_OF_CUSTOMERS)


def join_units() -> Iterator[Combination]:
    words = {"total": "SUM", "average": "AVG", "highest": "MAX"}
    for filters, word in product(_filters((CATEGORY,), 1), words):
        what = _phrase(filters)
        questions = (f"What is the {word} quantity of {what} ordered?", f"Give the {word} ordered quantity of {what}.")
        sql = f"SELECT {words[word]}(quantity) FROM {SALES_OF_PRODUCTS} WHERE {_where(filters)}"
        yield _combine(filters, word, questions, sql)


def join_top() -> Iterator[Combination]:
    for filters, k in product(_filters((CATEGORY,), 1), range(2, 6)):
        what = _phrase(filters)
        questions = (f"Which {k} {what} sold the most units?", f"Name the {k} best selling {what}.")
        tail = f"GROUP BY name ORDER BY SUM(quantity) DESC LIMIT {k}"
        yield _combine(
            filters, str(k), questions, f"SELECT name FROM {SALES_OF_PRODUCTS} WHERE {_where(filters)} {tail}"
        )


FAMILIES: tuple[Callable[[], Iterator[Combination]], ...] = (
    *(count, count_two, names, aggregate, compare, top, group),
    *(join_count, join_names, join_group, join_units, join_top),
)
TINY_FAMILIES = (aggregate, compare, top)
"""Families of one table, with short questions and answers and a small vocabulary."""


def _filters(columns: Sequence[Column], size: int) -> Iterator[Filters]:
    """Every choice of values for every `size` columns of one table."""
    for chosen in combinations(columns, size):
        if len({column.table for column in chosen}) == 1:
            yield from product(*([Filter(column, value) for value in column.values] for column in chosen))


def _phrase(filters: Filters) -> str:
    """English for the rows that pass the filters, such as `shipped orders paid by card`."""
    before = [item.column.before.format(item.value) for item in filters if item.column.before]
    after = [item.column.after.format(item.value) for item in filters if item.column.after]
    return " ".join([*before, filters[0].column.table, *after])


def _where(filters: Filters) -> str:
    return " AND ".join(item.sql for item in filters)


def _combine(filters: Filters, detail: str, questions: tuple[str, ...], gold: str) -> Combination:
    parts = [f"{item.column.name}={item.value}" for item in filters]
    return Combination("/".join([*parts, detail] if detail else parts), questions, gold)
