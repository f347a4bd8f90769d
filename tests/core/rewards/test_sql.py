"""The SQL scorer on SQLite and PostgreSQL: the same rules, read-only, within limits."""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from agl.errors import RewardError
from agl.rewards.sql import QueryError, Sql
from tests.core.test_imports import run
from tests.store.postgres_server import running_postgres

TABLES = """
CREATE TABLE shoes (id INTEGER PRIMARY KEY, name TEXT, price NUMERIC(8, 2), size INTEGER);
INSERT INTO shoes VALUES (1, 'boot', 80.10, 40), (2, 'clog', 20.00, 41), (3, 'pump', 80.10, 42), (4, 'boot', 5.25, 40)
"""


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    path = tmp_path_factory.mktemp("shop") / "shop.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLES)
    with running_postgres() as server:
        uri = server.new_database()
        with psycopg.connect(uri, autocommit=True) as database:
            for statement in TABLES.split(";\n"):
                database.execute(statement)  # type: ignore[call-overload]  # not a literal
        yield {"sqlite": f"sqlite:///{path}", "postgresql": uri.replace("postgresql://", "postgresql+psycopg://")}


@pytest.fixture(params=["sqlite", "postgresql"])
def sql(request: pytest.FixtureRequest, urls: dict[str, str]) -> Sql:
    return Sql(urls[request.param], timeout_s=3.0)


def test_parts_of_right_wrong_and_broken_queries(sql: Sql) -> None:
    gold = {"gold": "SELECT name, price FROM shoes WHERE size = 40 ORDER BY price"}
    assert sql(gold, {"sql": gold["gold"]}) == {"syntax": 1.0, "efficiency": 1.0, "goal": 1.0}
    parts = sql(gold, {"sql": gold["gold"] + " DESC"})
    assert (parts["syntax"], parts["goal"]) == (1.0, 0.0)
    # Without ORDER BY in the gold query the order does not matter, and rows count as often as they occur.
    assert sql({"gold": "SELECT name FROM shoes"}, {"sql": "SELECT name FROM shoes ORDER BY id DESC"})["goal"] == 1.0
    assert sql({"gold": "SELECT name FROM shoes"}, {"sql": "SELECT DISTINCT name FROM shoes"})["goal"] == 0.0
    # 20.00 as number, as decimal and as float.
    average = {"gold": "SELECT AVG(price) FROM shoes WHERE size = 41"}
    assert sql(average, {"sql": "SELECT 20.001 FROM shoes LIMIT 1"})["goal"] == 1.0
    for broken, syntax in (("SELECT nme FROM shoes", 1.0), ("SELECT (", 0.0), ("no idea", 0.0), (None, 0.0)):
        assert sql(gold, {"sql": broken}) == {"syntax": syntax, "efficiency": 0.0, "goal": 0.0}


def test_coverage_and_work_make_the_efficiency(sql: Sql) -> None:
    gold = {"gold": "SELECT name FROM shoes WHERE size = 42"}
    assert sql(gold, {"sql": "SELECT 'pump'"}) == {"syntax": 1.0, "efficiency": 0.0, "goal": 1.0}
    slow = "SELECT DISTINCT a.name FROM shoes a, shoes b, shoes c, shoes d WHERE a.size = 42"
    assert sql(gold, {"sql": slow})["goal"] == 1.0
    assert 0 < sql(gold, {"sql": slow})["efficiency"] < sql(gold, {"sql": gold["gold"]})["efficiency"] == 1.0


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM shoes",
        "SELECT 1; DELETE FROM shoes",
        "WITH gone AS (DELETE FROM shoes RETURNING *) SELECT * FROM gone",
        "CREATE TABLE more (id INTEGER)",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 5000) SELECT i FROM n",
    ],
)
def test_what_writes_or_does_not_end_is_refused_and_changes_nothing(sql: Sql, query: str) -> None:
    with pytest.raises(QueryError):
        sql.query(query)
    assert len(sql.query("SELECT id FROM shoes WHERE name LIKE '%o%'").rows) == 3


def test_a_percent_sign_is_no_placeholder(sql: Sql) -> None:
    assert sql.query("SELECT id FROM shoes WHERE name LIKE 'cl%'").rows == [(2,)]


def test_a_gold_query_that_fails_and_a_database_that_is_away_make_the_reward_missing(sql: Sql, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"the gold query fails \(.*\): SELECT nme FROM shoes"):
        sql({"gold": "SELECT nme FROM shoes"}, {"sql": "SELECT name FROM shoes"})
    with pytest.raises(RewardError, match="there is no SQLite file"):
        Sql(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(RewardError, match="in memory"):
        Sql("sqlite://")
    with pytest.raises(Exception, match="onnection"):
        Sql("postgresql+psycopg://localhost:9/none")({"gold": "SELECT 1"}, {"sql": "SELECT 1"})


def test_another_database_needs_the_statements_that_make_it_read_only() -> None:
    with pytest.raises(RewardError, match=r"mssql becomes read-only and gets a timeout; pass the statements"):
        Sql("mssql+pyodbc://localhost/shop")


def test_without_its_packages_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['sqlglot'] = None\ntry:\n  import agl.rewards.sql\nexcept Exception as e: print(e)"
    assert "pip install 'agl-core[rewards]'" in run(code)
    code = "import sys, agl.rewards; print(*{name.partition('.')[0] for name in sys.modules})"
    assert not {"sqlglot", "sqlalchemy", "jsonschema", "pydantic"} & set(run(code).split()), sys.executable
