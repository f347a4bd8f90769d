"""Turns of a conversation, with engines that take prompt ids and engines that do not."""

import json
from typing import Any

import pytest

from agl import semconv
from agl.gateway import conversation
from agl.gateway.conversation import Agent, AssistantMessage, Conversations, SampledTurn
from agl.gateway.drift_kind import kind_of_drift
from agl.span import Span
from agl.tokens.drift import Drift, Drifted, first_difference
from agl.tokens.packing import pack_ids
from tests.core.fake_engine import END, PROMPT_IDS, TURN, WORDS, FakeEngine
from tests.gateway.scripted_engine import answering, choice
from tests.gateway.serving import IDS, Setup, chat_body, gateway, ids

URL = "/rollout/r1/attempt/a1/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "".join(WORDS)}
NEXT = {"role": "user", "content": "on"}


def second_turn(setup: Setup, *more: dict[str, Any], **options: Any) -> Span:
    """The span of a call that continues another."""
    for messages in ([USER], [USER, ANSWER, *(more or (NEXT,))]):
        assert setup.post(chat_body() | {"messages": messages} | options, URL).status_code == 200
    return setup.store.appended[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_of_kind_vllm_gets_the_sampled_tokens(stream: bool) -> None:
    with gateway(exact_prefix=True) as setup:
        span = second_turn(setup, stream=stream)
        expected = PROMPT_IDS + IDS + [TURN, ord("o"), ord("n"), END, TURN]
        assert setup.engine.seen[1]["kv_transfer_params"] == {"prompt_token_ids": expected}
        assert setup.engine.seen[1]["messages"] == [USER, ANSWER, NEXT]
        assert ids(span, semconv.PROMPT_TOKEN_IDS) == expected
        assert span.text(semconv.GATEWAY_PREFIX) == "exact"
        assert semconv.GATEWAY_DRIFT not in span.attributes
        assert "kv_transfer_params" not in (span.text(semconv.GATEWAY_CHANGED) or "")


def test_prompt_ids_are_added_to_the_client_s_transfer_parameters() -> None:
    with gateway(exact_prefix=True) as setup:
        second_turn(setup, kv_transfer_params={"do_remote_prefill": False})
        assert setup.engine.seen[0]["kv_transfer_params"] == {"do_remote_prefill": False}
        assert setup.engine.seen[1]["kv_transfer_params"].keys() == {"do_remote_prefill", "prompt_token_ids"}


def test_a_call_that_continues_no_other_is_sent_unchanged() -> None:
    with gateway(exact_prefix=True) as setup:
        setup.post(chat_body(), URL)
        setup.post(chat_body(), "/rollout/r2/attempt/a1/v1/chat/completions")
        setup.post(chat_body() | {"messages": [USER, ANSWER, NEXT]})  # Without a conversation.
        assert all("kv_transfer_params" not in body for body in setup.engine.seen)
        assert all(semconv.GATEWAY_PREFIX not in span.attributes for span in setup.store.appended)


@pytest.mark.parametrize(
    ("api", "turns"),
    [
        ("messages", [USER, {"role": "assistant", "content": [{"type": "text", "text": "".join(WORDS)}]}, NEXT]),
        ("responses", [USER, {"role": "assistant", "content": "".join(WORDS)}, NEXT]),
    ],
)
def test_translated_apis_have_exact_prefixes_too(api: str, turns: list[dict[str, Any]]) -> None:
    url = f"/rollout/r1/attempt/a1/v1/{api}"
    with gateway(exact_prefix=True) as setup:
        for messages in (turns[:1], turns):
            body = {"model": "writer@3", "max_tokens": 9, "messages" if api == "messages" else "input": messages}
            assert setup.post(body, url).status_code == 200
        assert setup.store.appended[-1].text(semconv.GATEWAY_PREFIX) == "exact"


def test_calls_of_one_trace_form_a_conversation() -> None:
    parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    with gateway(exact_prefix=True) as setup:
        setup.post(chat_body() | {"messages": [USER]}, **parent)
        setup.post(chat_body() | {"messages": [USER, ANSWER, NEXT]}, **parent)
        assert setup.store.appended[-1].text(semconv.GATEWAY_PREFIX) == "exact"


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (FakeEngine(takes_tokens="ignores"), "the engine takes no tokens in a chat"),
        (FakeEngine(takes_tokens="refuses"), "the engine refused the tokens: extra inputs are not permitted"),
        (FakeEngine(tokenizes=False), "/tokenize answered 404: Not Found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_takes_no_tokens_uses_its_template(engine: FakeEngine, why: str, stream: bool) -> None:
    with gateway(engine, exact_prefix=True) as setup:
        span = second_turn(setup, stream=stream)
        assert (span.status, span.text(semconv.GATEWAY_PREFIX)) == ("ok", why)
        assert ids(span, semconv.PROMPT_TOKEN_IDS) == PROMPT_IDS
        assert json.loads(span.text(semconv.GATEWAY_DRIFT) or "") == {
            "kind": "retokenized",
            "after": setup.store.appended[0].span_id,
            "position": 3,
            "sampled": {"id": IDS[0], "text": None},
            "prompt": {"id": None, "text": None},
        }


@pytest.mark.parametrize(
    ("options", "more", "why"),
    [
        ({"add_generation_prompt": False}, (NEXT,), "the request continues its last message"),
        ({}, (NEXT, {"role": "assistant", "content": "Well,"}), "the request continues its last message"),
        (
            {},
            ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},),
            "the messages contain more than text",
        ),
    ],
)
def test_requests_without_a_known_prompt_are_left_to_the_template(
    options: dict[str, Any], more: tuple[dict[str, Any], ...], why: str
) -> None:
    with gateway(exact_prefix=True) as setup:
        assert second_turn(setup, *more, **options).text(semconv.GATEWAY_PREFIX) == why


