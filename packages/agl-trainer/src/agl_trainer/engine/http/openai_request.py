"""Request bodies of the OpenAI API, validated. A parameter that the engine does not support is rejected by name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from agl_trainer.data.messages import ApiObject, Conversation, describe_field, shorten
from agl_trainer.engine.protocol import EngineError


class RequestError(EngineError):
    """An invalid request, or one with an unsupported parameter. `param` is the parameter at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _as_prompts(prompt: Any) -> Any:
    """`prompt` in any of its four forms, as a list of texts and lists of token ids."""
    whole = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not isinstance(whole, list) or not whole or not all(isinstance(item, str) or _is_ids(item) for item in whole):
        raise ValueError("expected a text, a list of texts, a list of token ids, or a list of such lists")
    return whole


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


class ChosenFunction(ApiObject):
    name: str


class ToolChoice(ApiObject):
    type: Literal["function"]
    function: ChosenFunction


class StreamOptions(ApiObject):
    include_usage: bool = False


class KvTransferParams(ApiObject):
    """vLLM's field for a prompt given as token ids."""

    prompt_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None


class _GenerationRequest(BaseModel):
    """Parameters that chat and text completions share."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Conversation, _GenerationRequest):
    """Body of POST /v1/chat/completions."""

    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    kv_transfer_params: KvTransferParams | None = None

    @model_validator(mode="after")
    def _parameters_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        names = [tool.function.name for tool in self.tools]
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is 'required', but the request has no tools")
        if self.forced_tool is not None and self.forced_tool not in names:
            raise ValueError(f"tool_choice names {self.forced_tool!r}, which is not among the tools {names}")
        return self

    @property
    def forced_tool(self) -> str | None:
        """The tool that `tool_choice` names, if it names one."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tool_definitions()

    @property
    def prompt_ids(self) -> list[int] | None:
        """The prompt as token ids, if the request has them; they replace `messages`."""
        return self.kv_transfer_params.prompt_token_ids if self.kv_transfer_params else None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives_per_token(self) -> int:
        return self.top_logprobs


class CompletionRequest(_GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives_per_token(self) -> int:
        return self.logprobs or 0


class TokenizeRequest(Conversation):
    """Body of POST /tokenize."""

    model: str | None = None
    add_generation_prompt: Literal[True] = True


class DetokenizeRequest(ApiObject):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Unsupported parameters, each with the values that mean the same as its absence."""

_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Parameters that concern the OpenAI service only and do not change the answer."""

_ALTERNATIVE = {"response_format": "decoding is not constrained; ask for the format in the prompt, or offer a tool"}

RequestT = TypeVar("RequestT", ChatRequest, CompletionRequest)
BodyT = TypeVar("BodyT", bound=BaseModel)


def parse_request(model: type[BodyT], data: object) -> BodyT:
    """Validate a decoded JSON body. Raises RequestError, which names every invalid parameter."""
    if not isinstance(data, dict):
        raise RequestError(f"the request body is {type(data).__name__}, expected a JSON object")
    try:
        return model.model_validate(_supported(data))
    except ValidationError as error:
        items = error.errors()
        param = ".".join(map(str, items[0]["loc"][:1])) or None
        raise RequestError("; ".join(_describe(item) for item in items), param) from error


def _supported(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without nulls, which mean the default as in the OpenAI API, and without parameters that change nothing."""
    for name, neutral in _UNSUPPORTED.items():
        value = data.get(name)
        if value is not None and value not in neutral:
            advice = _ALTERNATIVE.get(name, "leave it out")
            raise RequestError(f"{name} = {shorten(value)} is not supported by this engine; {advice}", name)
    dropped = _IGNORED | _UNSUPPORTED.keys()
    return {name: value for name, value in data.items() if value is not None and name not in dropped}


def _describe(item: Any) -> str:
    """A sentence on one pydantic error, with the path of the parameter."""
    if item["type"] == "extra_forbidden":
        path = ".".join(str(part) for part in item["loc"])
        return f"{path}: this engine does not know the parameter; leave it out"
    return describe_field(item)
