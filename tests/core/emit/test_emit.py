"""Emitters: exact attribute names and types, error messages, and no exception raised into the agent."""

import asyncio
import inspect
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from agl.content.filter import use_redaction
from agl.emit.annotation import annotation_attributes
from agl.emit.attributes import flat_attributes
from agl.emit.exception import exception_attributes
from agl.emit.generators import MAX_ITEMS
from agl.emit.message import message_attributes
from agl.emit.object import object_attributes
from agl.emit.observation import observation_attributes
from agl.emit.reward import reward_attributes, use_weights
from agl.errors import ConfigError, TelemetryError
from tests.core.otlp_sink import OtlpSink
from tests.stepped_clock import step_back

WEIGHTS = {"syntax": 0.3, "efficiency": 0.4, "goal": 0.3}


@pytest.fixture
def weights() -> Iterator[None]:
    use_weights(WEIGHTS)
    yield
    use_weights({})


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


def attributes(spans: InMemorySpanExporter) -> dict[str, Any]:
    """Attributes of the only span as `(type, value)`, so that 1, 1.0 and True differ."""
    return typed(only(spans).attributes or {})


def typed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: (type(value), value) for key, value in values.items()}


# --- Rewards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), Fraction(1, 2)])
def test_scalar_reward(spans: InMemorySpanExporter, value: Any) -> None:
    span_id = agl.emit_reward(value)
    assert attributes(spans) == {"agl.reward.value": (float, 0.5)}
    span = only(spans)
    assert span.name == "agl.reward"
    assert span.context is not None and span_id == f"{span.context.span_id:016x}"


@pytest.mark.parametrize(("value", "number"), [(True, 1.0), (False, 0.0), (3, 3.0)])
def test_bool_and_int_become_floats(value: Any, number: float) -> None:
    assert typed(reward_attributes(value)) == {"agl.reward.value": (float, number)}


def test_dimensions_without_weights_have_their_mean(spans: InMemorySpanExporter) -> None:
    agl.emit_reward({"syntax": 1, "goal": 0.5})
    assert attributes(spans) == {
        "agl.reward.value": (float, 0.75),
        "agl.reward.syntax": (float, 1.0),
        "agl.reward.goal": (float, 0.5),
    }


def test_dimensions_with_weights(spans: InMemorySpanExporter, weights: None) -> None:
    agl.emit_reward({"syntax": 1, "efficiency": 0.5, "goal": True})
    assert attributes(spans)["agl.reward.value"] == (float, pytest.approx(0.3 + 0.2 + 0.3))


@pytest.mark.parametrize("left_out", [{}, {"goal": None}])
def test_a_dimension_left_out_or_that_abstains_adds_nothing(left_out: dict[str, None]) -> None:
    assert reward_attributes({"syntax": 1} | left_out, weights=WEIGHTS)["agl.reward.value"] == pytest.approx(0.3)
    assert reward_attributes({"syntax": 1, "form": 0.5} | left_out) == {
        "agl.reward.value": 0.75,
        "agl.reward.syntax": 1.0,
        "agl.reward.form": 0.5,
    }


