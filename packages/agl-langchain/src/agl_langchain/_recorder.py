"""From the start and the end of a run to its span."""

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
from agl.context import stated_role
from agl.role_map import RoleMap
from agl_langchain._call import (
    Attributes,
    CapturedCall,
    request_attributes,
    response_attributes,
    response_messages,
    tool_definitions,
)
from agl_langchain._open_runs import OPEN_RUNS
from agl_langchain._role import Actor, marked_role
from agl_langchain._run import Describe, Run, child_context, run_in_force, settled_context

_HIDDEN_TAG = "langsmith:hidden"
"""Tag of runs that are LangGraph's own plumbing."""


@dataclass(slots=True)  # not frozen: one is made for every run, and that would take four times as long
class Start:
    """What a start event says of its run."""

    run_id: UUID
    name: str
    parent: Run | None
    is_root: bool
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    parameters: Mapping[str, Any]
    """Of a model call: what its client is given."""
    batch_size: int
    """Of a model call: how many runs were started by the same `generate`."""

    @classmethod
    def of(cls, serialized: Mapping[str, Any] | None, event: Mapping[str, Any]) -> "Start":
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


class Recorder:
    """Opens and closes the spans of one handler."""

    def __init__(self, roles: RoleMap, content: ContentFilter, provider: TracerProvider | None) -> None:
        self._roles = roles
        self._content = content
        self._tracer = trace.get_tracer("agl_langchain", version("agl-langchain"), provider)

    def open_chain(self, start: Start) -> None:
        """A chain, graph or node: `invoke_agent` for a node or named agent, `invoke_workflow` for the outermost run."""
        if _HIDDEN_TAG in start.tags:
            if start.parent is not None:
                OPEN_RUNS.add(start.run_id, start.parent)
            return
        actor, is_agent = Actor.of_chain(start.name, start.tags, start.metadata, _actor_above(start), self._roles)
        if is_agent:
            name, attributes = _named(semconv.OPERATION_INVOKE_AGENT, semconv.GEN_AI_AGENT_NAME, start.name)
        elif start.is_root:
            name, attributes = _named(semconv.OPERATION_INVOKE_WORKFLOW, semconv.GEN_AI_WORKFLOW_NAME, start.name)
        else:
            name, attributes = start.name, {}
        self._open(start, name, attributes, actor=actor, is_chain=True, is_watched=False, has_role=is_agent)

    def open_call(self, operation: str, start: Start, messages: Describe) -> None:
        """A model call. Runs of one `generate` share a context: where they are several, none can be the current one."""
        attributes = {
            semconv.GEN_AI_OPERATION_NAME: operation,
            **request_attributes(start.parameters, start.metadata),
        }
        model = attributes.get(semconv.GEN_AI_REQUEST_MODEL)
        self._open(
            start,
            f"{operation} {model}" if model else operation,
            attributes,
            kind=SpanKind.CLIENT,
            as_current=start.batch_size == 1,
            # of completion models LangChain does report the end, and it starts their runs in tasks that end at once
            is_watched=operation == semconv.OPERATION_CHAT,
            call=CapturedCall(attributes),
            content=lambda: {**messages(), **tool_definitions(start.parameters)},
        )

    def answer_begins(self, run_id: UUID) -> None:
        """The request is out: a stream that is never read to its end leaves nothing current."""
        run = OPEN_RUNS.get(run_id)
        if run is not None and not run.over:
            run.leave()

    def open_tool(self, start: Start, call_id: str | None, arguments: Describe) -> None:
        name, attributes = _named(semconv.OPERATION_EXECUTE_TOOL, semconv.GEN_AI_TOOL_NAME, start.name)
        if call_id:
            attributes[semconv.GEN_AI_TOOL_CALL_ID] = call_id
        self._open(start, name, attributes, content=arguments)

    def open_retrieval(self, start: Start, query: Describe) -> None:
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
        """End the run's span, whatever becomes of its description."""
        run = OPEN_RUNS.pop(run_id)
        if run is None:
            return
        try:
            if error is not None and not _steers_a_graph(error):
                run.content.mark_error(run.span, error)
            run.describe(facts, content)
            self._record_choices(run)
        finally:
            run.end()

    def close_call(self, run_id: UUID, result: LLMResult, error: BaseException | None = None) -> None:
        run = OPEN_RUNS.get(run_id)
        call = run.call if run else None

        def facts() -> Attributes:
            return response_attributes(result) | (call.attributes() if call else {})

        self.close(run_id, error, facts=facts, content=lambda: response_messages(result))

    def _record_choices(self, run: Run) -> None:
        for attributes in run.call.of_choices() if run.call else ():
            name = f"{semconv.OPERATION_CHAT} choice {attributes[semconv.GATEWAY_CHOICE]}"
            context = trace.set_span_in_context(run.span, run.context)
            self._tracer.start_span(name, context, SpanKind.CLIENT, attributes).end()

    def _open(
        self,
        start: Start,
        name: str,
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        actor: Actor | None = None,
        is_chain: bool = False,
        has_role: bool = True,
        as_current: bool = True,
        is_watched: bool = True,
        call: CapturedCall | None = None,
        content: Describe | None = None,
    ) -> None:
        if start.run_id in OPEN_RUNS or not is_instrumentation_enabled():
            return
        actor = actor or _actor_above(start) or Actor.of_metadata(start.metadata, self._roles)
        before = settled_context()
        context = child_context(start.parent, before)
        role = _role(start, actor, context) if has_role else None
        if role:
            attributes[semconv.ROLE] = role
        span = self._tracer.start_span(name, context, kind, attributes)
        run = Run(start.run_id, span, actor, role, is_chain, before, context, self._content, call)
        OPEN_RUNS.add(start.run_id, run)
        run.enter(as_current=as_current)
        if is_watched:
            run.watch_task()
        if content is not None:
            run.describe(content=content)


def _named(operation: str, key: str, name: str) -> tuple[str, Attributes]:
    """Name and first attributes of a span whose operation has an object: an agent, a workflow, a tool."""
    return f"{operation} {name}", {semconv.GEN_AI_OPERATION_NAME: operation, key: name}


def _actor_above(start: Start) -> Actor | None:
    """Of the parent; of the run around it where LangChain names none, as for a call that takes no config."""
    above = start.parent or run_in_force()
    return above.actor if above else None


def _role(start: Start, actor: Actor, context: Context) -> str | None:
    """The role that `agl.role` states, else metadata or tag, else the handler's mapping, else the agent's name."""
    return stated_role(context) or marked_role(start.tags, start.metadata) or actor.mapped_role or actor.agent


def _name(serialized: Mapping[str, Any], event: Mapping[str, Any]) -> str:
    """The run's name, else that of the class that runs."""
    return str(event.get("name") or serialized.get("name") or (serialized.get("id") or ["chain"])[-1])


def _steers_a_graph(error: BaseException) -> bool:
    """Whether LangGraph raised it to steer: an interrupt, or a command to the graph above. No failure."""
    errors = sys.modules.get("langgraph.errors")
    return errors is not None and isinstance(error, errors.GraphBubbleUp)
