"""`agl rollouts` and `agl inspect --text`: which rollouts are listed, what they said, and what SFT learns from them."""

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agl import semconv
from agl.cli import main
from agl.span import Span
from agl.store import Rollout, open_store
from tests.core.span_maker import chat, gateway_call, reward, span

TOOLS = [{"type": "function", "function": {"name": "shelf", "parameters": {"type": "object"}}}]
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many\x1b[31m apples?"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "shelf", "arguments": '{"of": "apples"}'}}
SECOND = [
    *QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "7"},
]


def answered(messages: list[dict[str, Any]], *parts: dict[str, Any], **options: Any) -> Span:
    """A gateway call with its recorded request and answer."""
    answer = [{"role": "assistant", "parts": [*parts], "finish_reason": "stop"}]
    said = {
        semconv.GATEWAY_REQUEST: json.dumps({"model": "m", "messages": messages, "tools": TOOLS}),
        semconv.GEN_AI_OUTPUT_MESSAGES: json.dumps(answer),
    }
    return gateway_call(attributes=said | options.pop("attributes", {}), **options)


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "content": content}


def of(rollout: str, *spans: Span, shift_s: float = 0.0) -> list[Span]:
    """`spans`, in a trace of its own, of `rollout`, started `shift_s` seconds ago."""
    start = time.time_ns() - round(shift_s * 1e9)
    trace = f"{abs(hash(rollout)):032x}"[:32]
    named = {semconv.ROLLOUT_ID: rollout}
    return [
        Span(trace, each.span_id, each.parent_id, each.name, start, start + 10, {**each.attributes, **named},
             status=each.status, status_message=each.status_message)
        for each in spans
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rollouts, the oldest first: a shop with a tool, one that failed, an evaluation, and one without a reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    train, evaluation = {semconv.MODE: "train"}, {semconv.MODE: "eval"}
    shop = span(semconv.SPAN_ROLLOUT, train)
    tool = {semconv.GEN_AI_TOOL_CALL_ARGUMENTS: '{"of": "apples"}', semconv.GEN_AI_TOOL_CALL_RESULT: "7"}
    asked = {"type": "tool_call", "id": "c1", "name": "shelf", "arguments": {"of": "apples"}}
    with closing(open_store("sqlite:///agl.db")) as opened:
        names = {"shop-1": "shop", "shop-2": "shop", "shop-eval-1": "shop", "other": "shop-eval"}
        opened.enqueue_rollouts([Rollout(name, None, metadata={"run": run}) for name, run in names.items()])
        opened.append_spans(
            of(
                "shop-1",
                shop,
                answered(QUESTION, asked, parent=shop, role="clerk"),
                span("execute_tool shelf", tool, parent=shop),
                answered(SECOND, text("Seven " + "apples, " * 400), parent=shop, role="clerk"),
                chat(shop, {semconv.ROLE: "hosted"}),
                reward(0.9, parent=shop),
                shift_s=7200,
            )
        )
        failed = span(semconv.SPAN_ROLLOUT, train, status="error", message="KeyError: 'id'")
        refused = gateway_call(role="clerk", status="error", message="no engine")
        opened.append_spans(of("shop-2", failed, refused, reward(0.0), shift_s=60))
        call = answered(QUESTION, text("Two"), attributes=evaluation, role="buyer")
        opened.append_spans(of("shop-eval-1", call, reward(0.5, evaluation), reward(0.7, {semconv.ROLE: "buyer"})))
        opened.append_spans(of("other", gateway_call(role="clerk")))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    return [rollout["rollout_id"] for rollout in json.loads(printed(capsys, "rollouts", "--json", *arguments))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", "other shop-eval-1 shop-2 shop-1"),
        ("--limit 2", "other shop-eval-1"),
        ("--run shop", "shop-eval-1 shop-2 shop-1"),
        ("--run shop-eval", "other"),  # the id of a rollout says nothing
        ("--mode train", "shop-2 shop-1"),
        ("--role buyer", "shop-eval-1"),
        ("--reward 0.5", "shop-eval-1 shop-1"),
        ("--reward >0.5", "shop-1"),
        ("--role buyer --reward 0.7", "shop-eval-1"),
        ("--reward <=0.5", "shop-eval-1 shop-2"),
        ("--reward none", "other"),
        ("--error", "shop-2"),
        ("--error ValueError", ""),
        ("--since 1h", "other shop-eval-1 shop-2"),
        ("--best 2", "shop-1 shop-eval-1"),
    ],
)
def test_rollouts_are_listed_newest_first(options: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, *options.split()) == expected.split()