def test_spans_keep_their_order_when_the_clock_steps_back(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_back(monkeypatch)
    with agl.rollout("r"), agl.operation("whole"):
        agl.emit_reward(1.0)
        agl.emit_reward(2.0)
    first, second, operation, rollout = spans.get_finished_spans()
    starts = [span.start_time or 0 for span in (rollout, operation, first, second)]
    ends = [span.end_time or 0 for span in (first, second, operation, rollout)]
    assert [*starts, *ends[1:]] == sorted([*starts, *ends[1:]]) and ends[0] <= starts[3]


def test_reward_on_a_call_and_a_role(spans: InMemorySpanExporter) -> None:
    with agl.rollout("r1"), agl.role("planner"):
        agl.emit_reward(0.2, target="chatcmpl-7", role="executor")
    found = dict(spans.get_finished_spans()[0].attributes or {})
    assert found["agl.reward.target"] == "chatcmpl-7"
    assert found["agl.role"] == "executor"
    assert found["agl.rollout.id"] == "r1"


def test_reward_on_a_span(spans: InMemorySpanExporter) -> None:
    with agl.operation("step") as step:
        pass
    seen = agl.emit_observation("seen")
    assert reward_attributes(1, target=step.span)["agl.reward.target"] == only_id(spans, "agl.operation")
    assert reward_attributes(1, target=seen)["agl.reward.target"] == only_id(spans, "agl.observation")


def only_id(spans: InMemorySpanExporter, name: str) -> str:
    (context,) = [span.context for span in spans.get_finished_spans() if span.name == name]
    assert context is not None
    return trace.format_span_id(context.span_id)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "reward is nan, expected a finite number"),
        (math.inf, "reward is inf"),
        ("0.5", "reward is str, expected a number"),
        (None, "reward is NoneType"),
        ([0.5], "reward is list"),
        ({}, "reward is an empty mapping"),
        ({"syntax": math.nan}, "reward dimension 'syntax' is nan"),
        ({"syntax": "good"}, "reward dimension 'syntax' is str"),
        ({"tidiness": 1.0}, "dimension tidiness has no weight; weights exist for efficiency, goal, syntax"),
        ({"value": 1.0}, "reward dimension 'value' cannot be used"),
        ({"target": 1.0}, "reward dimension 'target' cannot be used"),
        ({"": 1.0}, "reward dimension '' cannot be used"),
        ({1: 1.0}, "reward dimension 1 cannot be used"),
    ],
)
def test_refused_rewards(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture, weights: None, value: Any, message: str
) -> None:
    with pytest.raises(TelemetryError, match=message):
        reward_attributes(value, weights=WEIGHTS)
    with agl.rollout("r1"):
        assert agl.emit_reward(value) is None
    assert [span.name for span in spans.get_finished_spans()] == ["agl.rollout"]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("agl.reward was not recorded (rollout r1): ")
    assert message in record.getMessage()


@pytest.mark.parametrize(("target", "role"), [("", None), (17, None), (None, ""), (None, 3)])
def test_refused_targets_and_roles(target: Any, role: Any) -> None:
    with pytest.raises(TelemetryError, match=r"(reward target|role) is .*, expected"):
        reward_attributes(1, target=target, role=role)


def test_weights_come_with_init_and_stay_when_it_is_called_again(spans: InMemorySpanExporter, sink: OtlpSink) -> None:
    agl.init(endpoint=sink.url, reward_weights={"syntax": 2})
    agl.init()
    try:
        agl.emit_reward({"syntax": 0.5})
    finally:
        agl.shutdown()
        use_weights({})
    assert attributes(spans)["agl.reward.value"] == (float, 1.0)


def test_a_weight_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(TelemetryError, match="weight of 'goal' is str, expected a number"):
        agl.init(reward_weights={"goal": "much"})  # type: ignore[dict-item]  # the point of the test


# --- Redaction -----------------------------------------------------------------------------------------------------


def scrub(text: str) -> str:
    return text.replace("Ada", "***")


@pytest.fixture
def redacting(sink: OtlpSink) -> Iterator[None]:
    agl.init(endpoint=sink.url, redact=scrub)
    agl.init()
    yield
    agl.shutdown()
    use_redaction(None)


@agl.operation(attributes={"by": ["Ada", "Bob"]})
def greet(name: str) -> dict[str, str]:
    return {name: f"Hello {name}"}


@agl.operation
def greet_all(names: list[str]) -> Iterator[str]:
    yield from names


