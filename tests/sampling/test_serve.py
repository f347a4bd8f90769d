"""Sampling by `agl serve`: it is killed with spans that are not decided, and another server decides them."""

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from agl import otlp, semconv
from agl.cli import main
from agl.span import Span
from agl.store import Store, open_store
from agl.store.span_row import SpanRow
from agl.store.traffic import TrafficStore
from agl.trajectory import read_sampled
from tests.store.serving import serving
from tests.waiting import wait_until

CONFIG = "sampling: {base_rate: 0, grace_s: 0, decision_wait_s: 0.5, max_span_per_minute: null}"


def spans(rollout: str, number: int, reward: float, mode: str = "prod") -> list[Span]:
    named = {semconv.ROLLOUT_ID: rollout, semconv.MODE: mode}
    trace, root, now = f"{number:032x}", f"{number:016x}", 10**18
    value = {semconv.REWARD_VALUE: reward}
    emitted = Span(trace, f"{number + 1:016x}", root, semconv.SPAN_REWARD, now, now + 1, named | value)
    return [emitted, Span(trace, root, None, semconv.SPAN_ROLLOUT, now, now + 2, named)]


def is_decided(store: Store, rollout_id: str) -> bool:
    return read_sampled(store.query_spans(rollout_id)) is not None


def test_a_server_that_is_killed_loses_no_rollout_and_the_commands_explain_the_decisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, config = f"sqlite:///{tmp_path}/agl.db", tmp_path / "agl.yaml"
    config.write_text(CONFIG)
    sent = [*spans("poor", 100, 0.2), *spans("rich", 200, 0.9), *spans("trained", 300, 0.1, "train")]
    with serving(uri, "--config", str(config)) as (_, url):
        body, kind = otlp.encode(sent), {"content-type": "application/x-protobuf"}
        assert httpx.post(url, content=body, headers=kind).status_code == 200
    with closing(open_store(uri)) as store, serving(uri, "--config", str(config)):
        wait_until(lambda: is_decided(store, "poor") and is_decided(store, "rich"))
        assert [len(store.query_spans(name)) for name in ("poor", "rich", "trained")] == [1, 3, 2]

    assert main(["inspect", "poor", "--store", uri]) == 0
    shown = capsys.readouterr().out
    assert "left out for certain: by chance (sampling.base_rate)" in shown and "reward 0.2" in shown
    assert "it had 2 spans and 0 model calls" in shown
    assert main(["inspect", "rich", "--store", uri]) == 0
    assert "kept for certain: a reward reached sampling.reward_threshold" in capsys.readouterr().out
    assert main(["rollouts", "--store", uri, "--json"]) == 0
    listed = {each["rollout_id"]: (each["left_out"], each["reward"]) for each in json.loads(capsys.readouterr().out)}
    assert listed == {"poor": (True, 0.2), "rich": (False, 0.9), "trained": (False, 0.1)}
    assert main(["spans", "export", "--rollout", "rich", "--rollout", "trained", "--store", uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = [[span.get("traceState", "") for span in _spans(line)] for line in lines]
    # printf rich | sha256sum
    assert states == [["ot=th:0;rv:7baa68f2418ba8"] * 3, ["", ""]]


def _spans(line: str) -> list[dict[str, str]]:
    groups = json.loads(line)["resourceSpans"]
    return [span for group in groups for scope in group["scopeSpans"] for span in scope["spans"]]


def test_inspect_shows_a_rollout_that_is_not_decided_yet_and_what_it_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    with closing(open_store(uri)) as store:
        assert isinstance(store, TrafficStore)
        rewarded, root = spans("both", 100, 0.2)
        open_ended, _ = spans("open", 200, 0.2)
        _, unrewarded = spans("mute", 300, 0.2)
        of_group = [
            replace(span, attributes={**span.attributes, semconv.GROUP_ID: "g"}) for span in spans("in", 400, 0.2)
        ]
        other = replace(
            unrewarded, attributes={**unrewarded.attributes, semconv.GROUP_ID: "g", semconv.ROLLOUT_ID: "out"}
        )
        sent = [rewarded, root, open_ended, unrewarded, *of_group, other]
        store.append_pending(list(map(SpanRow.of, sent)), now_ns=store.list_pending().now_ns - 5 * 10**9)
    expected = {
        "both": "its next pass, or the end of the minute",
        "open": "the root span of open, or for decision_wait_s",
        "mute": "a reward of mute, which is over, or for grace_s",
        "in": "a reward of out, which is over",
    }
    for name, waits_for in expected.items():
        assert main(["inspect", name, "--store", uri]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"pending for [5-9]\d* s: sampling has not decided it yet, and waits for " + waits_for, shown)
        assert ("agl.rollout" in shown, "reward 0.2" in shown) == (name != "open", name != "mute"), shown
    assert main(["inspect", "both", "--json", "--store", uri]) == 0
    assert "sampling has not decided it yet" in json.loads(capsys.readouterr().out)["pending"]
    assert main(["inspect", "nobody", "--store", uri]) == 2
    assert "holds no span of rollout 'nobody'" in capsys.readouterr().err
