"""The SQL example without training: its database, tasks, reward and agent."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agl.config import Config
from examples.sql_agent import agent, database, prompts, reward, tasks, templates

EXAMPLE = Path(__file__).parents[2] / "examples" / "sql_agent"
SPLITS = {
    "full": (tasks.train_tasks, tasks.eval_tasks, tasks.gold_examples),
    "tiny": (tasks.tiny_train_tasks, tasks.tiny_eval_tasks, tasks.tiny_gold_examples),
}
COUNT_OSLO = {"question": "Count the customers in Oslo.", "gold": "SELECT COUNT(*) FROM customers WHERE city = 'Oslo'"}


# --- database -------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.db", "b.db", "c.db")]
    for file, seed in zip(files, (5, 5, 6), strict=True):
        database.build(file, seed)
    same, again, other = (file.read_bytes() for file in files)
    assert same == again != other
    assert sorted(tmp_path.iterdir()) == files


def test_the_shop_holds_a_few_thousand_rows_that_join() -> None:
    everything = "order_items JOIN products ON products.id = product_id JOIN orders ON orders.id = order_id "
    everything += "JOIN customers ON customers.id = customer_id"
    assert (
        database.query(f"SELECT COUNT(*) FROM {everything}").rows
        == database.query("SELECT COUNT(*) FROM order_items").rows
    )
    assert database.query("SELECT COUNT(*) > 3000 FROM order_items").rows == [(1,)]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT town FROM customers", "no such column: town"),
        ("DELETE FROM customers", "not authorized"),
        ("ATTACH 'other.db' AS other", "not authorized"),
        ("PRAGMA table_info(orders)", "not authorized"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("SELECT COUNT(*) FROM orders a, orders b, orders c", "takes too long"),
        ("WITH n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n", "takes too long"),
        ("SELECT * FROM order_items", "more than 1000 rows"),
        ("SELECT hex(zeroblob(1000000))", "too big"),
        ("SELECT '\ud800'", "surrogates"),
    ],
)
def test_a_query_that_is_wrong_or_too_heavy_is_refused_with_its_reason(sql: str, message: str) -> None:
    with pytest.raises(database.QueryError, match=re.escape(message)):
        database.query(sql)


def test_work_is_the_same_on_every_run_and_in_every_thread() -> None:
    sql = "SELECT city, COUNT(*) FROM orders JOIN customers ON customers.id = customer_id GROUP BY city"
    with ThreadPoolExecutor(8) as pool:
        assert len({result.work for result in pool.map(reward.shop_scorer().query, [sql] * 32)}) == 1


def test_failure_tells_an_error_from_an_empty_result_from_an_answer() -> None:
    assert database.failure("") == "no query"
    assert database.failure("SELECT name FROM customer") == "no such table: customer"
    assert database.failure("SELECT name FROM customers WHERE city = 'Nowhere'") == "no rows"
    assert database.failure("SELECT SUM(stock) FROM products WHERE category = 'none'") == "no rows"
    assert database.failure("SELECT COUNT(*) FROM customers WHERE city = 'Nowhere'") is None


# --- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_combinations_never_occur_in_training(split: str) -> None:
    train, held_out, examples = (function() for function in SPLITS[split])
    assert len(held_out) >= 64 and len(train) >= 80
    for key in ("id", "question", "gold"):
        trained = {task[key] for task in train}
        assert trained.isdisjoint(task[key] for task in held_out)
        assert len(trained) == len(train) and len({task[key] for task in held_out}) == len(held_out)
    shown = {with_index(example["completion"]) for example in examples}
    assert shown.isdisjoint(task["gold"] for task in (*train, *held_out))


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_tasks_use_known_families_and_words(split: str) -> None:
    train, held_out, examples = (function() for function in SPLITS[split])
    assert {task["id"].split("/")[0] for task in held_out} <= {task["id"].split("/")[0] for task in train}
    texts = [task["question"] + " " + task["gold"] for task in train]
    texts += [example["messages"][-1]["content"] + " " + example["completion"] for example in examples]
    known = set(re.findall(r"\w+", " ".join(texts)))
    for task in held_out:
        assert set(re.findall(r"\w+", task["question"] + " " + task["gold"])) <= known, task["id"]


def test_tasks_are_the_same_every_time() -> None:
    for functions in SPLITS.values():
        for function in functions:
            assert function() == function() == json.loads(json.dumps(function()))


@pytest.mark.parametrize("family", templates.FAMILIES)
def test_every_gold_query_finds_something_and_scores_one_on_all_parts(family: Callable[[], Iterator[Any]]) -> None:
    for item in family():
        assert database.failure(item.gold) is None, item.id
        scores = reward.score({"gold": item.gold}, {"sql": item.gold})
        assert scores == {"syntax": 1.0, "efficiency": 1.0, "goal": 1.0}, item.id


@pytest.mark.parametrize("family", templates.FAMILIES)
def test_gold_queries_scan_at_most_one_table_and_order_without_ties(family: Callable[[], Iterator[Any]]) -> None:
    for gold in (item.gold for item in family()):
        assert reward.shop_scorer().query(gold).work < database.MAX_WORK / 20
        plan = [step[3] for step in database.query(f"EXPLAIN QUERY PLAN {gold}").rows]
        assert sum(step.startswith("SCAN") for step in plan) <= 1, plan
        if "ORDER BY" in gold:
            shuffled = gold.replace(" LIMIT", ", RANDOM() LIMIT")
            assert {tuple(database.query(shuffled).rows) for _ in range(12)} == {tuple(database.query(gold).rows)}


def test_tiny_questions_and_answers_are_short() -> None:
    for task in tasks.tiny_train_tasks() + tasks.tiny_eval_tasks():
        assert len(task["question"].split()) <= 16 and len(task["gold"].split()) <= 16


def with_index(sql: str) -> str:
    return sql.replace("WHERE +", "WHERE ")


def test_most_tiny_examples_are_right_and_scan_the_table_which_the_reward_discourages() -> None:
    queries = [example["completion"] for example in tasks.tiny_gold_examples()]
    scanning = [sql for sql in queries if sql != with_index(sql)]
    assert len(scanning) == len(queries) * 3 // 4
    for sql in scanning:
        syntax, efficiency, goal = score(with_index(sql), sql)
        assert (syntax, goal) == (1, 1) and efficiency <= 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_gold_examples_show_each_role_what_the_agent_sends(split: str) -> None:
    questions = {
        item.gold: item.questions for family in templates.FAMILIES + templates.TINY_FAMILIES for item in family()
    }
    for example in SPLITS[split][2]():
        question = example["messages"][-1]["content"].splitlines()[0]
        assert question in questions[with_index(example["completion"])]
        if example["role"] == "writer":
            assert example["messages"] == prompts.writer_messages(question)
            continue
        broken, error = re.findall(r"(?:Query|Error): (.*)", example["messages"][-1]["content"])
        assert database.failure(broken) == error
        assert example["messages"] == prompts.fixer_messages(question, broken, error)


# --- reward ---------------------------------------------------------------------------------------------------------


def score(gold: str, sql: str) -> tuple[float, float, float]:
    parts = reward.score({"gold": gold}, {"sql": sql})
    assert list(parts) == ["syntax", "efficiency", "goal"]
    return parts["syntax"], parts["efficiency"], parts["goal"]


@pytest.mark.parametrize(
    ("sql", "syntax"),
    [
        ("", 0),
        ("I do not know", 0),
        ("SELECT COUNT(* FROM customers", 0),
        ("SELECT FROM customers", 0),
        ("DROP TABLE customers", 0),
        ("SELECT 1; SELECT 2", 0),
        ("SELECT " + "(" * 5000, 0),
        ("SELECT name FROM customer WHERE city = 'Oslo'", 1),
        ("SELECT COUNT(*) FROM customers WHERE town = 'Oslo'", 1),
    ],
)
def test_what_does_not_run_earns_syntax_at_most(sql: str, syntax: int) -> None:
    assert score(COUNT_OSLO["gold"], sql) == (syntax, 0, 0)


def test_a_query_that_touches_nothing_earns_nothing_for_efficiency() -> None:
    right = database.query(COUNT_OSLO["gold"]).rows[0][0]
    assert score(COUNT_OSLO["gold"], "SELECT 'nothing'") == (1, 0, 0)
    assert score(COUNT_OSLO["gold"], f"SELECT {right}") == (1, 0, 1)


@pytest.mark.parametrize("sql", ["SELECT city FROM customers LIMIT 0", "SELECT name FROM customers LIMIT 1"])
def test_a_wrong_query_is_not_efficient_by_doing_little(sql: str) -> None:
    gold = "SELECT city, COUNT(*) FROM customers WHERE segment = 'school' GROUP BY city"
    syntax, efficiency, goal = score(gold, sql)
    assert (syntax, goal) == (1, 0) and efficiency < 0.05


def test_a_near_miss_earns_more_than_a_dump_of_the_table_and_less_than_the_answer() -> None:
    _, near, goal = score(COUNT_OSLO["gold"], "SELECT COUNT(*) FROM customers WHERE city = 'Rome'")
    _, dump, _ = score(COUNT_OSLO["gold"], "SELECT * FROM customers")
    assert goal == 0 and dump < 0.2 < 0.5 < near < 1


def test_the_wrong_table_earns_no_efficiency() -> None:
    assert score(COUNT_OSLO["gold"], "SELECT COUNT(*) FROM products WHERE category = 'toys'") == (1, 0, 0)


def test_a_right_answer_by_a_slower_query_earns_part_of_the_efficiency() -> None:
    gold = "SELECT SUM(quantity) FROM order_items JOIN products ON products.id = product_id WHERE category = 'toys'"
    slow = gold.replace("category = 'toys'", "category LIKE 'toys'")
    slower = slow.replace("JOIN products ON", "CROSS JOIN products WHERE").replace("WHERE category", "AND category")
    (_, first, one), (_, second, other) = score(gold, slow), score(gold, slower)
    assert one == other == 1
    assert 1 > first > second > 0


def test_a_cross_join_is_wrong_and_inefficient() -> None:
    _, efficiency, goal = score(
        "SELECT COUNT(*) FROM orders JOIN customers ON customers.id = customer_id WHERE city = 'Oslo'",
        "SELECT COUNT(*) FROM orders, customers WHERE city = 'Oslo' AND customer_id > 0",
    )
    assert goal == 0 and efficiency < 0.2


def test_order_matters_only_where_the_gold_orders_and_rows_count_as_often_as_they_occur() -> None:
    ordered = "SELECT name FROM products WHERE category = 'toys' ORDER BY price LIMIT 3"
    assert score(ordered, f"SELECT * FROM ({ordered}) ORDER BY name")[2] == 0
    unordered = "SELECT name FROM products WHERE category = 'toys'"
    assert score(unordered, f"{unordered} ORDER BY price DESC")[2] == 1
    assert score("SELECT segment FROM customers", "SELECT DISTINCT segment FROM customers")[2] == 0


def test_floats_are_compared_to_two_decimals() -> None:
    gold = "SELECT AVG(price) FROM products WHERE category = 'toys'"
    assert score(gold, gold.replace("AVG(price)", "SUM(price) / 15.0 + 0.0001"))[2] == 1
    assert score(gold, gold.replace("AVG(price)", "SUM(price) / 15.0 + 0.1"))[2] == 0


# --- agent ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("select name from customers;", "select name from customers"),
        ("```sql\nSELECT 1;\n```", "SELECT 1"),
        ("```SELECT 1```", "SELECT 1"),
        ("Here you are:\n```sqlite\nSELECT 1\nFROM orders\n``` It counts.", "SELECT 1\nFROM orders"),
        ("```sql\nSELECT 1 FROM", "SELECT 1 FROM"),
        ("The query is SELECT 1\n\nIt answers the question.", "SELECT 1"),
        ("With care: WITH a AS (SELECT 1) SELECT * FROM a", "WITH a AS (SELECT 1) SELECT * FROM a"),
        ("SELECT 1; SELECT 2", "SELECT 1"),
        ("There are 12 customers selected.", ""),
        ("", ""),
    ],
)
def test_extract_sql(answer: str, sql: str) -> None:
    assert prompts.extract_sql(answer) == sql


def test_the_agent_imports_nothing_of_ours() -> None:
    for name in ("agent", "prompts", "database"):
        assert not re.search(r"\bagl", (EXAMPLE / f"{name}.py").read_text(encoding="utf-8"))


@contextmanager
def scripted_models(answer: Callable[[dict[str, Any]], str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server on loopback that answers each request with `answer(body)`; yields URL and bodies."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(body | {"path": self.path})
            message = {"role": "assistant", "content": answer(body)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            kind = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": body["model"]}
            reply = json.dumps(kind | {"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", bodies
        finally:
            server.shutdown()
            thread.join()


def run_agent(url: str, monkeypatch: pytest.MonkeyPatch, *questions: str) -> list[dict[str, Any]]:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(agent.run, [{"question": question} for question in questions]))


def test_a_good_query_never_meets_the_fixer(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_models(lambda body: f"```sql\n{COUNT_OSLO['gold']};\n```") as (url, bodies):
        answers = run_agent(url, monkeypatch, COUNT_OSLO["question"])
    assert answers == [{"sql": COUNT_OSLO["gold"], "fixed": False, "error": None}]
    assert [(body["model"], body["path"]) for body in bodies] == [("writer", "/v1/chat/completions")]
    assert bodies[0]["messages"] == prompts.writer_messages(COUNT_OSLO["question"])
    assert bodies[0]["max_completion_tokens"] == 64 and "temperature" not in bodies[0]


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ("SELECT COUNT(*) FROM customer", "no such table: customer"),
        ("SELECT name FROM customers WHERE city = 'oslo'", "no rows"),
    ],
)
def test_a_broken_query_goes_to_the_fixer_once(monkeypatch: pytest.MonkeyPatch, broken: str, error: str) -> None:
    answers = {"writer": broken, "fixer": COUNT_OSLO["gold"]}
    with scripted_models(lambda body: answers[body["model"]]) as (url, bodies):
        assert run_agent(url, monkeypatch, "q") == [{"sql": COUNT_OSLO["gold"], "fixed": True, "error": None}]
    assert [body["model"] for body in bodies] == ["writer", "fixer"]
    assert bodies[1]["messages"] == prompts.fixer_messages("q", broken, error)


def test_a_fixer_that_fails_as_well_ends_the_run_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_models(lambda body: "I cannot say.") as (url, bodies):
        assert run_agent(url, monkeypatch, "q") == [{"sql": "", "fixed": True, "error": "no query"}]
    assert len(bodies) == 2
    assert reward.score(COUNT_OSLO, {"sql": ""}) == {"syntax": 0.0, "efficiency": 0.0, "goal": 0.0}


def test_64_agents_at_once_keep_their_questions_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = tasks.eval_tasks()
    golds = {task["question"]: task["gold"] for task in held_out}
    with scripted_models(lambda body: golds[body["messages"][-1]["content"]]) as (url, bodies):
        answers = run_agent(url, monkeypatch, *golds)
    assert [answer["sql"] for answer in answers] == list(golds.values())
    assert len(bodies) == len(golds)


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "tiny.yaml", "gpu.yaml"])
def test_the_configurations_load_and_name_functions_that_exist(name: str) -> None:
    config = Config.load(EXAMPLE / name)
    train, sft = config.require_train(), config.sft
    assert sft and train.eval_tasks and train.reward
    for reference in (train.agent, train.tasks, train.eval_tasks, train.reward, sft.examples):
        module, _, function = reference.partition(":")
        assert callable(getattr({m.__name__: m for m in (agent, tasks, reward)}[module], function))
    assert set(config.agent_roles.roles) == {"writer", "fixer"} == {e["role"] for e in tasks.gold_examples()}
    assert set(config.rewards) == set(reward.score(COUNT_OSLO, {"sql": COUNT_OSLO["gold"]}))