def test_every_emitted_text_is_redacted(spans: InMemorySpanExporter, redacting: None) -> None:
    agl.emit_message("Ada")
    agl.emit_observation("Ada is here")
    agl.emit_observation({"Ada": ["Ada", 17]})
    agl.emit_object(["Ada"])
    agl.emit_annotation({"user": {"name": "Ada", "all": ["Ada", "Bob"], "age": 36}})
    agl.emit_exception(LookupError("no Ada"))
    agl.emit_reward(1, attributes={"judge": "Ada"})
    greet("Ada")
    list(greet_all(["Ada"]))
    with agl.operation("step", attributes={"by": "Ada"}) as step:
        step.set_input("Ada")
        step.set_output({"name": "Ada"})
    with pytest.raises(LookupError), agl.rollout("r1"):
        raise LookupError("Ada is gone")
    found = spans.get_finished_spans()
    events = [event.attributes or {} for span in found for event in span.events]
    said = [value for values in (*(span.attributes or {} for span in found), *events) for value in values.values()]
    said += [span.status.description for span in found]
    assert len([text for text in said if "***" in str(text)]) == 21
    named = {text for text in said if "Ada" in str(text)}
    assert named == {'{"Ada":["***",17]}', '{"Ada":"Hello ***"}'}  # keys of objects are not redacted


def test_names_and_ids_are_not_redacted(spans: InMemorySpanExporter, redacting: None) -> None:
    with agl.rollout("Ada"), agl.role("Ada"):
        agl.emit_reward({"Ada": 1.0}, target="Ada")
        agl.emit_object(b"Ada", attributes={"gen_ai.response.id": "Ada"})
    assert only_named(spans, "agl.reward") == {
        "agl.reward.value": 1.0,
        "agl.reward.Ada": 1.0,
        "agl.reward.target": "Ada",
        "agl.rollout.id": "Ada",
        "agl.attempt.id": "Ada-a1",
        "agl.mode": "train",
        "agl.role": "Ada",
    }
    kept = only_named(spans, "agl.object")
    assert (kept["agl.object.bytes"], kept["gen_ai.response.id"]) == (b"Ada", "Ada")


def only_named(spans: InMemorySpanExporter, name: str) -> dict[str, Any]:
    (span,) = [span for span in spans.get_finished_spans() if span.name == name]
    return dict(span.attributes or {})


def test_a_redact_that_is_not_callable_is_refused() -> None:
    with pytest.raises(ConfigError, match="redact is 'yes', expected a function from str to str"):
        agl.init(redact="yes")  # type: ignore[arg-type]  # the point of the test


# --- The other emitters --------------------------------------------------------------------------------------------


def test_observation(spans: InMemorySpanExporter) -> None:
    agl.emit_observation(role="planner", content="a plan")
    assert only(spans).name == "agl.observation"
    assert attributes(spans) == {"agl.observation.content": (str, "a plan"), "agl.role": (str, "planner")}
    assert observation_attributes({"rows": [1, 2]}) == {"agl.observation.content": '{"rows":[1,2]}'}


def test_message(spans: InMemorySpanExporter) -> None:
    agl.emit_message("héllo")
    assert only(spans).name == "agl.message"
    assert attributes(spans) == {"agl.message.body": (str, "héllo")}
    with pytest.raises(TelemetryError, match="message is dict, expected str; emit_object"):
        message_attributes({"a": 1})  # type: ignore[arg-type]  # the point of the test


def test_object_as_json(spans: InMemorySpanExporter) -> None:
    agl.emit_object({"rows": [["Zoë", 1.5, None]]})
    assert only(spans).name == "agl.object"
    assert attributes(spans) == {
        "agl.object.type": (str, "json"),
        "agl.object.json": (str, '{"rows":[["Zoë",1.5,null]]}'),
    }


def test_object_as_bytes(spans: InMemorySpanExporter) -> None:
    agl.emit_object(bytearray(b"\xff\x00"))
    assert attributes(spans) == {"agl.object.type": (str, "bytes"), "agl.object.bytes": (bytes, b"\xff\x00")}


def test_object_with_text_that_utf8_cannot_encode_is_escaped() -> None:
    assert object_attributes("half \ud83d")["agl.object.json"] == r'"half \ud83d"'


