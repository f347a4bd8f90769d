"""`AutoGenInstrumentor`: switches the spans on, and off again without a trace."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

from opentelemetry import trace
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from agl.content import content_is_captured
from agl.role_map import RoleMap
from agl_autogen._patch import Patches
from agl_autogen._settings import Settings


class AutoGenInstrumentor(BaseInstrumentor):
    """`instrument()` traces every AutoGen team, agent and model call; `uninstrument()` leaves the framework as it was.

    `instrument` takes, all optional:
    `roles`: maps a role to a regular expression over agent names; any other agent's role is its name.
    `capture_content`: whether messages and tool definitions go on the spans; None leaves it to
    `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`, and without that they do.
    `tracer_provider`: for our spans in place of the global one.

    AutoGen makes `invoke_agent` and `execute_tool` spans itself; what is added is one `invoke_workflow` span around
    a team's run, a `chat` span for every model call, hand-offs, and the role on all of them. AutoGen's spans of its
    message bus outnumber them by far: `AUTOGEN_DISABLE_RUNTIME_TRACING=true` silences those.
    """

    _patches = Patches()

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("autogen-agentchat >= 0.7, < 0.8",)

    def _instrument(self, **kwargs: Any) -> None:
        settings = Settings(
            tracer=trace.get_tracer("agl_autogen", version("agl-autogen"), kwargs.get("tracer_provider")),
            roles=RoleMap(kwargs.get("roles")),
            captures_content=content_is_captured(kwargs.get("capture_content")),
        )
        try:
            _patch_agentchat(self._patches, settings)
            _patch_clients(self._patches, settings)
            _patch_openai(self._patches)
        except BaseException:
            self._patches.restore()
            raise

    def _uninstrument(self, **kwargs: Any) -> None:
        self._patches.restore()


def _patch_agentchat(patches: Patches, settings: Settings) -> None:
    """Runs of teams, turns of agents."""
    from autogen_agentchat.agents import _base_chat_agent
    from autogen_agentchat.teams import BaseGroupChat
    from autogen_agentchat.teams._group_chat import _chat_agent_container
    from autogen_agentchat.teams._group_chat._sequential_routed_agent import SequentialRoutedAgent

    from agl_autogen._run import in_run, traced_run
    from agl_autogen._stream import isolated
    from agl_autogen._turn import in_role

    patches.replace(BaseGroupChat, "run_stream", partial(traced_run, settings=settings))
    patches.replace(SequentialRoutedAgent, "on_message_impl", in_run)
    patches.replace(_base_chat_agent.BaseChatAgent, "run_stream", isolated)
    for module in (_base_chat_agent, _chat_agent_container):
        patches.replace(module, "trace_invoke_agent_span", partial(in_role, settings=settings))


def _patch_clients(patches: Patches, settings: Settings) -> None:
    """`create` and `create_stream` of every model client class, also of those defined later."""
    from autogen_core.logging import LLMCallEvent
    from autogen_core.models import ChatCompletionClient

    from agl_autogen._chat import noting_event, traced_create, traced_create_stream

    wrappers = {"create": traced_create, "create_stream": traced_create_stream}

    def wrap_class(client_class: type) -> None:
        for name, wrapper in wrappers.items():
            if name in vars(client_class):
                patches.replace(client_class, name, partial(wrapper, settings=settings))

    def wrap_later_classes(original: Callable[..., None]) -> Any:
        def init_subclass(cls: type[ChatCompletionClient], **options: Any) -> None:
            super(ChatCompletionClient, cls).__init_subclass__(**options)
            wrap_class(cls)

        return classmethod(init_subclass)

    for client_class in _subclasses(ChatCompletionClient):
        wrap_class(client_class)
    patches.replace(ChatCompletionClient, "__init_subclass__", wrap_later_classes)
    patches.replace(LLMCallEvent, "__init__", noting_event)


def _patch_openai(patches: Patches) -> None:
    """Headers of requests and chunks of streams, where the OpenAI client is installed."""
    try:
        from autogen_ext.models.openai import BaseOpenAIChatCompletionClient
    except ImportError:
        return

    from agl_autogen._chat import noting_chunks, with_headers

    patches.replace(BaseOpenAIChatCompletionClient, "_process_create_args", with_headers)
    for name in ("_create_stream_chunks", "_create_stream_chunks_beta_client"):
        patches.replace(BaseOpenAIChatCompletionClient, name, noting_chunks)


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
