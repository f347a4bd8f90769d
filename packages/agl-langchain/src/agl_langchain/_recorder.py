"""`RunRecorder` opens the span of a run at its start event and ends it at its end event."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from uuid import UUID

from langchain_core.outputs import LLMResult
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import SpanKind, TracerProvider

from agl import semconv
from agl.content.filter import ContentFilter
from agl.context import stated_role, with_inferred_role
from agl.role_map import RoleMap
from agl.span import now_ns
from agl_langchain._model_call import (
    Attributes,
    ModelCall,
    request_attributes,
    response_attributes,
    response_messages,
    tool_definitions,
)
from agl_langchain._role import Actor, marked_role
from agl_langchain._run import OPEN_RUNS, Describe, Run, active_run, child_context, unwound_context

_HIDDEN_TAG = "langsmith:hidden"
"""Tag of LangGraph's internal runs."""


@dataclass(slots=True)  # not frozen: a frozen one takes four times as long to create, once per run
class RunStart:
    """A run's start event."""

    run_id: UUID
    name: str
    parent: Run | None
    is_root: bool
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    parameters: Mapping[str, Any]
    """Request parameters; of a model call only."""
    batch_size: int
    """Number of runs started by the same `generate`; of a model call only."""

    @classmethod
    def of(cls, serialized: Mapping[str, Any] | None, event: Mapping[str, Any]) -> "RunStart":
        return cls(
            run_id=event["run_id"],
            name=_name(serialized or {}, event),
            parent=OPEN_RUNS.get(event.get("parent_run_id")),
            is_root=event.get("parent_run_id") is None,
            tags=event.get("tags") or (),
            metadata=event.get("metadata") or {},
            parameters=event.get("invocation_params") or {},
            batch_size=event.get("batch_size") or 1,
        )


class RunRecorder:
    """Opens and ends the spans of one handler."""

    def __init__(self, roles: RoleMap, content: ContentFilter, provider: TracerProvider | None) -> None:
        self._roles = roles
        self._content = content
        self._tracer = trace.get_tracer("agl_langchain", version("agl-langchain"), provider)

    def open_chain(self, start: RunStart) -> None:
        """A chain, graph or node: `invoke_agent` for a node or named agent, `invoke_workflow` for a root run."""
        if _HIDDEN_TAG in start.tags:
            if start.parent is not None:
                OPEN_RUNS.add(start.run_id, start.parent)
            return
        actor = Actor.of_chain(start.name, start.tags, start.metadata, _actor_above(start), self._roles)
        is_agent = actor.is_node and actor.agent == start.name
        if is_agent:
            name, attributes = _named(semconv.OPERATION_INVOKE_AGENT, semconv.GEN_AI_AGENT_NAME, start.name)
        elif start.is_root:
            name, attributes = _named(semconv.OPERATION_INVOKE_WORKFLOW, semconv.GEN_AI_WORKFLOW_NAME, start.name)
        else:
            name, attributes = start.name, {}
        self._open(start, name, attributes, actor=actor, is_chain=True, ends_with_task=False, has_role=is_agent)
        if start.parent and actor.is_node and actor.agent == start.parent.actor.chain:
            _show_agent(start.parent, start, actor)

    def open_call(self, operation: str, start: RunStart, messages: Describe) -> None:
        """A model call. Several runs of one `generate` share a context, so none of them is made current."""
        attributes = {semconv.GEN_AI_OPERATION_NAME: operation, **request_attributes(start.parameters, start.metadata)}
        model = attributes.get(semconv.GEN_AI_REQUEST_MODEL)
        self._open(
            start,
            f"{operation} {model}" if model else operation,
            attributes,
            kind=SpanKind.CLIENT,
            as_current=start.batch_size == 1,
            # of completion models, LangChain reports every end, and starts their runs in tasks that end at once
            ends_with_task=operation == semconv.OPERATION_CHAT,
            call=ModelCall(attributes),
            content=lambda: {**messages(), **tool_definitions(start.parameters)},
        )

    def response_begins(self, run_id: UUID) -> None:
        """Make the span of a stream not current any more, because a stream may never be read to its end."""
        run = OPEN_RUNS.get(run_id)
        if run is not None and not run.is_over:
            run.leave()

    def open_tool(self, start: RunStart, call_id: str | None, arguments: Describe) -> None:
        name, attributes = _named(semconv.OPERATION_EXECUTE_TOOL, semconv.GEN_AI_TOOL_NAME, start.name)
        if call_id:
            attributes[semconv.GEN_AI_TOOL_CALL_ID] = call_id
        actor = _actor_above(start) or Actor.of_metadata(start.metadata, self._roles)
        self._open(start, name, attributes, actor=actor.in_tool(), content=arguments)

    def open_retrieval(self, start: RunStart, query: Describe) -> None:
        attributes: Attributes = {semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_RETRIEVAL}
        name = f"{semconv.OPERATION_RETRIEVAL} {start.name}"
        self._open(start, name, attributes, kind=SpanKind.CLIENT, has_role=False, content=query)

    def close(
        self,
        run_id: UUID,
        error: BaseException | None = None,
        *,
        facts: Describe | None = None,
        content: Describe | None = None,
    ) -> None:
        """Describe the run and end its span, which also ends if the description fails."""
        run = OPEN_RUNS.pop(run_id)
        if run is None:
            return
        try:
            if error is not None and not _is_control_flow(error):
                run.content.mark_error(run.span, error)
            run.describe(facts, content)
            self._record_choices(run)
        finally:
            run.end()

    def close_call(self, run_id: UUID, result: LLMResult, error: BaseException | None = None) -> None:
        run = OPEN_RUNS.get(run_id)
        call = run.call if run else None

        def facts() -> Attributes:
            return response_attributes(result) | (call.captured_attributes() if call else {})

        self.close(run_id, error, facts=facts, content=lambda: response_messages(result))

    def _record_choices(self, run: Run) -> None:
        for attributes in run.call.choice_attributes() if run.call else ():
            name = f"{semconv.OPERATION_CHAT} choice {attributes[semconv.GATEWAY_CHOICE]}"
            context = trace.set_span_in_context(run.span, run.context)
            self._tracer.start_span(name, context, SpanKind.CLIENT, attributes, start_time=(now := now_ns())).end(now)

    def _open(
        self,
        start: RunStart,
        name: str,
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        actor: Actor | None = None,
        is_chain: bool = False,
        has_role: bool = True,
        as_current: bool = True,
        ends_with_task: bool = True,
        call: ModelCall | None = None,
        content: Describe | None = None,
    ) -> None:
        if start.run_id in OPEN_RUNS or not is_instrumentation_enabled():
            return
        actor = actor or _actor_above(start) or Actor.of_metadata(start.metadata, self._roles)
        outer = unwound_context()
        context = child_context(start.parent, outer)
        if is_chain and actor.is_node and not actor.agent:
            context = with_inferred_role(None, context)
        role = _role(start, actor, context) if has_role else None
        if role:
            attributes[semconv.ROLE] = role
        span = self._tracer.start_span(name, context, kind, attributes, start_time=now_ns())
        run = Run(start.run_id, span, actor, role, is_chain, outer, context, self._content, call)
        OPEN_RUNS.add(start.run_id, run)
        run.enter(as_current=as_current)
        if ends_with_task:
            run.end_with_task()
        if content is not None:
            run.describe(content=content)


