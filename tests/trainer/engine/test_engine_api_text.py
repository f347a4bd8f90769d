"""Text of answers: detokenized as it arrives, cut at stop strings, split into content and tool calls."""

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agl_trainer.data.chat import answer_text
from agl_trainer.data.tool_call import ToolCall, forced_start
from agl_trainer.engine.http.detokenizer import Detokenizer, StopStrings, decode
from agl_trainer.engine.http.tool_call_parser import ToolCallParser, parse
from tests.trainer.scripted_sampler import small_tokenizer

tokenizer = functools.cache(small_tokenizer)
few_letters = st.text(alphabet="ab<", max_size=12)


def pieces(token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer())
    return [*map(detokenizer.feed, token_ids), detokenizer.finish()]


@given(st.text())
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str):
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    fed = pieces(ids)
    assert "".join(fed) == decode(tokenizer(), ids)
    assert "".join(fed).count("\ufffd") == text.count("\ufffd")


@given(st.lists(st.integers(min_value=0, max_value=399)))
def test_any_token_ids_give_the_same_text_as_decoding_them_at_once(ids: list[int]):
    assert "".join(pieces(ids)) == decode(tokenizer(), ids)


def test_a_character_of_several_tokens_comes_with_its_last_one():
    ids = tokenizer()("a🦜b", add_special_tokens=False)["input_ids"]
    assert [piece for piece in pieces(ids) if piece] == ["a", "🦜", "b"]
    assert len(ids) > 3


def test_bytes_that_never_become_a_character_come_at_the_end():
    parrot = tokenizer()("🦜", add_special_tokens=False)["input_ids"]
    assert pieces(parrot[:2]) == ["", "", "\ufffd"]


def test_special_tokens_are_not_text():
    start = tokenizer().bos_token_id
    assert "".join(pieces([start, *tokenizer()("hi", add_special_tokens=False)["input_ids"], start])) == "hi"


def cut(parts: list[str], stops: list[str]) -> tuple[str, str | None]:
    stop = StopStrings(stops)
    text = "".join(map(stop.feed, parts)) + stop.finish()
    return text, stop.matched


def first_to_complete(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reference implementation on the full text, one character at a time."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(few_letters), st.lists(few_letters.filter(len), max_size=3))
def test_stop_strings_cut_as_on_the_full_text_however_it_arrives(parts: list[str], stops: list[str]):
    assert cut(parts, stops) == first_to_complete("".join(parts), stops)


def test_text_that_may_become_a_stop_string_is_withheld():
    stop = StopStrings(["\nObservation:"])
    assert stop.feed("Action: add\nObs") == "Action: add"
    assert stop.feed("cure.\n") == "\nObscure."
    assert stop.feed("Observation: 3") == ""
    assert stop.matched == "\nObservation:"
    assert stop.feed("more") == stop.finish() == ""


ADD = ToolCall("add", '{"a": 1, "b": 2}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (ADD.text(), "", [ADD]),
        (f"Let me see.\n{ADD.text()}\n{ADD.text()}\n", "Let me see.\n", [ADD, ADD]),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', "", [ADD]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}', "", [ADD]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}}</tool_call>', "", [ADD]),
        ('<tool_call>```json\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n```</tool_call>', "", [ADD]),
        ('<tool_call>{"name": "add", "parameters": {"a": 1, "b": 2}}</tool_call>', "", [ADD]),
        ('<tool_call>[{"name": "add", "arguments": {"a":1,"b":2}}]</tool_call>', "", [ADD]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [ToolCall("now", "{}")]),
        ('<tool_call>{"name": "q", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [ToolCall("q", '{"x": 1}')]),
        ('<tool_call>{"name": "q", "arguments": {"s": "a\nb"}}</tool_call>', "", [ToolCall("q", '{"s": "a\\nb"}')]),
    ],
)
def test_tool_calls_are_read_leniently(text: str, content: str, calls: list[ToolCall]):
    assert parse(text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        " \n ",
        '<tool_call>{"name": "add", "argum',
        "<tool_call>add(1, 2)</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "not json"}</tool_call>',
        '<tool_call>{"name": "add"} and so on</tool_call>',
        "<tool_call>" + "[" * 5000,
    ],
)
def test_malformed_calls_stay_text(text: str):
    assert parse(text) == (text, [])


def test_a_malformed_call_does_not_hide_the_next_one():
    assert parse(f"<tool_call>oops</tool_call> {ADD.text()}") == ("<tool_call>oops</tool_call> ", [ADD])


@given(st.lists(st.sampled_from(["a", " ", "\n", "<", "<tool", "_call>", ADD.text(), "<tool_call>", "{"])))
def test_content_and_calls_are_the_same_however_the_text_arrives(parts: list[str]):
    reader = ToolCallParser()
    content_read = "".join(map(reader.feed, parts))
    rest, calls = reader.finish()
    assert (content_read + rest, calls) == parse("".join(parts))


def test_content_is_passed_on_before_the_answer_ends():
    reader = ToolCallParser()
    assert reader.feed("I add <to") == "I add "
    assert reader.feed("morrow> ") == "<tomorrow> "
    assert reader.feed(ADD.text()) == ""


def test_a_forced_call_is_parsed_together_with_its_start():
    reader = ToolCallParser(forced_start("add"))
    assert reader.feed(' {"a": 1, "b": 2}}</tool_call>') == ""
    assert reader.finish() == ("", [ADD])


def test_a_returned_answer_renders_as_it_was_sampled():
    sampled = 'I look.\n<tool_call>{"name": "sql", "arguments": {"q":"SELECT 1",  "n": [1,2]}}</tool_call>'
    content, calls = parse(sampled)
    tool_calls = [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    assert json.loads(calls[0].arguments) == {"q": "SELECT 1", "n": [1, 2]}
    assert answer_text({"role": "assistant", "content": content, "tool_calls": tool_calls}) == sampled