@pytest.mark.parametrize("value", [{"x": object()}, math.nan, {1, 2}, {(1, 2): 3}])
def test_objects_that_are_not_json_are_refused_if_strict(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setenv("AGL_STRICT", "1")
    with pytest.raises(TelemetryError, match=r"object \(\w+\) cannot be written as JSON"):
        object_attributes(value)


def test_objects_that_are_not_json_are_recorded_as_far_as_possible(spans: InMemorySpanExporter) -> None:
    agl.emit_object({(1, 2): {1}, "n": math.nan})
    assert attributes(spans)["agl.object.json"] == (str, '{"(1, 2)":"{1}","n":null}')


def test_annotation(spans: InMemorySpanExporter) -> None:
    agl.emit_annotation({"dataset": {"name": "shop", "split": {"seed": 3}}, "tags": ("a", "b"), "scores": [1, 0.5]})
    assert only(spans).name == "agl.annotation"
    assert attributes(spans) == {
        "dataset.name": (str, "shop"),
        "dataset.split.seed": (int, 3),
        "tags": (tuple, ("a", "b")),
        "scores": (tuple, (1.0, 0.5)),
    }
    with pytest.raises(TelemetryError, match="annotation is empty"):
        annotation_attributes({})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "attribute a.x is object, expected str, bytes, bool"),
        (None, "attribute a.x is NoneType"),
        ([1, "two"], "attribute a.x mixes int, str"),
        ([b"x"], "attribute a.x mixes bytes"),
        ([[1]], r"attribute a.x\[0\] is list"),
        (2**63, "does not fit into 64 bits"),
        ("half \ud83d", "attribute a.x holds half of a surrogate pair"),
        ({3: 1}, "attribute name a.x.3 is not a non-empty string"),
    ],
)
def test_values_that_a_span_cannot_hold_are_refused(value: Any, message: str) -> None:
    with pytest.raises(TelemetryError, match=message):
        flat_attributes({"a": {"x": value}})


def test_exception(spans: InMemorySpanExporter) -> None:
    try:
        raise ValueError("no such table")
    except ValueError as error:
        agl.emit_exception(error)
    span = only(spans)
    assert span.name == "agl.exception"
    assert attributes(spans) == {"error.type": (str, "ValueError")}
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, "ValueError: no such table")
    (event,) = span.events
    assert event.name == "exception" and event.attributes
    assert event.attributes["exception.message"] == "no such table"
    assert "test_emit.py" in str(event.attributes["exception.stacktrace"])
    with pytest.raises(TelemetryError, match="error is str, expected an exception"):
        exception_attributes("ValueError")  # type: ignore[arg-type]  # the point of the test


EMITTERS = {
    "agl.reward": lambda **more: agl.emit_reward(1.0, **more),
    "agl.observation": lambda **more: agl.emit_observation("x", **more),
    "agl.message": lambda **more: agl.emit_message("x", **more),
    "agl.object": lambda **more: agl.emit_object([1], **more),
    "agl.annotation": lambda **more: agl.emit_annotation({"x": 1}, **more),
    "agl.exception": lambda **more: agl.emit_exception(ValueError("x"), **more),
}


@pytest.mark.parametrize("name", EMITTERS)
def test_every_emitter_in_and_out_of_a_rollout(spans: InMemorySpanExporter, name: str) -> None:
    with agl.rollout("r1") as _, agl.role("planner"):
        inside = EMITTERS[name](attributes={"step": 3})
    outside = EMITTERS[name]()
    by_id = {trace.format_span_id(span.context.span_id): span for span in spans.get_finished_spans() if span.context}
    first, second = by_id[str(inside)], by_id[str(outside)]
    assert first.name == second.name == name
    assert first.attributes and second.attributes is not None
    assert (first.attributes["agl.rollout.id"], first.attributes["agl.role"]) == ("r1", "planner")
    assert typed(first.attributes)["step"] == (int, 3)
    assert first.parent is not None
    assert second.parent is None and "agl.rollout.id" not in second.attributes


