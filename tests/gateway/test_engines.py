"""Several engines: routing, failures, retries, keys and model names."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from agl import semconv
from agl.config import GatewayConfig, UpstreamConfig
from agl.errors import ConfigError
from agl.gateway.dispatch import Routes
from agl.gateway.engine import Engine
from agl.secret_url import SecretUrl
from agl.server.api_error import ApiError
from agl.server_thread import ServerThread
from tests.core.fake_engine import FakeEngine
from tests.gateway.serving import Setup, Store, assert_tokens, chat_body, gateway, serving, wait_until

NOBODY = "http://127.0.0.1:9/v1"


@contextmanager
def before_two(**settings: Any) -> Iterator[tuple[Setup, FakeEngine, FakeEngine]]:
    """A gateway with two engines."""
    engines = FakeEngine(), FakeEngine()
    with ExitStack() as stack:
        served = [stack.enter_context(serving(engine)) for engine in engines]
        extra = settings.pop("of_each", ({}, {}))
        listed = [{"url": url} | more for url, more in zip(served, extra, strict=True)]
        yield stack.enter_context(gateway(engines=listed, **settings)), *engines


def post(setup: Setup, body: Any, rollout: str) -> httpx.Response:
    return setup.post(body, f"/rollout/{rollout}/attempt/a1/v1/chat/completions")


# --- Routing ---------------------------------------------------------------------------------------------------------


def routes(*models: list[str], **names: str) -> Routes:
    engines = [
        UpstreamConfig(url=SecretUrl(f"http://engine-{number}/v1"), models=of) for number, of in enumerate(models)
    ]
    return Routes([Engine(config) for config in engines], names)


def test_a_rollout_keeps_its_engine_and_rollouts_are_spread() -> None:
    table = routes([], [], [])
    chosen = {f"r{number}": table.choose("m", f"r{number}") for number in range(300)}
    counts = [list(chosen.values()).count(engine) for engine in table.engines]
    assert min(counts) > 60
    assert all(table.choose("m", rollout) is engine for rollout, engine in chosen.items())
    gone = table.engines[0]
    gone.is_reachable = False
    moved = {rollout for rollout, engine in chosen.items() if table.choose("m", rollout) is not engine}
    assert moved == {rollout for rollout, engine in chosen.items() if engine is gone}


def test_a_call_without_a_rollout_goes_to_the_least_busy_engine() -> None:
    table = routes([], [])
    table.engines[0].queue.in_use = 3
    assert table.choose("m", None) is table.engines[1]


def test_an_engine_gets_every_version_of_the_models_that_it_serves() -> None:
    table = routes(["planner"], ["executor", "base"])
    for model, place in [("planner", 0), ("planner@7", 0), ("executor@1", 1), ("base", 1)]:
        assert table.choose(model, "r") is table.engines[place]
    with pytest.raises(ApiError, match="no engine of the gateway is configured to serve 'judge'") as caught:
        table.choose("judge", "r")
    assert (caught.value.http_status, caught.value.code) == (404, "model_not_found")


def test_when_no_engine_is_reachable_one_is_tried() -> None:
    table = routes([], [])
    for engine in table.engines:
        engine.is_reachable = False
    first = table.choose("m", "r")
    assert table.choose("m", "r", [first]) is not first


def test_a_model_name_is_mapped_once() -> None:
    table = routes([], **{"gpt-4o": "planner", "planner": "planner@12"})
    assert [table.policy(name) for name in ("gpt-4o", "planner", "planner@3")] == [
        "planner",
        "planner@12",
        "planner@3",
    ]


def test_all_calls_of_a_rollout_go_to_one_engine() -> None:
    with before_two() as (setup, one, two):
        for number in range(12):
            post(setup, chat_body(), f"r{number % 4}")
        of_rollouts = {
            rollout: {span.text(semconv.GATEWAY_UPSTREAM) for span in setup.store.query_spans(rollout)}
            for rollout in ("r0", "r1", "r2", "r3")
        }
        assert all(len(engines) == 1 for engines in of_rollouts.values())
        assert len(one.seen) + len(two.seen) == 12


def test_model_names_are_mapped_by_the_configuration_and_over_http() -> None:
    with gateway(models={"gpt-4o": "writer@3"}) as setup:
        assert setup.post(chat_body(model="gpt-4o")).json()["model"] == "gpt-4o"
        assert setup.engine.seen[-1]["model"] == "writer@3"
        span = setup.span()
        assert span.text(semconv.GEN_AI_REQUEST_MODEL) == "gpt-4o"
        assert span.text(semconv.POLICY_VERSION) == "writer@3"
        assert json.loads(span.text(semconv.GATEWAY_CHANGED) or "")["model"] == "writer@3"
        assert [model.id for model in setup.client().models.list()] == ["writer@3", "base", "gpt-4o"]
        put = httpx.put(f"{setup.url}/api/gateway/models/writer", json={"model": "base"})
        assert put.json()["models"] == {"gpt-4o": "writer@3", "writer": "base"}
        assert setup.post(chat_body(model="writer")).json()["model"] == "writer"
        assert setup.engine.seen[-1]["model"] == "base"
        httpx.put(f"{setup.url}/api/gateway/models/writer", json={"model": None})
        assert setup.post(chat_body(model="writer")).status_code == 404
        refused = httpx.put(f"{setup.url}/api/gateway/models/writer", json={"to": "x"})
        assert refused.status_code == 422 and "model: Field required" in refused.json()["error"]["message"]


def test_a_rollout_keeps_the_version_that_it_began_with_in_all_its_roles() -> None:
    """Versions change in one step. Calls in mode prod, and new attempts, get the new ones at once.

    Names of clients lead to roles. A role that shares an adapter has its own name in the recorded version.
    """

    def rollout(number: int, attempt: int = 1, mode: str = "train") -> dict[str, str]:
        return {"baggage": f"agl.rollout.id=r{number},agl.attempt.id=a{attempt},agl.mode={mode}"}

    def switch(**versions: str | None) -> dict[str, Any]:
        return httpx.patch(f"{setup.url}/api/gateway/versions", json={"versions": versions}).json()

    with gateway(models={"gpt-4o": "planner"}) as setup:
        setup.engine.models = ("planner@3", "writer@3", "planner@4", "writer")

        def asked(role: str, **headers: str) -> str:
            assert setup.post(chat_body(model=role), **headers).status_code == 200
            return setup.engine.seen[-1]["model"]

        switch(planner="planner@3", writer="writer@3")
        old, served = rollout(1), rollout(2, mode="prod")
        assert asked("planner", **old) == asked("gpt-4o", **served) == "planner@3"
        versions = {"planner": "planner@4", "writer": "planner@4"}
        assert switch(**versions)["versions"] == versions
        assert [asked(role, **old) for role in ("planner", "writer")] == ["planner@3", "writer@3"]
        for later in (rollout(1, attempt=2), rollout(3), served, {}):
            assert [asked(role, **later) for role in ("gpt-4o", "writer")] == ["planner@4", "planner@4"]
            recorded = [span.text(semconv.POLICY_VERSION) for span in setup.store.appended[-2:]]
            assert recorded == ["planner@4", "writer@4"]
        switch(writer=None)
        assert asked("writer", **rollout(4)) == "writer" and asked("writer", **rollout(3)) == "planner@4"


def test_models_of_all_engines_are_listed() -> None:
    with before_two(of_each=({}, {})) as (setup, one, two):
        one.models, two.models = ("a", "both"), ("both", "b")
        assert [model.id for model in setup.client().models.list()] == ["a", "both", "b"]


# --- Keys ------------------------------------------------------------------------------------------------------------


def test_an_engine_sees_its_own_key_and_none_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "engine-secret")
    with before_two(of_each=({"key_env": "ENGINE_KEY"}, {"models": ["nothing"]})) as (setup, one, _):
        setup.post(chat_body(), authorization="Bearer client-secret", **{"x-api-key": "client-secret"})
        assert one.headers[0]["authorization"] == "Bearer engine-secret"
        assert "client-secret" not in str(one.headers)
        assert "secret" not in str(setup.span())


def test_user_and_password_of_an_engine_are_sent_to_it_and_shown_to_nobody() -> None:
    engine = FakeEngine()
    with serving(engine) as url, gateway(engines=[{"url": url.replace("://", "://me:en%21gine-pw@")}]) as setup:
        given = {"authorization": "Bearer client", "cookie": "a=client", "api-key": "client", "x-mine": "client"}
        answer = setup.post(chat_body(), connection="close, X-Mine", **given)
        assert answer.status_code == 200
        (headers,) = engine.headers
        assert headers["authorization"] == "Basic bWU6ZW4hZ2luZS1wdw=="  # me:en!gine-pw
        assert "client" not in str(headers)
        shown = f"{httpx.get(f'{setup.url}/api/health').text} {setup.span()} {dict(answer.headers)}"
        assert url in shown and "gine-pw" not in shown


def test_a_missing_key_is_an_error_at_the_start() -> None:
    with (
        pytest.raises(ConfigError, match="the environment has no NO_SUCH_KEY, which key_env of http://x/v1 names"),
        gateway(engines=[{"url": "http://x/v1", "key_env": "NO_SUCH_KEY"}]),
    ):
        pass


# --- Failing engines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize("stream", [False, True])
def test_a_temporary_failure_of_an_engine_is_retried_and_recorded(status: int, stream: bool) -> None:
    with gateway(backoff_s=0.01) as setup:
        setup.engine.failures += [status, status]
        assert setup.post(chat_body(stream=stream)).status_code == 200
        span = setup.span()
        assert_tokens(span)
        retries = span.attributes[semconv.GATEWAY_RETRIES]
        assert isinstance(retries, (list, tuple)) and len(retries) == 2
        assert str(retries[0]).endswith(f"answered {status}: not now")


def test_the_last_error_of_an_engine_reaches_the_client() -> None:
    with gateway(backoff_s=0.01, retries=1) as setup:
        setup.engine.failures += [503, 429]
        answer = setup.post(chat_body())
        assert (answer.status_code, answer.json()) == (429, {"error": {"message": "not now"}})
        assert setup.span().text(semconv.ERROR_TYPE) == "429"


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_permanent_failure_of_an_engine_is_not_retried(status: int) -> None:
    with gateway(backoff_s=0.01) as setup:
        setup.engine.failures += [status]
        assert setup.post(chat_body()).status_code == status
        assert len(setup.engine.seen) == 1


def test_a_model_that_only_one_engine_serves_is_not_asked_for_again() -> None:
    """Engines of another base model do not have what this one lacks."""
    engine = FakeEngine()
    engine.failures += [404]
    with serving(engine) as url:
        engines = [{"url": url, "models": ["planner"]}, {"url": NOBODY, "models": ["executor"]}]
        with gateway(engines=engines, backoff_s=0.01) as setup:
            assert setup.post(chat_body(model="planner@3")).status_code == 404
    assert len(engine.seen) == 1


def test_a_stream_that_has_begun_is_not_retried() -> None:
    with gateway(backoff_s=0.01) as setup:
        assert "broke off" in setup.post(chat_body("BREAK", stream=True)).text
        assert len(setup.engine.seen) == 1
        assert semconv.GATEWAY_RETRIES not in setup.span().attributes


def test_if_one_engine_is_down_the_other_answers() -> None:
    engine = FakeEngine()
    with serving(engine) as url, gateway(engines=[{"url": NOBODY}, {"url": url}], backoff_s=0.01) as setup:
        for number in range(8):
            assert post(setup, chat_body(), f"r{number}").status_code == 200
        assert len(engine.seen) == 8


def test_an_engine_that_comes_back_gets_calls_again() -> None:
    one, two = FakeEngine(), FakeEngine()
    with serving(one) as url, ExitStack() as stack:
        second = stack.enter_context(ExitStack())
        other = second.enter_context(serving(two))
        setup = stack.enter_context(gateway(engines=[{"url": url}, {"url": other}], health_s=0.05, backoff_s=0.01))

        def answering() -> list[bool]:
            return [engine["answers"] for engine in httpx.get(f"{setup.url}/api/health").json()["engines"]]

        second.close()
        wait_until(lambda: answering() == [True, False])
        for number in range(6):
            assert post(setup, chat_body(), f"r{number}").status_code == 200
        assert len(two.seen) == 0
        second.enter_context(serving(two, port=int(other.split(":")[2].partition("/")[0])))
        wait_until(lambda: answering() == [True, True])
        for number in range(40):
            post(setup, chat_body(), f"r{number}")
        assert len(two.seen) > 5


def test_a_call_for_a_model_that_one_engine_lacks_goes_to_another() -> None:
    """An engine that has just restarted has lost its adapters."""
    with before_two(of_each=({}, {}), backoff_s=0.01) as (setup, _, two):
        two.models = ("base",)
        for number in range(12):
            assert post(setup, chat_body(), f"r{number}").status_code == 200
        assert two.seen
        assert post(setup, chat_body(model="nothing"), "r").status_code == 404


def test_engines_come_and_go_while_the_gateway_runs() -> None:
    one, two = FakeEngine(), FakeEngine()
    config = GatewayConfig(health_s=0.05, backoff_s=0.01)
    with serving(one) as first, ExitStack() as stack:
        second = stack.enter_context(serving(two))
        server = stack.enter_context(ServerThread(Store(), port=0, otlp_http_port=0, gateway=config))

        def add(*urls: str) -> None:
            for url in urls:
                server.gateway.add_engine(UpstreamConfig(url=SecretUrl(url)))

        def ask(number: int) -> int:
            headers = {"baggage": f"agl.rollout.id=r{number}"}
            return httpx.post(f"{server.base_url}/v1/chat/completions", json=chat_body(), headers=headers).status_code

        assert ask(0) == 503
        add(first)
        assert {ask(number) for number in range(8)} == {200} and len(one.seen) == 8
        add(second, NOBODY)
        wait_until(lambda: [each["answers"] for each in states(server.base_url)] == [True, True, False])
        assert {ask(number) for number in range(12)} == {200} and two.seen
        server.gateway.remove_engine(first)
        server.gateway.remove_engine(NOBODY)
        assert ask(0) == 200 and len(states(server.base_url)) == 1


def test_a_redirect_is_not_followed() -> None:
    with gateway() as setup:
        setup.engine.failures += [307]
        answer = setup.post(chat_body())
        assert answer.status_code == 502
        assert "redirects are not followed" in answer.json()["error"]["message"]


# --- Hedging ---------------------------------------------------------------------------------------------------------


def test_a_second_engine_is_asked_when_the_first_is_silent() -> None:
    with before_two(hedge_after_s=0.05) as (setup, one, two):
        for number in range(20):  # Until a rollout's engine is the first.
            post(setup, chat_body(), f"r{number}")
            if one.seen:
                break
        one_call = setup.store.appended[-1].rollout_id
        two.released.set()
        assert post(setup, chat_body("HOLD"), str(one_call)).status_code == 200
        assert_tokens(setup.store.appended[-1])
        assert setup.store.appended[-1].text(semconv.GATEWAY_UPSTREAM) != setup.store.appended[-2].text(
            semconv.GATEWAY_UPSTREAM
        )
        wait_until(lambda: [engine["calls"] for engine in states(setup.url)] == [0, 0])
        one.released.set()


def states(url: str) -> list[Any]:
    return httpx.get(f"{url}/api/health").json()["engines"]


def test_without_hedging_only_one_engine_is_asked() -> None:
    with before_two(timeouts={"first_byte_s": 0.3}) as (setup, one, two):
        assert post(setup, chat_body("HOLD"), "r").status_code == 504
        assert len(one.seen) + len(two.seen) == 1
        one.released.set()
        two.released.set()
