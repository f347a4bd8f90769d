"""`AutoGenInstrumentor`: patches AutoGen so that it records spans, and restores it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from opentelemetry import trace
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from agl.content.filter import ContentFilter
from agl.patches import Patches
from agl.role_map import RoleMap
from agl_autogen._settings import Settings

Wrap = Callable[..., Any]


class AutoGenInstrumentor(BaseInstrumentor):
    """Traces every AutoGen team, agent and model call after `instrument()`; `uninstrument()` restores the framework.

        AutoGenInstrumentor().instrument(roles={"writer": "write.*"})

    Arguments of `instrument`, all optional:
    `roles`: maps a role to a regular expression for agent names; the role of any other agent is its name. `agl.role`
    overrides both.
    `capture_content`: whether spans hold messages, tool definitions and error messages (default:
    `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`, else True).
    `redact`: a function from str to str, applied to each text of that content before it is recorded (default: the
    `redact` of `agl.init`).
    `capture_token_ids`: whether the OpenAI client requests token ids and logprobs from the server (vLLM), so that calls
    can be trained on without a gateway.
    `message_bus`: whether AutoGen records spans of its message bus, about five for each message (default: False).
    `tracer_provider`: used for our spans in place of the global one.

    AutoGen itself makes `invoke_agent` and `execute_tool` spans. Added are: an `invoke_workflow` span around a team's
    run, a `chat` span for each model call, an `invoke_agent` span for agents that have none (core agents, and agents
    whose `on_messages` is called directly), a span for each hand-off, and the role on all of them. If a patch fails,
    `instrument` undoes the earlier ones and raises.
    """

    _patches = Patches()

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("autogen-core >= 0.7, < 0.8",)

    def _instrument(self, **kwargs: Any) -> None:
        settings = Settings(
            tracer=trace.get_tracer("agl_autogen", version("agl-autogen"), kwargs.get("tracer_provider")),
            roles=RoleMap(kwargs.get("roles")),
            content=ContentFilter.of(kwargs.get("capture_content"), kwargs.get("redact")),
            records_message_bus=bool(kwargs.get("message_bus")),
            captures_token_ids=bool(kwargs.get("capture_token_ids")),
        )
        with self._patches.all_or_none():
            _patch_teams(self._patches, settings)
            _patch_core(self._patches, settings)
            _patch_clients(self._patches, settings)
            _patch_openai(self._patches, settings)
            _patch_mcp(self._patches, settings)
            _patch_grpc(self._patches)

    def _uninstrument(self, **kwargs: Any) -> None:
        self._patches.restore()


def _patch_teams(patches: Patches, settings: Settings) -> None:
    """Runs of teams and turns of their agents, if AgentChat is installed.

    Before `_patch_core`: a team's agents are core agents as well, with an `on_message` of their own.
    """
    try:
        from autogen_agentchat.agents import _base_chat_agent
    except ImportError:
        return
    from autogen_agentchat.teams import BaseGroupChat
    from autogen_agentchat.teams._group_chat import _chat_agent_container
    from autogen_agentchat.teams._group_chat._sequential_routed_agent import SequentialRoutedAgent

    from agl_autogen._stream import isolated
    from agl_autogen._team_run import in_team_run, traced_run
    from agl_autogen._turn import as_turn, as_turn_stream, traced_agent

    agent_class = _base_chat_agent.BaseChatAgent
    patches.replace(BaseGroupChat, "run_stream", partial(traced_run, settings=settings))
    patches.replace(SequentialRoutedAgent, "on_message", partial(in_team_run, settings=settings))
    patches.replace(agent_class, "run_stream", isolated)
    for module in (_base_chat_agent, _chat_agent_container):
        patches.replace(module, "trace_invoke_agent_span", partial(traced_agent, settings=settings))
    _wrap_methods(patches, agent_class, {"on_messages": as_turn, "on_messages_stream": as_turn_stream}, settings)


def _patch_core(patches: Patches, settings: Settings) -> None:
    """Turns of core agents, the message bus, and tools."""
    from autogen_core import BaseAgent, _single_threaded_agent_runtime
    from autogen_core._telemetry import TraceHelper
    from autogen_core.tools import _base

    from agl_autogen._message_bus import handled_as_turn, traced_delivery, with_sender_context
    from agl_autogen._turn import traced_tool

    patches.replace(BaseAgent, "on_message", partial(handled_as_turn, settings=settings))
    patches.replace(_single_threaded_agent_runtime, "get_telemetry_envelope_metadata", with_sender_context)
    patches.replace(TraceHelper, "trace_block", partial(traced_delivery, settings=settings))
    patches.replace(_base, "trace_tool_span", partial(traced_tool, settings=settings))


def _patch_clients(patches: Patches, settings: Settings) -> None:
    """Model calls of every client class."""
    from autogen_core.logging import LLMCallEvent
    from autogen_core.models import ChatCompletionClient

    from agl_autogen._chat import capturing_event, traced_create, traced_create_stream

    calls = {"create": traced_create, "create_stream": traced_create_stream}
    _wrap_methods(patches, ChatCompletionClient, calls, settings)
    patches.replace(LLMCallEvent, "__init__", capturing_event)


def _patch_openai(patches: Patches, settings: Settings) -> None:
    """Requests and stream chunks of the OpenAI client, if it is installed."""
    try:
        from autogen_ext.models.openai import BaseOpenAIChatCompletionClient
    except ImportError:
        return

    from agl_autogen._chat import capturing_chunks, with_headers

    patches.replace(BaseOpenAIChatCompletionClient, "_process_create_args", partial(with_headers, settings=settings))
    for name in ("_create_stream_chunks", "_create_stream_chunks_beta_client"):
        patches.replace(BaseOpenAIChatCompletionClient, name, capturing_chunks)


def _patch_mcp(patches: Patches, settings: Settings) -> None:
    """Tools of MCP servers, if `mcp` is installed."""
    if find_spec("mcp") is None:
        return
    try:
        from autogen_ext.tools.mcp import McpSessionActor, _workbench
    except ImportError:  # AutoGen 0.7 does not support mcp 2
        return

    from agl_autogen._mcp import marking_errors
    from agl_autogen._turn import traced_tool

    patches.replace(McpSessionActor, "call", partial(marking_errors, content=settings.content))
    patches.replace(_workbench, "trace_tool_span", partial(traced_tool, settings=settings))


def _patch_grpc(patches: Patches) -> None:
    """Messages to other processes, if `autogen-ext[grpc]` is installed."""
    try:
        from autogen_ext.runtimes.grpc import GrpcWorkerAgentRuntime
    except ImportError:
        return

    from agl_autogen._message_bus import with_sender_headers

    patches.replace(GrpcWorkerAgentRuntime, "_send_message", with_sender_headers)


def _wrap_methods(patches: Patches, base: type, wrappers: Mapping[str, Wrap], settings: Settings) -> None:
    """Wrap the methods named in `wrappers` in `base` and in all of its subclasses, including those defined later."""

    def wrap_class(cls: type) -> None:
        for name, wrap in wrappers.items():
            method = vars(cls).get(name)
            if method is not None and not getattr(method, "__isabstractmethod__", False):
                patches.replace(cls, name, partial(wrap, settings=settings))

    def wrap_later_classes(original: Callable[..., None]) -> Any:
        def init_subclass(cls: Any, **options: Any) -> None:
            super(base, cls).__init_subclass__(**options)
            wrap_class(cls)

        return classmethod(init_subclass)

    for cls in (base, *_subclasses(base)):
        wrap_class(cls)
    patches.replace(base, "__init_subclass__", wrap_later_classes)


def _subclasses(cls: type) -> Iterator[type]:
    """All direct and indirect subclasses of `cls`, each once."""
    seen: set[type] = set()
    pending = cls.__subclasses__()
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending += current.__subclasses__()
            yield current
