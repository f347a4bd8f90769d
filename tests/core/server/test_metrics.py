"""`/metrics` of a server that has received spans and calls, and what the files in `deploy` ask of it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from agl import otlp
from agl.server_thread import ServerThread
from agl.store import Resource, open_store
from tests.core.fake_engine import FakeEngine
from tests.core.span_maker import gateway_call

DEPLOY = Path(__file__).parents[3] / "deploy"
_NAME = re.compile(r"(?:agl|span)_[a-z_]+")


@pytest.fixture(scope="module")
def scraped() -> Iterator[dict[str, dict[tuple[str, ...], float]]]:
    """Value by metric and by label values, in the order of the labels' names.

    After two spans, a rejected request, a call, one that fails, and two steps.
    """
    store = open_store("memory://")
    store.put_resource(Resource("run toy", 0, "/toy", {"state": "training"}))
    store.put_resource(Resource("run over", 0, "/over", {"state": "ended"}))
    for step in (1, 2):
        store.append_metrics("toy", step, {"calls/dropped/stale": 3.0, "reward/mean": 0.25 * step})
    with ServerThread(store, port=0, otlp_http_port=0, upstream=FakeEngine().app) as server:
        traces, protobuf = f"{server.otlp_url}/v1/traces", {"content-type": "application/x-protobuf"}
        assert httpx.post(traces, content=otlp.encode([gateway_call(), gateway_call()]), headers=protobuf).is_success
        assert httpx.post(traces, content=b"no spans", headers=protobuf).status_code == 400
        for model, status in (("writer@3", 200), ("planner@1", 404)):
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
            assert httpx.post(f"{server.base_url}/v1/chat/completions", json=body).status_code == status
        text = httpx.get(f"{server.base_url}/metrics").text
    store.close()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for name, value in sample.labels.items() if name not in ("le", "engine"))
            found.setdefault(sample.name, {})[labels] = sample.value
    yield found


def test_what_happened_is_counted(scraped: dict[str, dict[tuple[str, ...], float]]) -> None:
    assert scraped["agl_spans_committed_total"] == {(): 2.0}
    assert scraped["agl_otlp_requests_total"] == {("200",): 1.0, ("400",): 1.0}
    assert scraped["agl_store_spans"] == {(): 4.0}
    assert scraped["span_queue_length"] == {(): 0.0}
    assert scraped["agl_gateway_calls_total"] == {("writer", "200"): 1.0, ("planner", "404"): 1.0}
    assert scraped["agl_gateway_call_seconds_count"] == {("writer",): 1.0, ("planner",): 1.0}
    assert scraped["agl_gateway_tokens_total"][("response", "writer")] == 3.0
    assert scraped["agl_training_step"] == {("toy",): 2.0}
    assert scraped["agl_training_running"] == {("toy",): 1.0, ("over",): 0.0}
    assert scraped["agl_training_reward"] == {("toy",): 0.5}
    assert scraped["agl_training_calls_dropped_total"] == {("stale", "toy"): 6.0}


def test_dashboard_and_alerts_ask_for_metrics_that_exist(scraped: dict[str, dict[tuple[str, ...], float]]) -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    rules = yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text())["groups"][0]["rules"]
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [rule["expr"] for rule in rules]
    asked = {name for query in queries for name in _NAME.findall(query)}
    assert len(asked) >= 9 and asked <= scraped.keys()
    assert "span_queue_length > 5000" in queries
