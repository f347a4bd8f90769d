"""Export to a collector over real OTLP/HTTP: types, bursts, failures, and the effects of `init` on a process."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from agl import semconv, tracing
from agl.errors import ConfigError
from agl.tokens.packing import pack_ids, pack_logprobs, unpack_ids, unpack_logprobs
from tests.core.otlp_sink import OtlpSink, attributes


@contextmanager
def exporting(sink: OtlpSink) -> Iterator[None]:
    agl.init(endpoint=sink.url)
    try:
        yield
    finally:
        agl.shutdown()


def test_a_span_arrives_with_its_ids_and_value_types(sink: OtlpSink) -> None:
    with exporting(sink):
        with agl.rollout("r1", group_id="g"), agl.role("planner"):
            agl.emit_reward({"syntax": True, "goal": 0})
        assert agl.flush()
    assert sink.paths == {"/v1/traces"}
    (reward,) = [span for span in sink.spans if span.name == "agl.reward"]
    found = attributes(reward)
    assert {key: value.WhichOneof("value") for key, value in found.items()} == {
        "agl.reward.value": "double_value",
        "agl.reward.syntax": "double_value",
        "agl.reward.goal": "double_value",
        "agl.rollout.id": "string_value",
        "agl.attempt.id": "string_value",
        "agl.group.id": "string_value",
        "agl.mode": "string_value",
        "agl.role": "string_value",
    }
    assert found["agl.reward.value"].double_value == 0.5
    assert found["agl.role"].string_value == "planner"


def test_packed_token_ids_survive_the_sdk_and_the_wire(sink: OtlpSink) -> None:
    # 0xC000 and -0.1 are not UTF-8: an SDK that decodes bytes as text would lose them.
    ids, logprobs = [65, 255, 0xC000, 151_643], [-0.1, 0.0, -17.25]
    packed = {semconv.RESPONSE_TOKEN_IDS: pack_ids(ids), semconv.RESPONSE_LOGPROBS: pack_logprobs(logprobs)}
    with exporting(sink):
        with trace.get_tracer("x").start_as_current_span("chat", attributes=packed) as span:
            span.set_attribute(semconv.PROMPT_TOKEN_IDS, pack_ids(range(40_000)))
        agl.emit_object(b"\xff\x00")
        assert agl.flush()
    chat, blob = (attributes(span) for span in sink.spans)
    assert chat[semconv.RESPONSE_TOKEN_IDS].WhichOneof("value") == "bytes_value"
    assert unpack_ids(chat[semconv.RESPONSE_TOKEN_IDS].bytes_value) == ids
    assert unpack_ids(chat[semconv.PROMPT_TOKEN_IDS].bytes_value) == list(range(40_000))
    assert unpack_logprobs(chat[semconv.RESPONSE_LOGPROBS].bytes_value) == pytest.approx(logprobs)
    assert blob[semconv.OBJECT_BYTES].bytes_value == b"\xff\x00"


def test_a_burst_while_the_collector_is_stuck_loses_nothing(sink: OtlpSink) -> None:
    sink.hold.clear()
    with exporting(sink):
        for number in range(10_000):
            agl.emit_message(str(number))
        sink.hold.set()
        assert agl.flush()
    assert sorted(int(attributes(span)["agl.message.body"].string_value) for span in sink.spans) == list(range(10_000))


def test_flush_is_false_if_the_collector_refused_spans(sink: OtlpSink, caplog: pytest.LogCaptureFixture) -> None:
    sink.status = 400
    with exporting(sink):
        agl.emit_message("refused")
        assert not agl.flush()
        sink.status = 200
        agl.emit_message("taken")
        assert agl.flush()
    assert [attributes(span)["agl.message.body"].string_value for span in sink.spans] == ["taken"]
    assert "1 spans are lost" in caplog.text


def test_flush_gives_up_in_time(sink: OtlpSink) -> None:
    sink.hold.clear()
    with exporting(sink):
        agl.emit_message("late")
        start = time.monotonic()
        assert not agl.flush(timeout_s=0.1)
        assert time.monotonic() - start < 5
        sink.hold.set()
        assert agl.flush()


def test_flush_waits_for_the_spans_before_it_while_others_go_on_ending(sink: OtlpSink) -> None:
    """So many end all the time that the queue of spans is never empty."""
    stop = threading.Event()

    def emit() -> None:
        while not stop.is_set():
            agl.emit_message("noise")

    with exporting(sink):
        noise = threading.Thread(target=emit)
        noise.start()
        try:
            agl.emit_message("ended before")
            assert agl.flush()
        finally:
            stop.set()
            noise.join()
        assert any(attributes(span)["agl.message.body"].string_value == "ended before" for span in sink.spans)


def test_spans_for_which_the_queue_has_no_place_are_reported_once(
    sink: OtlpSink, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "QUEUE_SPANS", 4)
    monkeypatch.setattr(tracing, "BATCH_SPANS", 2)
    sink.hold.clear()
    with exporting(sink):
        for number in range(7):
            agl.emit_message(str(number))
        sink.hold.set()
        assert not agl.flush()
        assert agl.flush()
    assert [attributes(span)["agl.message.body"].string_value for span in sink.spans] == ["0", "1", "2", "3"]
    assert caplog.text.count("spans are lost: 4 wait for the collector") == 1


def test_init_twice_sends_once(sink: OtlpSink) -> None:
    with exporting(sink):
        assert agl.init(endpoint=sink.url + "/v1/traces/") is agl.init()
        agl.emit_message("once")
        assert agl.flush()
    assert len(sink.spans) == 1


def test_another_endpoint_needs_a_shutdown_first(sink: OtlpSink, caplog: pytest.LogCaptureFixture) -> None:
    with exporting(sink), OtlpSink() as other:
        agl.init(endpoint=other.url)
        assert f"spans still go to {sink.url}/v1/traces, not to {other.url}" in caplog.text
        agl.shutdown()
        agl.init(endpoint=other.url)
        agl.emit_message("second")
        assert agl.flush()
        assert (len(sink.spans), len(other.spans)) == (0, 1)


def test_nothing_is_exported_after_shutdown(sink: OtlpSink) -> None:
    with exporting(sink):
        agl.emit_message("before")
    agl.emit_message("after")
    assert not agl.flush()
    assert [attributes(span)["agl.message.body"].string_value for span in sink.spans] == ["before"]


def test_a_provider_that_is_already_set_keeps_its_exporters(sink: OtlpSink, spans: InMemorySpanExporter) -> None:
    provider = trace.get_tracer_provider()
    assert agl.init(endpoint=sink.url) is provider
    agl.emit_message("both")
    assert agl.flush()
    agl.shutdown()
    assert len(sink.spans) == len(spans.get_finished_spans()) == 1


def test_an_endpoint_that_is_not_a_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="endpoint is 'localhost:4318', expected the collector's URL"):
        agl.init(endpoint="localhost:4318")


def run_agent(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process, where no provider is set yet."""
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )


