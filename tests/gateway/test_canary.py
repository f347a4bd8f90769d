"""A canary through two gateways of one store, over days of a clock that the tests set: what answers whom, and why."""

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

import agl.span
from agl import semconv
from agl.canary.assignment import hash_key
from agl.canary.decision import check, end, running, start
from agl.canary.history import Event, all_events, last_event
from agl.config import CanaryConfig, GatewayConfig
from agl.errors import CanaryError
from agl.gateway import arms
from agl.server_thread import ServerThread
from agl.span import Span, now_ns
from tests.core.fake_engine import Answer, FakeEngine
from tests.gateway.serving import Store, chat_body, wait_until

DAY_NS = 86_400 * 10**9
OLD, NEW = {"planner": "planner@12", "writer": "writer@12"}, {"planner": "planner@13", "writer": "writer@13"}
SETTINGS: dict[str, Any] = {
    "fraction": 0.5,
    "auto": True,
    "promote": {"min_rollouts": 20},
    "guard": {"p95_latency": 1e6},
}
"""The latencies are those of a machine that may be busy."""


@dataclass
class Engine(FakeEngine):
    """Answers in the name of another model where `instead` says so, as an engine that never loaded an adapter."""

    models: tuple[str, ...] = (*OLD.values(), *NEW.values(), "base", "planner", "planner@14")
    instead: dict[str, str] = field(default_factory=dict)

    async def _answer(self, request: Request, answer: Answer) -> Response:
        answer.body["model"] = self.instead.get(answer.body["model"], answer.body["model"])
        return await super()._answer(request, answer)


@dataclass
class Site:
    """Two gateways over one store."""

    store: Store
    engine: Engine
    urls: list[str]
    client: httpx.Client
    probes: Iterator[int] = field(default_factory=itertools.count)

    def call(self, rollout: str, role: str = "planner", header: str = "", gateway: int = 0, **body: Any) -> str:
        """A call of a rollout in production; returns the engines' name of the model that was asked."""
        url = f"{self.urls[gateway]}/rollout/{rollout}/attempt/{rollout}-a1/v1/chat/completions"
        answer = self.client.post(
            url, json=chat_body(model=role) | body, headers={"x-agl-user": header} if header else {}
        )
        assert answer.status_code == 200, answer.text
        return json.loads(self.store.appended[-1].text(semconv.GATEWAY_CHANGED) or "{}").get("model", role)

    def reward(self, rollout: str, value: float) -> None:
        start_ns = now_ns()
        named = {semconv.ROLLOUT_ID: rollout, semconv.ATTEMPT_ID: f"{rollout}-a1", semconv.REWARD_VALUE: value}
        number = f"{start_ns:032x}"
        self.store.append_spans([Span(number, number[-16:], None, semconv.SPAN_REWARD, start_ns, start_ns, named)])

    def start(self, now: int | None = None, **settings: Any) -> Event:
        event = start(self.store, NEW, OLD, CanaryConfig(**SETTINGS | settings), "test", now or now_ns())
        self.follow()
        return event

    def follow(self) -> None:
        """Wait until both gateways know the last event: rollouts that begin get its number, whomever they call."""
        last = last_event(self.store)
        assert last is not None
        for gateway, url in enumerate(self.urls):
            wait_until(lambda gateway=gateway: self._event_of_new_rollout(gateway) == last.number)
            assert self.client.get(f"{url}/api/gateway").json()["production"] == last.versions

    def _event_of_new_rollout(self, gateway: int) -> float | None:
        self.call(f"probe-{next(self.probes)}", "base", gateway=gateway)
        return self.store.appended[-1].number(semconv.CANARY_EVENT)


@contextmanager
def site(**gateway: Any) -> Iterator[Site]:
    store, engine = Store(), Engine()
    options: dict[str, Any] = {"port": 0, "otlp_http_port": 0, "gateway": GatewayConfig(**gateway)}
    try:
        with (
            ServerThread(store, upstream=engine.app, **options) as one,
            ServerThread(store, upstream=engine.app, **options) as other,
            httpx.Client() as client,
        ):
            yield Site(store, engine, [one.base_url, other.base_url], client)
    finally:
        store.close()