def _named(operation: str, key: str, name: str) -> tuple[str, Attributes]:
    """Name and first attributes of the span of an operation on an agent, a workflow or a tool."""
    return f"{operation} {name}", {semconv.GEN_AI_OPERATION_NAME: operation, key: name}


def _show_agent(graph: Run, step: RunStart, actor: Actor) -> None:
    """Describe the run of `graph` as that of the agent `actor`, once its first step has started."""
    if graph.role is None and actor.agent:
        graph.role = _role(step, actor, graph.context)
        name, attributes = _named(semconv.OPERATION_INVOKE_AGENT, semconv.GEN_AI_AGENT_NAME, actor.agent)
        graph.span.update_name(name)
        graph.span.set_attributes({**attributes, semconv.ROLE: graph.role or actor.agent})


def _actor_above(start: RunStart) -> Actor | None:
    """The parent's actor; if LangChain reports no parent (a call without config), that of the active run."""
    above = start.parent or active_run()
    return above.actor if above else None


def _role(start: RunStart, actor: Actor, context: Context) -> str | None:
    """The role of `agl.role`, else of metadata or tag, else of the handler's `roles`, else the agent's name."""
    return stated_role(context) or marked_role(start.tags, start.metadata) or actor.mapped_role or actor.agent


def _name(serialized: Mapping[str, Any], event: Mapping[str, Any]) -> str:
    """The run's name, else its class's name."""
    return str(event.get("name") or serialized.get("name") or (serialized.get("id") or ["chain"])[-1])


def _is_control_flow(error: BaseException) -> bool:
    """Whether LangGraph raised `error` as control flow (an interrupt, a command to the parent graph): no failure."""
    errors = sys.modules.get("langgraph.errors")
    return errors is not None and isinstance(error, errors.GraphBubbleUp)
