"""A small store with every kind of rollout that the page shows."""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from agl import semconv
from agl.canary.decision import start
from agl.canary.history import last_event
from agl.config import CanaryConfig
from agl.inspection.evaluation import evaluation_record
from agl.span import Span
from agl.store import Resource, Rollout, Store
from agl.trajectory import DropReason, build_trajectory, trained_span
from tests.core.span_maker import gateway_call, reward, span

WORDS = ["count", "the", "orders", "SELECT", "1", "SELECT ", "2", "please"]
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
ANSI = "\x1b[31mred\x1b[0m\x07"
REORDERED = "abc\u202edef\u2066ghi\ufeff"
HALF = '"\\ud800 half a pair"'
"""JSON of half a surrogate pair, which UTF-8 cannot encode."""
LONG = "long " * 200_000
EVIL = f"evil/../?&#{SCRIPT}"


def fill(store: Store, folder: Path) -> None:
    """`folder` becomes that of the run `toy`."""
    _write_tokenizer(folder)
    store.put_resource(Resource("run toy", 0, str(folder)))
    for version in (2, 4):
        store.put_resource(Resource("toy/writer", version, f"/adapters/writer@{version}"))
    start(store, {"writer": "writer@4"}, {"writer": "writer@2"}, CanaryConfig(fraction=0.25), "Ada", time.time_ns())
    _add_arms(store)
    for number in range(60):
        name = f"plain-{number}"
        store.enqueue_rollouts([Rollout(name, number, mode="eval", metadata={"run": "toy"})])
        store.append_spans(rollout(name, "eval", number / 60, role="writer" if number % 2 else "fixer"))
    store.append_spans(rollout("failed", "prod", None, error="ValueError: no such table"))
    for name, value in (("trained", 1.0), ("equal", 0.5)):
        store.enqueue_rollouts([Rollout(name, name, "task-1", metadata={"run": "toy"})])
        spans = rollout(name, "train", value)
        call = build_trajectory(spans).calls[0]
        is_trained = name == "trained"
        advantage, reason = (0.75, None) if is_trained else (None, DropReason.ZERO_ADVANTAGE)
        ratios = (0.75, 1.25) if is_trained else ()
        store.append_spans([*spans, trained_span(call, 3, advantage, reason, weight=0.5, run="toy", ratios=ratios)])
    store.append_spans(drifted("drifted"))
    _add_metrics(store)
    store.append_spans(evil())


def _add_arms(store: Store) -> None:
    """Two rollouts of each arm of the canary; the candidate earns 0.9, the current version 0.6."""
    event = last_event(store)
    assert event is not None
    for number, (arm, version, value) in enumerate([("candidate", "writer@4", 0.9), ("current", "writer@2", 0.6)] * 2):
        root, call, given = rollout(f"arm-{number}", "prod", value, version=version)
        names = {semconv.CANARY_ID: event.canary.id, semconv.CANARY_ARM: arm, semconv.CANARY_VERSION: version}
        call = replace(call, attributes={**call.attributes, **names, semconv.CANARY_KEY: f"user {number}"})
        store.append_spans([root, call, given])


def _add_metrics(store: Store) -> None:
    """Ten steps in which 15 of 20 groups are equal, 8 of 40 rollouts fail, and half of the calls are stale; then
    evaluations: the right one is worse in one task of three, and better in one."""
    for step in range(1, 11):
        metrics = {"reward/mean": 0.1 * step, "reward/std": 0.2, "reward/goal": 0.3, "rollouts": 4.0, "groups": 2.0}
        metrics |= {"groups/zero_variance": 1.5, "rollouts/failed": 0.8, "calls": 4.0, "calls/dropped/stale": 2.0}
        metrics |= {"writer/grad_norm": 9.0 if step == 10 else 1.0, "writer/kl": 0.1, "writer/same_answer": 0.95}
        store.append_metrics("toy", step, metrics | {"time/rollouts_s": 3.0, "time/update_s": 1.0})
    for label, ids in (("base", (10, 20, 30)), ("grpo", (5, 40, 30))):
        tasks = {f"task {place}": f"plain-{number}" for place, number in enumerate(ids)}
        store.put_resource(evaluation_record("toy", label, "/eval", tasks))