@pytest.fixture(autouse=True)
def quick_and_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways follow sooner, and every run of these tests has the same arms."""
    monkeypatch.setattr(arms, "_POLL_S", 0.02)
    monkeypatch.setattr(secrets, "token_hex", lambda _: "5a17")


@pytest.fixture
def go_to_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """Sets the clock of spans to noon of the n-th day from today, and returns that time."""
    today_ns = time.time_ns() // DAY_NS * DAY_NS

    def go(day: int) -> int:
        moment = today_ns + day * DAY_NS + DAY_NS // 2
        monkeypatch.setattr(agl.span, "_offset_ns", moment - time.monotonic_ns())
        return moment

    return go


@pytest.mark.parametrize(
    ("earns", "outcome"), [({"13": 0.9, "12": 0.5}, "promoted"), ({"13": 0.2, "12": 0.7}, "rolled_back")]
)
def test_in_five_days_the_better_candidate_is_promoted_and_the_worse_rolled_back(
    earns: dict[str, float], outcome: str, go_to_day: Callable[[int], int]
) -> None:
    """A decision is taken once, whichever of the servers takes it, and at all gateways for both roles together."""
    with site() as here:
        go_to_day(1)
        here.start()
        here.call("long", header="long")
        decided_on = None
        for day in range(1, 6):
            now = go_to_day(day)
            for number in range(12):
                rollout = f"day-{day}-{number}"
                version = here.call(rollout, header=rollout, gateway=number % 2).partition("@")[2]
                here.reward(rollout, earns[version])
            if decided_on is None:
                _, event = check(here.store, "a server", now)
                decided_on = day if event else None
        assert (last := last_event(here.store)) is not None and last.kind == outcome
        assert decided_on == (4 if outcome == "promoted" else decided_on) and (decided_on or 9) <= 5
        assert last.evidence["because"] == last.reason and last.evidence["days"] and last.by == "a server"
        here.follow()
        winner = NEW if outcome == "promoted" else OLD
        assert [here.call("after", role, gateway=1) for role in NEW] == [*winner.values()]


def test_a_running_rollout_stays_on_its_versions_in_every_gateway_and_after_a_restart(
    go_to_day: Callable[[int], int],
) -> None:
    with site() as here:
        assert here.call("before", role="base") == "base"
        here.start()
        running_rollouts = {f"r-{number}": here.call(f"r-{number}", header=f"u-{number}") for number in range(8)}
        assert {*running_rollouts.values()} == {"planner@12", "planner@13"}
        end(here.store, running(here.store), "promoted", "test", "", now_ns(), {})
        here.follow()
        assert {name: here.call(name, gateway=1) for name in running_rollouts} == running_rollouts
        assert here.call("before", role="planner", gateway=1) == "planner"
        assert here.call("new") == "planner@13"


def test_a_store_that_cannot_be_read_stops_no_production() -> None:
    with site() as here:
        here.start()
        here.store.unreadable = True
        assert here.call("r-1", header="ann") == here.call("r-2", header="ann", gateway=1)


def test_users_keep_their_arm_and_a_larger_fraction_takes_the_candidate_from_nobody() -> None:
    with site() as here:
        event = here.start(fraction=0.3)
        users = [f"user-{number}" for number in range(24)]
        before = {user: here.call(f"{user}-1", header=user) for user in users}
        here.call("by-field", user=users[0])
        assert here.store.appended[-1].text(semconv.CANARY_KEY) == hash_key(event.canary.id, f"user {users[0]}")
        start(here.store, NEW, {}, CanaryConfig.model_validate(SETTINGS | {"fraction": 0.6}), "test", now_ns())
        here.follow()
        after = {user: here.call(f"{user}-2", header=user) for user in users}
        raised = [user for user in users if (before[user], after[user]) == ("planner@12", "planner@13")]
        assert raised and not [user for user in users if (before[user], after[user]) == ("planner@13", "planner@12")]
        verdict, _ = check(here.store, "test", now_ns())
        assert verdict.observed.in_both_arms >= 2 * len(raised)
        assert not {sample.rollout_id for sample in verdict.observed.samples} & {f"{user}-1" for user in raised}
        assert "x-agl-user" not in here.engine.headers[-1]


@pytest.mark.parametrize("answers", ["planner@12", "base", "planner@14"])
def test_an_adapter_that_was_never_loaded_stops_the_canary_with_the_call(answers: str) -> None:
    with site() as here:
        here.engine.instead = {"planner@13": answers}
        here.start()
        number = 0
        while here.call(f"r-{number}", header=f"u-{number}") != "planner@13":
            number += 1
        wait_until(lambda: (last := last_event(here.store)) is not None and not last.is_running)
        stopped = all_events(here.store)[-1]
        assert (stopped.kind, stopped.versions) == ("stopped", OLD)
        found = stopped.evidence["unproved"][0]
        assert (found["rollout_id"], found["expected"]) == (f"r-{number}", "planner@13")
        assert (
            found["answered"] == (answers if "@" in answers else f"{answers}@0") and found["span_id"] in stopped.reason
        )
        assert here.call("next") == "planner@12"


def test_a_call_of_a_rollout_that_an_earlier_canary_began_does_not_stop_this_one() -> None:
    with closing(Store()) as store:
        event = start(store, NEW, OLD, CanaryConfig(**SETTINGS), "test", now_ns())
        followed = arms.Arms(store)

        async def runs_after_a_call_of(canary: str) -> bool:
            named = {
                semconv.CANARY_ID: canary,
                semconv.CANARY_VERSION: "planner@13",
                semconv.POLICY_VERSION: "planner@12",
            }
            async with followed.following():
                await followed.prove([Span("a" * 32, "b" * 16, None, semconv.SPAN_GATEWAY_CALL, 1, 2, named)])
            return running(store) == event

        assert asyncio.run(runs_after_a_call_of("an earlier one"))
        with pytest.raises(CanaryError, match="the last one was stopped"):
            asyncio.run(runs_after_a_call_of(event.canary.id))
