"""Agents traced by other instrumentations yield the same training rows as with our own plug-in.

The team is always the same: `planner` plans, `executor` calls a tool and answers. Each agent runs in a separate process
and virtual environment, configured only with a base URL and the address of an OTLP collector.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agl.server.app_thread import AppThread
from agl.server_thread import ServerThread
from agl.store import Store, open_store
from agl.trajectory import Row, Trajectory, build_trajectory
from tests.foreign import engine
from tests.venv import python_with

AGENTS = Path(__file__).parent / "agents"
CORE = Path(__file__).parents[2] / "packages" / "agl-core" / "src"
ROLLOUT = "team-1"


@dataclass(frozen=True)
class Agent:
    """A script of tests/foreign/agents, its arguments, and the packages that it runs on."""

    environment: str
    script: str
    arguments: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()

    def python(self) -> Path:
        if not self.requirements:
            return Path(sys.executable)
        return python_with(self.environment, *self.requirements, bare=self.bare)


OURS = Agent("ours", "ours_langchain")
OPENINFERENCE = Agent(
    "openinference", "openinference_langchain", requirements=("openinference-instrumentation-langchain==0.1.80",)
)
OPENLLMETRY = Agent(
    "openllmetry", "openllmetry_langchain", requirements=("opentelemetry-instrumentation-langchain==0.62.4",)
)
PYDANTIC_AI = Agent("pydantic-ai", "pydantic_ai_team", requirements=("pydantic-ai-slim[openai]==2.68.0",))
AGENT_FRAMEWORK = Agent(
    "agent-framework",
    "agent_framework_team",
    requirements=("agent-framework-core==1.23.0", "agent-framework-openai==1.17.0"),
)
OPENAI_AGENTS = (
    "openai-agents==0.24.0",
    "openinference-instrumentation-openai-agents==2.6.0",
    "opentelemetry-instrumentation-openai-agents-v2==0.1.0",
    "opentelemetry-instrumentation-httpx==0.66b2",
)
OPENAI_AGENTS_OPENINFERENCE = Agent("openai-agents", "openai_agents_team", ("openinference",), OPENAI_AGENTS)
OPENAI_AGENTS_OPENTELEMETRY = Agent("openai-agents", "openai_agents_team", ("opentelemetry",), OPENAI_AGENTS)
AGENTLIGHTNING = Agent(
    "agentlightning",
    "agentlightning_team",
    (ROLLOUT,),
    requirements=(
        # agentops looks for openai in its environment, and fails with later exporters.
        "agentops==0.4.21",
        "openai==2.45.0",
        "opentelemetry-exporter-otlp-proto-http==1.38.0",
        "opentelemetry-instrumentation==0.59b0",
        # Other packages that its tracer and emitters import.
        "aiologic==0.17.1",
        "fastapi>=0.120",
        "gunicorn>=23",
        "portpicker==1.6.0",
        "prometheus-client>=0.22",
    ),
    bare=("agentlightning==0.3.0",),
)


@pytest.fixture
def store() -> Iterator[Store]:
    store = open_store("memory://")
    yield store
    store.close()


@pytest.fixture
def server(store: Store) -> Iterator[ServerThread]:
    with ServerThread(store, port=0, otlp_http_port=0, upstream=engine.app()) as server:
        yield server


def run(agent: Agent, server: ServerThread, folder: Path, *, base_url: str, **environment: str) -> None:
    """Run `agent` in `folder` as a user would, until it ends."""
    own = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": server.otlp_url}
    command = [str(agent.python()), str(AGENTS / f"{agent.script}.py"), *agent.arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | own | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def rollout_url(server: ServerThread) -> str:
    return f"{server.base_url}/rollout/{ROLLOUT}/attempt/{ROLLOUT}-a1/v1"


def captured(store: Store) -> Trajectory:
    trajectory = build_trajectory(store.query_spans(ROLLOUT))
    assert trajectory.drops == []
    assert (trajectory.rollout_id, trajectory.attempt_id, trajectory.reward) == (ROLLOUT, f"{ROLLOUT}-a1", 0.5)
    return trajectory


def tokens(row: Row) -> tuple[object, ...]:
    return row.role, row.version, row.token_ids, row.loss_mask, row.logprobs, row.reward


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    """The rows from our own plug-in."""
    store = open_store("memory://")
    with ServerThread(store, port=0, otlp_http_port=0, upstream=engine.app()) as server:
        run(OURS, server, tmp_path_factory.mktemp("ours"), base_url=f"{server.base_url}/v1", ROLLOUT=ROLLOUT)
    rows = captured(store).rows
    store.close()
    assert [(row.role, len(row.turns), row.version) for row in rows] == [
        ("planner", 1, "team@3"),
        ("executor", 2, "team@3"),
    ]
    assert bytes(rows[0].token_ids) == (
        b"system: You plan.\nuser: How many mugs?\nassistant: Count the mugs in stock.\n"
    )
    return [tokens(row) for row in rows]


@pytest.mark.parametrize(
    "agent",
    [
        OPENINFERENCE,
        OPENLLMETRY,
        PYDANTIC_AI,
        AGENT_FRAMEWORK,
        OPENAI_AGENTS_OPENINFERENCE,
        OPENAI_AGENTS_OPENTELEMETRY,
        AGENTLIGHTNING,
    ],
    ids=lambda agent: "-".join((agent.script, *agent.arguments)),
)
def test_the_url_names_the_rollout(
    agent: Agent, store: Store, server: ServerThread, tmp_path: Path, expected: list[tuple[object, ...]]
) -> None:
    run(agent, server, tmp_path, base_url=rollout_url(server))
    trajectory = captured(store)
    assert [tokens(row) for row in trajectory.rows] == expected
    assert all(call.through_gateway and call.chat_span_id for call in trajectory.calls)


@pytest.mark.parametrize("agent", [OPENINFERENCE, OPENLLMETRY, PYDANTIC_AI], ids=lambda agent: agent.script)
def test_agl_rollout_names_the_rollout(
    agent: Agent, store: Store, server: ServerThread, tmp_path: Path, expected: list[tuple[object, ...]]
) -> None:
    """The base URL does not name the rollout, and no HTTP instrumentation sends baggage."""
    base_url = f"{server.base_url}/v1"
    run(agent, server, tmp_path, base_url=base_url, ROLLOUT=ROLLOUT, PYTHONPATH=str(CORE))
    trajectory = captured(store)
    assert [tokens(row) for row in trajectory.rows] == expected
    assert all(call.through_gateway and call.chat_span_id for call in trajectory.calls)


@pytest.mark.parametrize(
    "agent",
    [PYDANTIC_AI, AGENT_FRAMEWORK, OPENAI_AGENTS_OPENINFERENCE],
    ids=lambda agent: agent.script,
)
def test_streaming(
    agent: Agent, store: Store, server: ServerThread, tmp_path: Path, expected: list[tuple[object, ...]]
) -> None:
    run(agent, server, tmp_path, base_url=rollout_url(server), STREAMING="1")
    trajectory = captured(store)
    assert [tokens(row) for row in trajectory.rows] == expected


@pytest.mark.parametrize("agent", [OPENINFERENCE, OPENLLMETRY], ids=lambda agent: agent.script)
def test_other_langchain_instrumentations_cannot_join_streams(
    agent: Agent, store: Store, server: ServerThread, tmp_path: Path, expected: list[tuple[object, ...]]
) -> None:
    """The gateway still records the tokens, and the role is the model's name. Our own plug-in joins streams."""
    run(agent, server, tmp_path, base_url=rollout_url(server), STREAMING="1")
    trajectory = build_trajectory(store.query_spans(ROLLOUT))
    assert [("team", *tokens(row)[1:-1]) for row in trajectory.rows] == [("team", *row[1:-1]) for row in expected]
    assert {row.role for row in trajectory.rows} == {"team"}


def test_spans_that_hold_token_ids_need_no_gateway(
    store: Store, server: ServerThread, tmp_path: Path, expected: list[tuple[object, ...]]
) -> None:
    direct = AppThread()
    url = direct.add(engine.app())
    with direct:
        run(AGENTLIGHTNING, server, tmp_path, base_url=f"{url}/v1")
    trajectory = captured(store)
    assert [tokens(row) for row in trajectory.rows] == expected
    assert not any(call.through_gateway for call in trajectory.calls)


def test_agentlightning_rewards_reach_the_rollout_and_the_call(
    store: Store, server: ServerThread, tmp_path: Path
) -> None:
    run(AGENTLIGHTNING, server, tmp_path, base_url=rollout_url(server))
    plan, *others = captured(store).calls
    assert [(reward.value, reward.target) for reward in plan.rewards] == [(0.25, plan.response_id)]
    assert not any(call.rewards for call in others)
    (whole,) = [reward for reward in captured(store).rewards if reward.target is None]
    assert (whole.value, whole.dimensions) == (0.5, {"goal": 0.5, "brevity": 1.0})