@pytest.mark.parametrize("name", EMITTERS)
@pytest.mark.parametrize("bad", [{"x": object()}, {"": 1}, "x"])
def test_every_emitter_logs_bad_attributes_and_returns_none(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture, name: str, bad: Any
) -> None:
    assert EMITTERS[name](attributes=bad) is None
    assert not spans.get_finished_spans()
    assert f"{name} was not recorded (no rollout): attribute" in caplog.text


@pytest.mark.parametrize("name", EMITTERS)
def test_strict_emitters_raise_instead(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setenv("AGL_STRICT", "1")
    with agl.rollout("r1"):
        with pytest.raises(TelemetryError, match="attribute x is object, expected str"):
            EMITTERS[name](attributes={"x": object()})
        assert EMITTERS[name]() is not None
    assert [span.name for span in spans.get_finished_spans()] == [name, "agl.rollout"]
    assert not caplog.records
    monkeypatch.setenv("AGL_STRICT", "0")
    assert EMITTERS[name](attributes={"x": object()}) is None


def test_a_strict_operation_refuses_its_attributes_before_it_runs(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[str] = []
    for strict in ("", "1"):
        monkeypatch.setenv("AGL_STRICT", strict)
        try:
            with agl.operation("count", attributes={"x": object()}):
                ran.append(strict)
        except TelemetryError as error:
            assert "attribute x is object" in str(error)
            ran.append("refused")
    assert ran == ["", "refused"]
    assert "attributes of operation count were not recorded: attribute x is object" in caplog.text
    assert len(spans.get_finished_spans()) == 1


def test_an_unexpected_failure_is_logged_with_its_traceback(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    assert agl.emit_reward(np.ones(2)) is None  # type: ignore[arg-type]  # the point of the test
    assert "agl.reward was not recorded" in caplog.text and "Traceback" in caplog.text


# --- Operations ----------------------------------------------------------------------------------------------------


def inputs_and_output(spans: InMemorySpanExporter) -> tuple[Any, Any]:
    found = only(spans).attributes or {}
    return json.loads(str(found["agl.operation.input"])), json.loads(str(found["agl.operation.output"]))


def test_operation_as_a_block(spans: InMemorySpanExporter) -> None:
    with agl.operation("search", attributes={"index": 2}) as step:
        step.set_input({"query": "x"})
        assert trace.get_current_span() is step.span
        step.set_output(["a"])
    assert only(spans).name == "agl.operation"
    assert attributes(spans) == {
        "agl.operation.name": (str, "search"),
        "agl.operation.input": (str, '{"query":"x"}'),
        "agl.operation.output": (str, '["a"]'),
        "index": (int, 2),
    }


async def test_operation_as_an_async_block(spans: InMemorySpanExporter) -> None:
    async with agl.operation("search") as step:
        step.set_output(1)
    assert attributes(spans)["agl.operation.output"] == (str, "1")


def test_operation_on_a_function(spans: InMemorySpanExporter) -> None:
    @agl.operation
    def add(a: int, *rest: int, scale: int = 1) -> int:
        """Adds."""
        agl.emit_message("inside")
        return scale * (a + sum(rest))

    assert add(1, 2, 3, scale=2) == 12
    assert (add.__name__, add.__doc__) == ("add", "Adds.")
    inner, outer = spans.get_finished_spans()
    assert inner.parent is not None and outer.context is not None
    assert inner.parent.span_id == outer.context.span_id
    assert outer.attributes == {
        "agl.operation.name": "test_operation_on_a_function.<locals>.add",
        "agl.operation.input": '{"a":1,"rest":[2,3],"scale":2}',
        "agl.operation.output": "12",
    }


def test_operation_on_a_method_leaves_out_self(spans: InMemorySpanExporter) -> None:
    class Tool:
        @agl.operation("tool.run")
        def run(self, query: str) -> str:
            return query.upper()

    assert Tool().run("x") == "X"
    assert inputs_and_output(spans) == ({"query": "x"}, "X")
    assert attributes(spans)["agl.operation.name"] == (str, "tool.run")


async def test_operation_on_a_coroutine_function(spans: InMemorySpanExporter) -> None:
    @agl.operation()
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        agl.emit_message(str(x))
        return 2 * x

    assert inspect.iscoroutinefunction(double)
    assert await asyncio.gather(*(double(x) for x in range(20))) == [2 * x for x in range(20)]
    outer = {span.context.span_id: span for span in spans.get_finished_spans() if span.name == "agl.operation"}  # type: ignore[union-attr]  # finished spans have one
    inner = [span for span in spans.get_finished_spans() if span.name == "agl.message"]
    assert len(outer) == len(inner) == 20
    for span in inner:
        assert span.parent is not None and span.attributes
        parent = outer[span.parent.span_id].attributes or {}
        assert parent["agl.operation.input"] == f'{{"x":{span.attributes["agl.message.body"]}}}'


@pytest.mark.parametrize("kind", ["call", "coroutine", "generator", "async generator", "block"])
async def test_an_exception_marks_the_operation_and_propagates(spans: InMemorySpanExporter, kind: str) -> None:
    error = LookupError("gone")

    @agl.operation
    def call() -> None:
        raise error

    @agl.operation
    async def coroutine() -> None:
        raise error

    @agl.operation
    def generator() -> Iterator[int]:
        yield 1
        raise error

    @agl.operation
    async def async_generator() -> AsyncIterator[int]:
        yield 1
        raise error

    with pytest.raises(LookupError) as caught:
        match kind:
            case "call":
                call()
            case "coroutine":
                await coroutine()
            case "generator":
                list(generator())
            case "async generator":
                [item async for item in async_generator()]
            case "block":
                with agl.operation("step"):
                    raise error
    assert caught.value is error
    assert only(spans).status.status_code is trace.StatusCode.ERROR
    assert attributes(spans)["error.type"] == (str, "LookupError")


def test_values_that_json_has_no_form_for_are_recorded_as_their_repr(spans: InMemorySpanExporter) -> None:
    loop: list[Any] = []
    loop.append(loop)

    @agl.operation
    def run(thing: Any, numbers: Any) -> Any:
        return loop

    run({1, 2}, math.nan)
    assert inputs_and_output(spans) == ({"thing": "{1, 2}", "numbers": None}, ["<circular list>"])


def test_an_argument_that_cannot_be_shown_does_not_stop_the_call(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    @agl.operation("look", attributes={"bad": object()})
    def look(thing: Any) -> int:
        return 1

    assert look(Shy()) == 1
    assert attributes(spans) == {
        "agl.operation.name": (str, "look"),
        "agl.operation.input": (str, '{"thing":"<Shy without text>"}'),
        "agl.operation.output": (str, "1"),
    }
    assert "agl.operation.input" not in caplog.text
    assert "attributes of operation look were not recorded: attribute bad is object" in caplog.text


def test_a_wrong_call_raises_what_the_function_raises(spans: InMemorySpanExporter) -> None:
    @agl.operation
    def one(a: int) -> int:
        return a

    with pytest.raises(TypeError, match="unexpected keyword argument 'b'"):
        one(b=1)  # type: ignore[call-arg]  # the point of the test
    assert attributes(spans)["error.type"] == (str, "TypeError")


# --- Operations that are generators --------------------------------------------------------------------------------


def test_generator_span_is_current_in_the_body_and_not_in_the_caller(spans: InMemorySpanExporter) -> None:
    @agl.operation
    def count(n: int) -> Iterator[int]:
        for number in range(n):
            with agl.role(f"role-{number}"):
                agl.emit_message("inside")
                yield number
                agl.emit_message("inside, later")

    assert inspect.isgeneratorfunction(count)
    with agl.role("reader"):
        for _ in count(2):
            assert agl.current_role() == "reader"
            assert not trace.get_current_span().is_recording()
            agl.emit_message("outside")
    finished = spans.get_finished_spans()
    (outer,) = [span for span in finished if span.name == "agl.operation"]
    assert outer.attributes and outer.context is not None
    assert outer.attributes["agl.operation.input"] == '{"n":2}'
    assert outer.attributes["agl.operation.output"] == "[0,1]"
    messages = [(dict(span.attributes or {}), span.parent) for span in finished if span.name == "agl.message"]
    told = [(one["agl.message.body"], one["agl.role"], parent and parent.span_id) for one, parent in messages]
    inside = outer.context.span_id
    assert told == [
        (text, role, parent)
        for role in ("role-0", "role-1")
        for text, role, parent in [
            ("inside", role, inside),
            ("outside", "reader", None),
            ("inside, later", role, inside),
        ]
    ]


def test_values_sent_thrown_and_returned_pass_through_a_generator(spans: InMemorySpanExporter) -> None:
    @agl.operation
    def echo() -> Any:
        heard = []
        while len(heard) < 2:
            try:
                heard.append((yield len(heard)))
            except KeyError as error:
                heard.append(error)
        return heard

    talk = echo()
    error = KeyError("x")
    assert next(talk) == 0
    assert talk.send("hello") == 1
    with pytest.raises(StopIteration) as stop:
        talk.throw(error)
    assert stop.value.value == ["hello", error]
    assert only(spans).status.is_unset


def test_generator_closed_early_ends_in_its_span_without_an_error(spans: InMemorySpanExporter) -> None:
    @agl.operation
    def forever() -> Iterator[int]:
        try:
            while True:
                yield 7
        finally:
            agl.emit_message("closing")

    stream = forever()
    next(stream)
    assert not spans.get_finished_spans()
    del stream
    closing, outer = spans.get_finished_spans()
    assert closing.parent is not None and outer.context is not None
    assert closing.parent.span_id == outer.context.span_id
    assert outer.status.is_unset
    assert outer.attributes and outer.attributes["agl.operation.output"] == "[7]"


def test_a_long_generator_keeps_its_first_items(spans: InMemorySpanExporter) -> None:
    @agl.operation
    def many() -> Iterator[int]:
        yield from range(MAX_ITEMS + 5)

    assert len(list(many())) == MAX_ITEMS + 5
    assert inputs_and_output(spans)[1] == list(range(MAX_ITEMS))


async def test_concurrent_async_generators(spans: InMemorySpanExporter) -> None:
    @agl.operation
    async def count(name: str) -> AsyncIterator[int]:
        for number in range(3):
            async with agl.role(name):
                await asyncio.sleep(0)
                agl.emit_message(name)
                yield number

    assert inspect.isasyncgenfunction(count)

    async def read(name: str) -> list[int]:
        return [number async for number in count(name) if agl.current_role() is None]

    assert await asyncio.gather(*(read(f"r{n}") for n in range(20))) == [[0, 1, 2]] * 20
    outer = {span.context.span_id: span for span in spans.get_finished_spans() if span.name == "agl.operation"}  # type: ignore[union-attr]  # finished spans have one
    inner = [span for span in spans.get_finished_spans() if span.name == "agl.message"]
    assert (len(outer), len(inner)) == (20, 60)
    for span in inner:
        assert span.parent is not None and span.attributes
        name = span.attributes["agl.message.body"]
        assert span.attributes["agl.role"] == name
        assert (outer[span.parent.span_id].attributes or {})["agl.operation.input"] == f'{{"name":"{name}"}}'


async def test_async_generator_closed_early_ends(spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture) -> None:
    closed = []

    @agl.operation
    async def forever() -> AsyncGenerator[int, str]:
        try:
            while True:
                closed.append((yield 1))
        finally:
            closed.append("closed")

    stream = forever()
    assert await anext(stream) == 1
    assert await stream.asend("sent") == 1
    await stream.aclose()
    assert closed == ["sent", "closed"]
    assert only(spans).status.is_unset
    assert not caplog.records
