"""Turns with the in-process engine, whose chat templates make tokens drift: reported, or avoided by `exact_prefix`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from agl.cli.inspection import Inspection
from agl.config import GatewayConfig
from agl.server_thread import ServerThread
from agl.store import Store, open_store
from agl.trajectory import Call, Drift, build_trajectory
from agl_trainer.engine.http.api import engine_app
from tests.trainer.scripted_sampler import PLAIN_TEMPLATE, Script, ScriptedSampler, events, small_tokenizer

TRIMMING = PLAIN_TEMPLATE.replace("m['content']", "m['content'] | trim")
FORGETFUL = PLAIN_TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1].lstrip()")
"""Drops the thoughts of earlier answers, as Qwen3's does."""
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\nCall as <tool_call>:{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.get('tool_calls') or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Formats arguments again, with different blanks."""
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
END = "<|im_end|>"


@dataclass
class Conversation:
    """A client that sends back what it was answered, and its gateway's engine."""

    url: str
    store: Store
    sampler: ScriptedSampler
    tokenizer: PreTrainedTokenizerBase
    stream: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, content: str, *answer: int | str, role: str = "user", **more: str) -> dict[str, Any]:
        """The answer that the engine samples as these token ids or texts."""
        self.messages.append({"role": role, "content": content} | more)
        ids = [token for part in answer for token in ([part] if isinstance(part, int) else self.sampler.ids(part))]
        self.sampler.scripts.append(Script(ids))
        body = {"model": "writer", "messages": self.messages, "stream": self.stream} | self.options
        answered = httpx.post(f"{self.url}/chat/completions", json=body, timeout=60)
        assert answered.status_code == 200, answered.text
        self.messages.append(_streamed(answered) if self.stream else answered.json()["choices"][0]["message"])
        return self.messages[-1]

    @property
    def spans(self) -> Sequence[Any]:
        return self.store.query_spans("r1")

    @property
    def calls(self) -> list[Call]:
        return build_trajectory(self.spans).calls

    def token_ids(self, text: str) -> list[int]:
        """`text` as no tokenizer writes it: a token for each character."""
        return [token for character in text for token in self.sampler.ids(character)]


def _streamed(answer: httpx.Response) -> dict[str, Any]:
    deltas = [chunk["choices"][0]["delta"] for chunk in events(iter(answer.text.splitlines()))]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(delta.get("content") or "" for delta in deltas)}
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    return message | ({"tool_calls": calls} if calls else {})


@contextmanager
def conversation(template: str, *, exact: bool = False, stream: bool = False, **options: Any) -> Iterator[Conversation]:
    tokenizer = small_tokenizer(template)
    sampler = ScriptedSampler(tokenizer)
    app = engine_app(sampler, tokenizer, served_name="base", max_model_len=512, default_max_tokens=64)
    store, config = open_store("memory://"), GatewayConfig(exact_prefix=exact)
    with ServerThread(store, port=0, otlp_http_port=0, upstream=app, gateway=config) as server:
        url = f"{server.base_url}/rollout/r1/attempt/a1/v1"
        yield Conversation(url, store, sampler, tokenizer, stream, options)
    store.close()


def speak(template: str, talk: Conversation) -> None:
    """Two turns of which the first is sampled so that `template` writes it otherwise."""
    if template == TRIMMING:
        talk.ask("hi", "hello \n" + END)
    elif template == FORGETFUL:
        talk.ask("hi", "<think>hm</think>\n\nhello" + END)
    elif template == WITH_TOOLS:
        talk.options["tools"] = [ADD]
        answered = talk.ask("1 + 2?", 'I add.<tool_call>{"name": "add", "arguments": {"a":1}}</tool_call>' + END)
        assert answered["tool_calls"][0]["function"]["arguments"] == '{"a":1}'
        return void(talk.ask("3", "three" + END, role="tool", tool_call_id=answered["tool_calls"][0]["id"]))
    else:
        talk.ask("hi", *talk.token_ids("hello"), END)
    talk.ask("and?", "there" + END)


def void(_: object) -> None:
    """For a call whose answer is of no interest."""


KINDS = {
    PLAIN_TEMPLATE: Drift.RETOKENIZED,
    TRIMMING: Drift.WHITESPACE,
    FORGETFUL: Drift.REASONING,
    WITH_TOOLS: Drift.ARGUMENTS,
}


@pytest.mark.parametrize("template", KINDS, ids=KINDS.values())
def test_drift_is_named_with_its_first_token(template: str) -> None:
    with conversation(template) as talk:
        speak(template, talk)
        first, second = talk.calls
        assert first.drifted is None and second.drifted is not None
        assert (second.drifted.kind, second.drifted.after) == (KINDS[template], first.span_id)
        found = second.drifted.difference
        sampled, prompt = [*(first.prompt_ids or ()), *(first.response_ids or ())], second.prompt_ids or []
        assert sampled[: found.position] == prompt[: found.position]
        assert (found.sampled, found.prompt) == (sampled[found.position], prompt[found.position])
        assert found.sampled != found.prompt
        decode = talk.tokenizer.decode
        assert (found.sampled_text, found.prompt_text) == (decode([found.sampled]), decode([found.prompt]))
        trajectory = build_trajectory(talk.spans)
        assert [[turn.drift for turn in row.turns] for row in trajectory.rows] == [[None], [KINDS[template]]]
        assert f"row 2 ({KINDS[template]}: {found})" in Inspection(talk.spans).text()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("template", KINDS, ids=KINDS.values())
