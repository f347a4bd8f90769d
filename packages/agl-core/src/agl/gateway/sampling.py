"""Request fields, besides the temperature, that make an engine sample from less than the model's full distribution.

A policy gradient weighs a token with the probability under which it was sampled, and the trainer computes the logprobs
of the full distribution. Therefore a training call loses the fields that only shape the distribution. Those that the
agent depends on, because they constrain the form of the answer, stay and are recorded.
"""

from collections.abc import Mapping
from typing import Any, Final

from agl.gateway.engine_kind import EngineKind
from agl.tokens.capture import Json

_SHAPING: Final[Mapping[str, tuple[int, ...]]] = {
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": (),
    "bad_words": (),
    "min_tokens": (0,),
    "best_of": (1,),
    "use_beam_search": (),
}
"""Fields of vLLM and SGLang that shape or select, each with the numbers that change nothing."""
_CONSTRAINING: Final = (
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),  # vLLM
    *("json_schema", "regex", "ebnf", "custom_logit_processor"),  # SGLang
    *("allowed_token_ids", "logits_processors", "thinking_token_budget"),  # vLLM
)
"""Fields of vLLM and SGLang that mask or force tokens."""


def with_full_distribution(request: Json, kind: EngineKind, extra_body: Mapping[str, Any]) -> Json:
    """`request` without the fields that shape the distribution, and with the engine's neutral values.

    A field that `extra_body` sets to None is for engines that refuse it, and is left out.
    """
    kept = {name: value for name, value in request.items() if name not in _SHAPING}
    refused = {name for name, value in extra_body.items() if value is None}
    return kept | {name: value for name, value in kind.neutral_sampling.items() if name not in refused}


def constraints(request: Json, kind: EngineKind) -> list[str]:
    """Names of the fields in the engine's `request` due to which it does not sample from the full distribution."""
    found = [name for name, neutral in _SHAPING.items() if _is_set(request.get(name), neutral)]
    found += [name for name in _CONSTRAINING if _is_set(request.get(name))]
    if _is_set(response_format := request.get("response_format")) and response_format != {"type": "text"}:
        found.append("response_format")
    return found + (_tool_constraints(request) if kind.masks_tool_calls else [])


def _tool_constraints(request: Json) -> list[str]:
    choice, tools = request.get("tool_choice"), request.get("tools")
    if choice == "none" or not isinstance(tools, list):
        return []
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    is_strict = any(isinstance(function, dict) and function.get("strict") is True for function in functions)
    return ["tool_choice"] * (choice not in (None, "auto")) + ["tools[].function.strict"] * is_strict


def _is_set(value: Any, neutral: tuple[int, ...] = ()) -> bool:
    is_empty = value is None or value is False or value in ("", {}, [])
    return not is_empty and value not in neutral
