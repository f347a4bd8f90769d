"""`AutoGenInstrumentor`: switches the spans on, and off again without a trace."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from opentelemetry import trace
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from agl.content.filter import ContentFilter
from agl.role_map import RoleMap
from agl_autogen._patch import Patches
from agl_autogen._settings import Settings

Wrap = Callable[[Any], Any]


class AutoGenInstrumentor(BaseInstrumentor):
    """`instrument()` traces every AutoGen team, agent and model call; `uninstrument()` leaves the framework as it was.

    `instrument` takes, all optional:
    `roles`: maps a role to a regular expression over agent names; any other agent's role is its name. A role that
    `agl.role` states comes before both.
    `capture_content`: whether messages, tool definitions and what errors say go on the spans; None leaves it to
    `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`, and without that they do.
    `redact`: a function from str to str that is given every text of those before it is on a span; None leaves it to
    `agl.init`.
    `capture_token_ids`: whether the OpenAI client asks the server, which must be vLLM or the like, for token ids and
    logprobs, so that calls can be trained on without a gateway.
    `tracer_provider`: for our spans in place of the global one.

    AutoGen makes `invoke_agent` and `execute_tool` spans itself; what is added is one `invoke_workflow` span around
    a team's run, a `chat` span for every model call, `invoke_agent` for the agents that AutoGen makes none for (core
    agents, and those whose `on_messages` is called directly), hand-offs, and the role on all of them. AutoGen's spans
    of its message bus outnumber them by far: `AUTOGEN_DISABLE_RUNTIME_TRACING=true` silences those.
    """

    _patches = Patches()

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("autogen-core >= 0.7, < 0.8",)

    def _instrument(self, **kwargs: Any) -> None:
        settings = Settings(
            tracer=trace.get_tracer("agl_autogen", version("agl-autogen"), kwargs.get("tracer_provider")),
            roles=RoleMap(kwargs.get("roles")),
            content=ContentFilter.of(kwargs.get("capture_content"), kwargs.get("redact")),
            captures_token_ids=bool(kwargs.get("capture_token_ids")),
        )
        try:
            _patch_teams(self._patches, settings)
            _patch_core(self._patches, settings)
            _patch_clients(self._patches, settings)
            _patch_openai(self._patches, settings)
            _patch_mcp(self._patches, settings)
        except BaseException:
            self._patches.restore()
            raise

    def _uninstrument(self, **kwargs: Any) -> None:
        self._patches.restore()


def _patch_teams(patches: Patches, settings: Settings) -> None:
    """Runs of teams and turns of their agents, where AgentChat is installed.

    Before `_patch_core`: a team's agents are core agents too, and keep an `on_message` of their own.
    """
    try:
        from autogen_agentchat.agents import _base_chat_agent
    except ImportError:
        return
    from autogen_agentchat.teams import BaseGroupChat
    from autogen_agentchat.teams._group_chat import _chat_agent_container
    from autogen_agentchat.teams._group_chat._sequential_routed_agent import SequentialRoutedAgent

    from agl_autogen._run import in_run, traced_run
    from agl_autogen._stream import isolated
    from agl_autogen._turn import in_role, turn, turn_stream

    agent_class = _base_chat_agent.BaseChatAgent
    patches.replace(BaseGroupChat, "run_stream", partial(traced_run, settings=settings))
    patches.replace(SequentialRoutedAgent, "on_message", partial(in_run, settings=settings))
    patches.replace(agent_class, "run_stream", isolated)
    for module in (_base_chat_agent, _chat_agent_container):
        patches.replace(module, "trace_invoke_agent_span", partial(in_role, settings=settings))
    turns = {"on_messages": turn, "on_messages_stream": turn_stream}
    _wrap_methods(patches, agent_class, {name: partial(wrap, settings=settings) for name, wrap in turns.items()})


def _patch_core(patches: Patches, settings: Settings) -> None:
    """Turns of core agents, their message bus, and the tools of all."""
    from autogen_core import BaseAgent, _single_threaded_agent_runtime
    from autogen_core._telemetry import TraceHelper
    from autogen_core.tools import _base

    from agl_autogen._bus import delivering, with_context
    from agl_autogen._core_agent import handled
    from agl_autogen._turn import as_content

    patches.replace(BaseAgent, "on_message", partial(handled, settings=settings))
    patches.replace(_single_threaded_agent_runtime, "get_telemetry_envelope_metadata", with_context)
    patches.replace(TraceHelper, "trace_block", partial(delivering, content=settings.content))
    patches.replace(_base, "trace_tool_span", partial(as_content, settings=settings))


def _patch_clients(patches: Patches, settings: Settings) -> None:
    """Model calls of every client."""
    from autogen_core.logging import LLMCallEvent
    from autogen_core.models import ChatCompletionClient

    from agl_autogen._chat import noting_event, traced_create, traced_create_stream

    calls = {"create": traced_create, "create_stream": traced_create_stream}
    _wrap_methods(
        patches, ChatCompletionClient, {name: partial(wrap, settings=settings) for name, wrap in calls.items()}
    )
    patches.replace(LLMCallEvent, "__init__", noting_event)


def _patch_openai(patches: Patches, settings: Settings) -> None:
    """Requests and chunks of streams, where the OpenAI client is installed."""
    try:
        from autogen_ext.models.openai import BaseOpenAIChatCompletionClient
    except ImportError:
        return

    from agl_autogen._chat import noting_chunks
    from agl_autogen._request import on_the_wire

    patches.replace(BaseOpenAIChatCompletionClient, "_process_create_args", partial(on_the_wire, settings=settings))
    for name in ("_create_stream_chunks", "_create_stream_chunks_beta_client"):
        patches.replace(BaseOpenAIChatCompletionClient, name, noting_chunks)


def _patch_mcp(patches: Patches, settings: Settings) -> None:
    """Tools of MCP servers, where that package is installed."""
    if find_spec("mcp") is None:
        return
    try:
        from autogen_ext.tools.mcp import McpSessionActor, _workbench
    except ImportError:  # AutoGen 0.7 does not know mcp 2
        return

    from agl_autogen._mcp import marking_errors
    from agl_autogen._turn import as_content

    patches.replace(McpSessionActor, "call", partial(marking_errors, content=settings.content))
    patches.replace(_workbench, "trace_tool_span", partial(as_content, settings=settings))


def _wrap_methods(patches: Patches, base: type, wrappers: Mapping[str, Wrap]) -> None:
    """Wrap the methods named by `wrappers` in `base` and in every class below it, also in those defined later."""

    def wrap_class(cls: type) -> None:
        for name, wrap in wrappers.items():
            method = vars(cls).get(name)
            if method is not None and not getattr(method, "__isabstractmethod__", False):
                patches.replace(cls, name, wrap)

    def wrap_later_classes(original: Callable[..., None]) -> Any:
        def init_subclass(cls: Any, **options: Any) -> None:
            super(base, cls).__init_subclass__(**options)
            wrap_class(cls)

        return classmethod(init_subclass)

    for cls in (base, *_subclasses(base)):
        wrap_class(cls)
    patches.replace(base, "__init_subclass__", wrap_later_classes)


def _subclasses(cls: type) -> Iterator[type]:
    """Every class under `cls` once."""
    seen: set[type] = set()
    pending = cls.__subclasses__()
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending += current.__subclasses__()
            yield current