def test_without_exact_prefix_the_request_is_unchanged_and_drift_is_recorded() -> None:
    with gateway(FakeEngine(tokenizes=False)) as setup:
        span = second_turn(setup)
        assert "kv_transfer_params" not in setup.engine.seen[1]
        assert semconv.GATEWAY_PREFIX not in span.attributes
        drifted = Drifted.of_json(span.text(semconv.GATEWAY_DRIFT) or "")
        assert drifted is not None and drifted.kind == Drift.RETOKENIZED


def test_different_tools_make_a_different_conversation() -> None:
    """The sampled tokens would hide the new tools from the model."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    with gateway(exact_prefix=True) as setup:
        setup.post(chat_body() | {"messages": [USER]}, URL)
        setup.post(chat_body() | {"messages": [USER, ANSWER, NEXT], "tools": tools}, URL)
        assert "kv_transfer_params" not in setup.engine.seen[1]
        assert (
            setup.store.appended[1].text(semconv.GATEWAY_PREFIX)
            == "no recorded call has the messages that these continue"
        )


@pytest.mark.parametrize("messages", [None, "hi", [], [1], [{"role": "assistant", "tool_calls": 3}, NEXT]])
def test_malformed_messages_are_passed_to_the_engine(messages: Any) -> None:
    with gateway(exact_prefix=True) as setup:
        setup.post(chat_body() | {"messages": [USER]}, URL)
        setup.post(chat_body() | {"messages": messages}, URL)
        assert setup.post(chat_body() | {"messages": [USER, ANSWER, NEXT]}, URL).status_code == 200


# --- Conversations and drift, as pure functions ----------------------------------------------------------------------


def test_the_first_token_that_differs_is_found_at_every_position() -> None:
    held = list(range(100, 140))
    for position in range(40):
        for prompt in ([*held[:position], 7, *held[position + 1 :], 9], held[:position]):
            found = first_difference(pack_ids(held), pack_ids(prompt))
            assert found is not None
            assert (found.position, found.sampled) == (position, held[position])
            assert found.prompt == (prompt[position] if position < len(prompt) else None)
    assert first_difference(pack_ids(held), pack_ids([*held, 1])) is None


def message(text: str = "", reasoning: str = "", *calls: tuple[str, str]) -> AssistantMessage:
    return AssistantMessage(text, reasoning, calls)


@pytest.mark.parametrize(
    ("given", "sent_back", "texts", "kind"),
    [
        (message("a b"), message("a b"), ("a b<e>", "a b<e>more", "<e>"), Drift.RETOKENIZED),
        (message("a b "), message("a b"), (" <e>", "<e>more", "<e>"), Drift.WHITESPACE),
        (message("x</think>a"), message("a"), ("x</think>\na<e>", "a<e>more", "<e>"), Drift.REASONING),
        (message("a", "x"), message("a"), ("x</think>\na<e>", "</think>\na<e>", "<e>"), Drift.REASONING),
        (
            message("", "", ("add", "{}")),
            message("", "", ("add", "{}")),
            ('{"a":1}<e>', '{"a": 1}<e>', "<e>"),
            Drift.ARGUMENTS,
        ),
        (
            message("", "", ("add", "{}")),
            message("", "", ("add", "{}")),
            ("\nadd{}<e>", "add{}<e>", "<e>"),
            Drift.WHITESPACE,
        ),
        (message("a"), message("a"), ("a<e>", "b<e>", "<e>"), Drift.REWRITTEN),
        (message("a b"), message("a b"), (" b", " b<e>more", ""), Drift.RETOKENIZED),
        (message("a b "), message("a b"), (" b ", " b<e>more", ""), Drift.WHITESPACE),
        (message("a", "x"), message("a"), None, Drift.REASONING),
        (message("", "", ("add", '{"a":1}')), message("", "", ("add", '{"a": 1}')), None, Drift.ARGUMENTS),
        (message("a "), message("a"), None, Drift.WHITESPACE),
        (message("a"), message("a"), None, Drift.RETOKENIZED),
    ],
)
def test_kinds_of_drift(
    given: AssistantMessage, sent_back: AssistantMessage, texts: tuple[str, str, str] | None, kind: Drift
) -> None:
    assert given.means_the_same(sent_back)
    assert kind_of_drift(given, sent_back, texts) == kind


@pytest.mark.parametrize(
    "other", [message("b"), message("a", "", ("add", "{}")), message("a", "x", ("add", '{"a": 2}'))]
)
def test_a_different_answer_does_not_mean_the_same(other: AssistantMessage) -> None:
    assert not message("a").means_the_same(other)


def sibling(text: str = "42", reasoning: str = "", call_id: str = "", agent: Agent = (None, None)) -> SampledTurn:
    """A turn with tokens of its own."""
    calls = (("add", "{}"),) if call_id else ()
    answer = AssistantMessage(text, reasoning, calls, (call_id,) if call_id else ())
    return SampledTurn(None, pack_ids(map(ord, f"{reasoning}{call_id}{agent}{text}")), answer, True, "s", agent)


def sent_back(text: str = "42", call_id: str = "", **more: str) -> dict[str, Any]:
    calls = [{"id": call_id, "function": {"name": "add", "arguments": "{}"}}] if call_id else []
    return {"role": "assistant", "content": text, "tool_calls": calls} | more


@pytest.mark.parametrize(
    ("turns", "answer", "agent", "continued"),
    [
        ([sibling()], sent_back(), (None, None), 0),
        ([sibling(reasoning="a"), sibling(reasoning="b")], sent_back(), (None, None), None),
        ([sibling(reasoning="a"), sibling(reasoning="a")], sent_back(), (None, None), 1),
        ([sibling(reasoning="a"), sibling(reasoning="b")], sent_back(reasoning_content="a"), (None, None), 0),
        ([sibling("a</think>42"), sibling("b</think>42")], sent_back("b</think>42"), (None, None), 1),
        ([sibling(), sibling(" 42")], sent_back(), (None, None), None),
        ([sibling(call_id="1"), sibling(call_id="2")], sent_back(call_id="1"), (None, None), 0),
        ([sibling(call_id="1"), sibling(call_id="2")], sent_back(call_id="new"), (None, None), None),
        ([sibling(agent=("planner", "s1")), sibling(agent=("fixer", "s1"))], sent_back(), ("planner", "s1"), 0),
        ([sibling(agent=(None, "s1")), sibling(agent=(None, "s2"))], sent_back(), (None, "s2"), 1),
        ([sibling(agent=(None, "s1")), sibling(agent=(None, "s2"))], sent_back(), (None, "s3"), None),
    ],
)
def test_of_several_equal_answers_the_one_is_continued_that_something_unique_identifies(
    turns: list[SampledTurn], answer: dict[str, Any], agent: Agent, continued: int | None
) -> None:
    conversations, key = Conversations(), ("r", "a", "m")
    for turn in turns:
        asked = conversations.locate(key, {"messages": [USER]})
        assert asked is not None
        conversations.add(asked, turn)
    found = conversations.locate(key, {"messages": [USER, answer, NEXT]}, agent)
    assert found is not None
    assert found.unchanged is found.previous is (None if continued is None else turns[continued])
    assert found.is_ambiguous == (continued is None)


def test_an_edited_answer_of_several_is_compared_with_none_of_them() -> None:
    conversations, key = Conversations(), ("r", "a", "m")
    for turn in (sibling("42"), sibling("43")):
        asked = conversations.locate(key, {"messages": [USER]})
        assert asked is not None
        conversations.add(asked, turn)
    found = conversations.locate(key, {"messages": [USER, sent_back("44"), NEXT]})
    assert found is not None and (found.previous, found.unchanged, found.is_ambiguous) == (None, None, True)


@pytest.mark.parametrize("thoughts", ["", "(10,)"])
def test_the_span_of_a_call_that_may_continue_several_equal_answers_has_the_reason(thoughts: str) -> None:
    calls = [choice(ids=ids) | {"message": {"content": "hi", "reasoning": str(ids)}} for ids in ((10,), (20,))]
    with gateway(answering(*calls), exact_prefix=True) as setup:
        for turns in ([USER], [USER, {"role": "assistant", "content": "hi", "reasoning": thoughts}, NEXT]):
            setup.post(chat_body(n=2, model="base") | {"messages": turns}, URL)
        is_ambiguous = setup.store.appended[-1].text(semconv.GATEWAY_PREFIX) == (
            "several calls gave the answer that these messages continue"
        )
    assert is_ambiguous == (not thoughts)


def test_beyond_the_limit_the_least_recently_continued_conversations_are_dropped() -> None:
    conversations = Conversations(limit=20_000)
    messages = [USER, ANSWER, NEXT]
    for number in range(20):
        position = conversations.locate((f"r{number}", "", "m"), {"messages": [USER]})
        assert position is not None
        conversations.add(
            position, SampledTurn(None, pack_ids(range(500)), AssistantMessage("".join(WORDS), "", ()), True, "s")
        )
        assert conversations.size <= 20_000

    def is_known(number: int) -> bool:
        position = conversations.locate((f"r{number}", "", "m"), {"messages": messages})
        return position is not None and position.unchanged is not None

    assert [number for number in range(20) if is_known(number)] == list(range(14, 20))


def test_a_conversation_that_is_not_continued_for_long_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "_IDLE_S", 0.0)
    conversations = Conversations()
    for key in (("r0", "", "m"), ("r1", "", "m")):
        position = conversations.locate(key, {"messages": [USER]})
        assert position is not None
        conversations.add(position, SampledTurn(None, b"", AssistantMessage("".join(WORDS), "", ()), True, "s"))
        sizes = conversations.size
    found = [conversations.locate((name, "", "m"), {"messages": [USER, ANSWER, NEXT]}) for name in ("r0", "r1")]
    assert [position is not None and position.unchanged is not None for position in found] == [False, True]
    assert conversations.size == sizes


def test_a_malformed_drift_attribute_is_ignored() -> None:
    for text in (
        "",
        "[]",
        "{}",
        '{"kind": "clean"}',
        '{"kind": 1, "position": 2, "sampled": 3, "prompt": 4, "after": 5}',
    ):
        assert Drifted.of_json(text) is None
