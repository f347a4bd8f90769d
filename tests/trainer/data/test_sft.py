"""Examples as training rows: written as the engine writes prompts, trained on the answer and its end."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch

from agl.errors import ConfigError
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.data.chat import ChatTemplate
from agl_trainer.data.rows import RowLogprobs, TrainingRow
from agl_trainer.data.sft_examples import (
    SftExample,
    check_examples,
    epoch_batches,
    example_tokens,
    examples_from_config,
    sft_rows,
)
from agl_trainer.engine.http.api import engine_app
from tests.trainer.scripted_sampler import PLAIN_TEMPLATE, TOOL_TEMPLATE, ScriptedSampler, serving, small_tokenizer
from tests.trainer.small_model import small_policy

ADD = {"type": "function", "function": {"strict": True, "parameters": {"type": "object"}, "name": "add"}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
EXAMPLES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]},
    "parts": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
        "tools": [ADD],
    },
}


def example(role: str = "writer", text: str = "hi", completion: str = "hello") -> dict[str, Any]:
    return {"role": role, "messages": [{"role": "user", "content": text}], "completion": completion}


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, TOOL_TEMPLATE], ids=["plain-template", "tool-template"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_prompt_is_what_the_engine_computes_for_the_same_request(template: str, name: str) -> None:
    tokenizer = small_tokenizer(template)
    sampler = ScriptedSampler(tokenizer)
    app = engine_app(sampler, tokenizer, served_name="writer", max_model_len=512, default_max_tokens=16)
    (answer,) = sampler.say("hello there")
    with serving(app) as url:
        httpx.post(f"{url}/v1/chat/completions", json={"model": "writer", **EXAMPLES[name]}).raise_for_status()
    ids, mask = example_tokens(ChatTemplate(tokenizer), EXAMPLES[name] | {"completion": "hello there"})
    asked = sampler.submitted[0]
    assert ids == asked.prompt_ids + answer
    assert mask == [0] * len(asked.prompt_ids) + [1] * len(answer)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids[-1] in asked.params.stop_token_ids


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, TOOL_TEMPLATE], ids=["plain-template", "tool-template"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_message_is_learned_as_the_template_writes_it(template: str, name: str) -> None:
    tokenizer = small_tokenizer(template)
    chat = ChatTemplate(tokenizer)

    def learned(completion: Any) -> tuple[list[int], list[int]]:
        given = EXAMPLES[name] | {"role": "writer", "completion": completion}
        check_examples([given], ["writer"], "m:f")
        return example_tokens(chat, given)

    message = {"role": "assistant", "content": "hello there"}
    parts = message | {"content": [{"type": "text", "text": "hello there"}]}
    assert learned(message) == learned([message]) == learned(parts) == learned("hello there")
    called = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
    ids, mask = learned(called)
    prompt = mask.index(1)
    # The next request of this conversation begins with the same tokens.
    later = [*EXAMPLES[name]["messages"], called, {"role": "tool", "tool_call_id": "c1", "content": "2"}]
    again, after = example_tokens(chat, EXAMPLES[name] | {"messages": later, "completion": "x"})
    assert again[: len(ids)] == ids and after[: len(ids)] == [0] * len(ids)
    assert "add" in tokenizer.decode(ids[prompt:]) and ids[-1] == chat.end_of_turn


def test_the_loss_of_a_batch_is_the_mean_over_its_trained_tokens() -> None:
    template = ChatTemplate(small_tokenizer())
    given = [example(completion="hello"), example(completion="hello there, hello there")]
    rows = sft_rows(examples_from_config({"writer": template}, given))
    lengths = [sum(row.loss_mask) for row in rows]
    assert lengths[0] < lengths[1]
    policy = small_policy()
    result = row_logprobs(policy, "writer", rows)
    loss, _ = sft_loss(result, rows)
    assert loss.item() == pytest.approx(-result.logprobs[result.mask].mean().item(), rel=1e-6)


def test_row_weights_carry_over_to_the_loss() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    result = RowLogprobs(torch.tensor([[-1.0, -2.0], [-4.0, 0.0]]), torch.zeros(2, 2), mask, 0)
    rows = [TrainingRow([1, 2, 3], [0, 1, 1], 0.5), TrainingRow([1, 2], [0, 1], 0.25)]
    assert sft_loss(result, rows)[0].item() == pytest.approx(1.5 + 1.0)


def test_an_epoch_has_every_example_once_in_batches_of_one_role() -> None:
    examples = [made("writer", i) for i in range(10)] + [made("fixer", i) for i in range(5)]
    first = epoch_batches(examples, 4, epoch=0, seed=1)
    assert [len(batch) for batch in first if batch[0].role == "writer"] == [4, 4, 2]
    assert [len(batch) for batch in first if batch[0].role == "fixer"] == [4, 1]
    assert all(len({item.role for item in batch}) == 1 for batch in first)
    assert numbers([item for batch in first for item in batch]) == numbers(examples)
    # The roles take turns: the fixer's second batch does not wait for the writer's last.
    roles = [batch[0].role for batch in first]
    assert [set(roles[:2]), roles[2], set(roles[3:])] == [{"writer", "fixer"}, "writer", {"writer", "fixer"}]


def made(role: str, number: int) -> SftExample:
    return SftExample(role, [number, 1], [0, 1])


def numbers(examples: Sequence[SftExample]) -> list[tuple[str, int]]:
    return sorted((item.role, item.token_ids[0]) for item in examples)


def test_the_order_of_an_epoch_is_its_own_and_comes_again() -> None:
    examples = [made("writer", i) for i in range(20)]
    one = epoch_batches(examples, 4, epoch=0, seed=1)
    assert epoch_batches(examples, 4, epoch=0, seed=1) == one
    assert epoch_batches(examples, 4, epoch=1, seed=1) != one
    assert epoch_batches(examples, 4, epoch=0, seed=2) != one


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"role": "writer", "messages": []}, "sft.examples: m:f: example 1 lacks completion"),
        (example("judge"), "sft.examples: example 1 has role 'judge'; agent_roles has writer, fixer"),
        (example() | {"completion": 7}, "example 1: completion: Input should be a valid dictionary or instance of"),
        (example() | {"completion": None}, "example 1: completion: Input should be a valid dictionary or instance of"),
        (
            example() | {"completion": {"role": "user", "content": "x"}},
            "example 1: completion: its role is 'user', expected 'assistant'",
        ),
        (
            example() | {"completion": {"role": "assistant"}},
            "example 1: completion: the message has neither content nor",
        ),
        (example() | {"messages": []}, "example 1: messages: List should have at least 1 item"),
        (example() | {"messages": [{"role": "user"}]}, "example 1: messages.0: a message of role 'user' needs content"),
    ],
)
def test_an_example_that_cannot_be_used_is_refused_by_its_number(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_examples([example(), bad], ["writer", "fixer"], "m:f")
    assert message in str(error.value)