def test_environment_names_collector_and_service_and_exit_flushes(sink: OtlpSink) -> None:
    done = run_agent(
        "import agl; agl.init(); agl.emit_message('bye')",
        OTEL_EXPORTER_OTLP_ENDPOINT=sink.url,
        OTEL_SERVICE_NAME="named-outside",
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert sink.services == {"named-outside"}


def test_opentelemetry_instrument_exports_an_unchanged_agent(sink: OtlpSink) -> None:
    code = "from opentelemetry import trace; trace.get_tracer('theirs').start_span('step').end()"
    launcher = Path(sys.executable).with_name("opentelemetry-instrument")
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.url, "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "*"}
    subprocess.run([launcher, sys.executable, "-c", code], env=environment, timeout=60, check=True)
    assert [span.name for span in sink.spans] == ["step"]
    assert len(sink.spans) == 1


def test_service_name_given_in_code(sink: OtlpSink) -> None:
    run_agent(f"import agl; agl.init('my-agent', endpoint='{sink.url}'); agl.emit_message('x')")
    assert sink.services == {"my-agent"}


def test_agents_that_seed_python_s_random_numbers_do_not_repeat_ids(sink: OtlpSink) -> None:
    run_agent(
        "import random, agl\n"
        f"agl.init(endpoint='{sink.url}')\n"
        "for _ in range(2):\n"
        "    random.seed(0)\n"
        "    with agl.rollout(): agl.emit_message('x')"
    )
    assert len({span.span_id for span in sink.spans}) == 4
    assert len({span.trace_id for span in sink.spans}) == 2


def test_a_provider_without_span_processors_is_refused() -> None:
    done = run_agent(
        "import agl; from opentelemetry import trace\n"
        "trace.set_tracer_provider(trace.NoOpTracerProvider())\n"
        "try: agl.init()\n"
        "except agl.errors.ConfigError as error: print(error)"
    )
    assert "the global tracer provider is NoOpTracerProvider, expected an OpenTelemetry SDK" in done.stdout


def test_emitting_without_init_warns_once() -> None:
    done = run_agent("import agl\nfor _ in range(3): print(agl.emit_reward(1))\nprint(agl.flush())")
    assert done.stdout.split() == ["None", "None", "None", "False"]
    assert done.stderr.count("agl.init() was not called") == 1


def test_logging_is_left_to_the_application() -> None:
    assert logging.getLogger("agl").handlers == []