def test_an_exact_prefix_keeps_turns_in_one_row(template: str, stream: bool) -> None:
    with conversation(template, exact=True, stream=stream) as talk:
        speak(template, talk)
        (row,) = build_trajectory(talk.spans).rows
        first, second = talk.calls
        assert [turn.drift for turn in row.turns] == [None, Drift.CLEAN]
        assert (first.prefix, second.prefix, second.drifted) == (None, "exact", None)
        sampled = [*(first.prompt_ids or ()), *(first.response_ids or ())]
        template_text = talk.tokenizer.decode((second.prompt_ids or [])[len(sampled) :])
        asked = talk.messages[2]
        assert template_text == f"\n<|im_start|>{asked['role']}\n{asked['content']}<|im_end|>\n<|im_start|>assistant\n"
        assert talk.sampler.submitted[1].prompt_ids == second.prompt_ids
        assert talk.messages[-1]["content"] in ("there", "three")


def test_exact_turns_share_their_tokens() -> None:
    with conversation(FORGETFUL, exact=True) as talk:
        for turn in range(5):
            talk.ask(f"question {turn}", f"<think>{turn}</think>\n\nanswer {turn}{END}")
        (row,) = build_trajectory(talk.spans).rows
        assert len(row.turns) == 5
        assert talk.tokenizer.decode(row.token_ids).count("<think>") == 5


def test_an_answer_that_was_cut_short_is_ended_by_the_template() -> None:
    with conversation(TRIMMING, exact=True, max_tokens=3) as talk:
        talk.ask("hi", "hello \n there")
        talk.ask("on", "so" + END)
        (row,) = build_trajectory(talk.spans).rows
        assert [turn.call.finish_reason for turn in row.turns] == ["length", "stop"]
        first = talk.calls[0]
        text = talk.tokenizer.decode(row.token_ids[len(first.prompt_ids or ()) :])
        cut = talk.tokenizer.decode(first.response_ids or [])
        assert text == f"{cut}<|im_end|>\n<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\nso<|im_end|>"


def test_an_answer_that_ends_at_a_stop_string_keeps_its_sampled_tokens() -> None:
    with conversation(PLAIN_TEMPLATE, exact=True, stop=["there"]) as talk:
        assert talk.ask("hi", "hello there")["content"] == "hello "
        talk.ask("on", "so" + END)
        (row,) = build_trajectory(talk.spans).rows
        assert "hello there<|im_end|>" in talk.tokenizer.decode(row.token_ids)


def test_an_edited_answer_is_reported_and_not_replaced() -> None:
    with conversation(PLAIN_TEMPLATE, exact=True) as talk:
        talk.ask("hi", "hello" + END)
        talk.messages[-1] = {"role": "assistant", "content": "good day"}
        talk.ask("and?", "there" + END)
        second = talk.calls[1]
        assert second.drifted is not None and second.drifted.kind == Drift.EDITED
        assert second.prefix == "the client changed the answer"
        assert "good day" in talk.tokenizer.decode(second.prompt_ids or [])
        assert "no exact prefix: the client changed the answer" in Inspection(talk.spans).text()


def test_of_several_choices_the_one_that_was_sent_back_is_continued() -> None:
    with conversation(PLAIN_TEMPLATE, exact=True) as talk:
        talk.sampler.scripts.append(Script(talk.sampler.ids("one" + END)))
        talk.options["n"] = 2
        talk.ask("hi", *talk.token_ids("two"), END)
        del talk.options["n"]
        chosen = talk.sampler.submitted[1]
        talk.messages[-1] = {"role": "assistant", "content": "two"}
        talk.ask("and?", "so" + END)
        prompt = talk.calls[-1].prompt_ids or []
        assert prompt[: len(chosen.prompt_ids) + 3] == [*chosen.prompt_ids, *talk.token_ids("two")]


def test_a_template_with_a_different_end_of_turn_renders_the_prompt_itself() -> None:
    odd = PLAIN_TEMPLATE.replace("{{ m['content'] }}<|im_end|>", "{{ m['content'] }}<|endoftext|>")
    with conversation(odd, exact=True) as talk:
        talk.ask("hi", "hello" + END)
        talk.ask("and?", "there" + END)
        assert talk.calls[1].prefix == "the chat template ends an answer with a different token than the model did"


def test_a_prompt_too_long_for_the_engine_is_rendered_by_the_template() -> None:
    """What was thought stays in an exact prompt, and counts."""
    with conversation(FORGETFUL, exact=True, max_tokens=300) as talk:
        talk.ask("hi", "<think>" + "h" * 250 + "</think>\n\nhello" + END)
        talk.ask("and?", "there" + END)
        second = talk.calls[1]
        assert (second.prefix or "").startswith("the engine refused the tokens: this model's maximum context length")
        assert second.drifted is not None and second.drifted.kind == Drift.REASONING


def test_a_call_that_continues_no_known_call_reports_it() -> None:
    with conversation(PLAIN_TEMPLATE, exact=True) as talk:
        talk.messages += [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        talk.ask("and?", "there" + END)
        assert talk.calls[0].prefix == "no recorded call has the messages that these continue"