def rollout(
    name: str,
    mode: str,
    value: float | None,
    *,
    role: str = "writer",
    version: str = "writer@3",
    error: str | None = None,
    answer: str = "SELECT 1",
) -> list[Span]:
    """A rollout with a call of `role`, and a reward if there is a `value`."""
    said = _said("count the orders", answer)
    root = _root(name, hashlib.md5(name.encode()).hexdigest(), mode, error)
    call = gateway_call((0, 1, 2), (3, 4), parent=root, role=role, version=version, attributes=said)
    given = [reward(value, {"agl.reward.goal": value}, parent=root)] if value is not None else []
    return [_named(each, name) for each in (root, call, *given)]


def drifted(name: str) -> list[Span]:
    """The second prompt has token 5 where 3 was sampled; the third call has no token ids."""
    root = _root(name, "d" * 32, "train")
    first = gateway_call((0, 1, 2), (3, 4), parent=root, role="writer", attributes=_said("count", "SELECT 1"))
    second = gateway_call(
        (0, 1, 2, 5, 4, 7), (3, 6), parent=root, role="writer", attributes=_said("please", "SELECT 2")
    )
    bare = gateway_call(parent=root, role="writer")
    without = {name: value for name, value in bare.attributes.items() if "token_ids" not in name}
    bare = Span(bare.trace_id, bare.span_id, bare.parent_id, bare.name, bare.start_ns, bare.end_ns, without)
    return [_named(each, name) for each in (root, first, second, bare, reward(1.0, parent=root))]


def evil() -> list[Span]:
    """A rollout in which every text that others choose is an attack, or unreadable."""
    named = {semconv.GROUP_ID: SCRIPT}
    root = span(f"{SCRIPT}{ANSI}{REORDERED}", named, trace_id="e" * 32, status="error", message=SCRIPT)
    failed = span(semconv.SPAN_ROLLOUT, {semconv.MODE: "prod"}, parent=root, status="error", message=SCRIPT + REORDERED)
    messages = f'[{{"role": "user", "content": {HALF}}}, {{"role": "system", "content": "{LONG}"}}]'
    request = _said("", f"{SCRIPT}{ANSI}{REORDERED}\r\n\x00")
    request[semconv.GATEWAY_REQUEST] = f'{{"messages": {messages}}}'
    call = gateway_call((0, 1), (3,), parent=failed, role=SCRIPT, version=f"{SCRIPT}@1", attributes=request)
    given = reward(1.0, {f"agl.reward.{SCRIPT}": 1.0, semconv.REWARD_TARGET: SCRIPT}, parent=root)
    return [_named(each, EVIL) for each in (root, failed, call, given)]


def _root(name: str, trace: str, mode: str, error: str | None = None) -> Span:
    attributes = {semconv.ROLLOUT_ID: name, semconv.MODE: mode}
    return span(
        semconv.SPAN_ROLLOUT, attributes, trace_id=trace, status="error" if error else "unset", message=error or ""
    )


def _said(question: str, answer: str) -> dict[str, str]:
    output = [{"role": "assistant", "parts": [{"type": "text", "content": answer}]}]
    return {
        semconv.GATEWAY_REQUEST: json.dumps({"messages": [{"role": "user", "content": question}]}),
        semconv.GEN_AI_OUTPUT_MESSAGES: json.dumps(output),
    }


def _named(one: Span, rollout_id: str) -> Span:
    attributes = {**one.attributes, semconv.ROLLOUT_ID: rollout_id}
    return Span(
        *(one.trace_id, one.span_id, one.parent_id, one.name, one.start_ns, one.end_ns, attributes, one.status),
        status_message=one.status_message,
    )


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="please"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]  # its stubs have no setter
    tokenizer.save(str(folder / "tokenizer.json"))