def test_the_table_has_a_row_for_each_rollout(capsys: pytest.CaptureFixture[str]) -> None:
    head, *rows = printed(capsys, "rollouts", "--limit", "3").splitlines()
    assert head.split() == ["rollout", "started", "mode", "roles", "calls", "reward", "error"]
    assert [row.split()[0] for row in rows[:3]] == ["other", "shop-eval-1", "shop-2"]
    assert rows[2].endswith("train  clerk  1      0       KeyError: 'id'")
    assert rows[-1] == "the newest 3; --limit 0 lists all"
    assert printed(capsys, "rollouts", "--run", "nowhere") == "no rollout matches\n"


def test_the_best_rollouts_become_examples_for_sft(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "--best", "2", "--as-sft", "best.jsonl"]) == 0
    assert capsys.readouterr().err == "3 examples of 2 rollouts; left out: 1 call without recorded text\n"
    first, second, third = map(json.loads, Path("best.jsonl").read_text().splitlines())
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert first == {"role": "clerk", "messages": QUESTION, "tools": TOOLS, "completion": called}
    assert second["messages"] == SECOND and second["completion"].startswith("Seven apples, ")
    assert (third["role"], third["completion"]) == ("buyer", "Two")
    assert main(["rollouts", "--as-sft", "best.jsonl"]) == 2
    assert "cannot write best.jsonl: File exists; name a new file" in capsys.readouterr().err
    assert main(["rollouts", "--error", "--as-sft", "none.jsonl"]) == 2
    assert "1 rollout selected, none with a call to learn from; left out: 1 call that failed" in capsys.readouterr().err


def test_inspect_shows_what_was_said_wrapped_cut_and_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = printed(capsys, "inspect", "shop-1", "--text")
    lines = shown.splitlines()
    said = [line.lstrip("│ ") for line in lines if line[:1] in "│ " and line.strip()]
    assert said[:3] == ["system    Be brief.", "user      How many [31m apples?", 'answer    shelf({"of": "apples"})']
    assert said[3:6] == ['arguments {"of": "apples"}', "result    7", "...       3 messages as above"]
    assert said[6] == "tool      7" and said[7].startswith("answer    Seven apples, apples,")
    assert any("more characters; --json has all" in line for line in said)
    assert "\x1b" not in shown
    assert all(len(line) <= 60 for line in lines if "apples" in line)


def test_json_has_all_that_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(printed(capsys, "inspect", "shop-1", "--json"))
    first, second, hosted = data["calls"]
    assert (first["messages"], first["tools"]) == (QUESTION, TOOLS)
    assert first["answer"]["tool_calls"] == [CALL]
    assert second["answer"] == {"role": "assistant", "content": "Seven " + "apples, " * 400}
    assert (hosted["messages"], hosted["answer"]) == ([], None)
    (tool,) = [each["texts"] for each in data["spans"] if each["name"] == "execute_tool shelf"]
    assert tool == [{"label": "arguments", "text": '{"of": "apples"}'}, {"label": "result", "text": "7"}]


def test_messages_are_read_from_the_framework_where_the_gateway_recorded_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = {"type": "tool_call_response", "id": "c1", "response": {"of": 7}}
    messages = [{"role": "user", "parts": [text("a"), text("b")]}, {"role": "tool", "parts": [result, result]}]
    asked = {
        semconv.GEN_AI_SYSTEM_INSTRUCTIONS: json.dumps([text("Be brief.")]),
        semconv.GEN_AI_INPUT_MESSAGES: json.dumps(messages),
        semconv.GEN_AI_OUTPUT_MESSAGES: json.dumps(
            [{"role": "assistant", "parts": [{"type": "reasoning", "content": "hm"}, text("yes")]}]
        ),
        semconv.GEN_AI_TOOL_DEFINITIONS: json.dumps([{"type": "function", "name": "shelf"}]),
    }
    with closing(open_store("sqlite:///agl.db")) as opened:
        opened.append_spans(of("framework", chat(attributes=asked)))
    (call,) = json.loads(printed(capsys, "inspect", "--last", "--json"))["calls"]
    assert call["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "tool", "tool_call_id": "c1", "content": '{"of": 7}'},
        {"role": "tool", "tool_call_id": "c1", "content": '{"of": 7}'},
    ]
    assert call["tools"] == [{"type": "function", "function": {"name": "shelf"}}]
    assert call["answer"] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
