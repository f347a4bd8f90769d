"""Prompts of the agent for its two small models, all of them short, and the parser of the models' answers."""

import re

Message = dict[str, str]

SCHEMA = """\
customers(id, name, city, segment)
products(id, name, category, price, stock)
orders(id, customer_id, status, payment, year)
order_items(order_id, product_id, quantity)"""

WRITER_SYSTEM = f"Answer with one SQLite query.\n{SCHEMA}"
FIXER_SYSTEM = f"Correct the SQLite query.\n{SCHEMA}"

_MAX_QUERY_CHARS, _MAX_ERROR_CHARS = 200, 80

_FENCE = re.compile(r"```(?:\w*\n)?(.*?)(?:```|\Z)", re.DOTALL)
_START = re.compile(r"\b(?:SELECT\b|WITH\s+\w+\s+AS\b)", re.IGNORECASE)
_END = re.compile(r";|```|\n\s*\n")


def writer_messages(question: str) -> list[Message]:
    """The writer's prompt. The system message is the same for every question, so engines share its prefix."""
    return [_message("system", WRITER_SYSTEM), _message("user", question)]


def fixer_messages(question: str, sql: str, error: str) -> list[Message]:
    """The fixer's prompt: the question, the failed query and its error. A long query or error is cut."""
    content = f"{question}\nQuery: {sql[:_MAX_QUERY_CHARS]}\nError: {error[:_MAX_ERROR_CHARS]}"
    return [_message("system", FIXER_SYSTEM), _message("user", content)]


def extract_sql(answer: str) -> str:
    """The first query in a model's answer, without fences, prose or semicolon; "" if there is none."""
    fence = _FENCE.search(answer)
    text = fence.group(1) if fence else answer
    start = _START.search(text)
    return _END.split(text[start.start() :], maxsplit=1)[0].strip() if start else ""


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
