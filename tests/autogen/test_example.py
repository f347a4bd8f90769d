"""examples/autogen_team: the team, its tasks, its reward and its gold traces fit together."""

import ast
from pathlib import Path
from typing import Any

import pytest

from agl.config import Config
from examples.autogen_team import agent
from examples.autogen_team.inventory import PIECES
from examples.autogen_team.reward import score
from examples.autogen_team.tasks import eval_tasks, gold_examples, train_tasks
from tests.autogen.span_tree import tree
from tests.vllm_server import FakeVllmServer

FOLDER = Path(agent.__file__).parent


@pytest.fixture
def served(server: FakeVllmServer, monkeypatch: pytest.MonkeyPatch) -> FakeVllmServer:
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    return server


def say(server: FakeVllmServer, article: str) -> None:
    """Script the planner to name `article` and the executor to look it up."""
    server.words = (*article.partition("-"),)
    server.arguments = f'{{"article": "{article}"}}'


def plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a chat template receives them: without the agent's name."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


async def test_right_answers_earn_the_whole_reward(served):
    task = eval_tasks()[0]
    say(served, task["article"])
    answer = await agent.run(task)
    assert answer == {"plan": task["article"], "called": True, "answer": str(PIECES[task["article"]])}
    assert score(task, answer) == {"plan": 1.0, "call": 1.0, "goal": 1.0}


async def test_a_wrong_article_earns_the_reward_of_the_call_only(served):
    task = eval_tasks()[0]
    other = next(code for code, pieces in PIECES.items() if pieces != task["pieces"])
    say(served, other)
    assert score(task, await agent.run(task)) == {"plan": 0.0, "call": 1.0, "goal": 0.0}


async def test_an_article_that_does_not_exist_earns_nothing(served):
    say(served, "mug-pink")
    answer = await agent.run(eval_tasks()[0])
    assert answer == {"plan": "mug-pink", "called": False, "answer": "no article 'mug-pink'"}
    assert score(eval_tasks()[0], answer) == {"plan": 0.0, "call": 0.0, "goal": 0.0}


async def test_gold_prompts_are_the_prompts_that_the_team_sends(served):
    planner, executor = (next(e for e in gold_examples() if e["role"] == role) for role in ("planner", "executor"))
    say(served, planner["completion"])
    await agent.run({"question": planner["messages"][-1]["content"]})

    asked_planner, asked_executor = (seen.body for seen in served.seen)
    assert (asked_planner["model"], asked_executor["model"]) == ("planner", "executor")
    assert plain(asked_planner["messages"]) == planner["messages"]
    assert plain(asked_executor["messages"]) == executor["messages"]
    assert asked_executor["tools"] == executor["tools"]
    assert "tools" not in asked_planner and "tools" not in planner


async def test_a_run_is_two_turns(spans, served):
    say(served, "mug-red")
    await agent.run({"question": "How many red mugs?"})
    finished = [span for span in spans.get_finished_spans() if not span.name.startswith("create_agent")]
    assert tree(finished).splitlines() == [
        "invoke_workflow RoundRobinGroupChat",
        "  invoke_agent planner [planner]",
        "    chat planner [planner]",
        "  invoke_agent executor [executor]",
        "    chat executor [executor]",
        "    execute_tool stock [executor]",
    ]


def test_held_out_articles_consist_of_known_words_and_are_not_trained_on():
    trained = {task["article"] for task in train_tasks()}
    held_out = {task["article"] for task in eval_tasks()}
    assert not trained & held_out
    assert len(held_out) == 8 and len(trained) == 40
    words = {word for article in trained for word in article.split("-")}
    assert {word for article in held_out for word in article.split("-")} <= words
    assert {example["completion"] for example in gold_examples() if example["role"] == "planner"} <= trained


def test_the_agent_imports_nothing_of_ours():
    for name in ("agent.py", "inventory.py"):
        for node in ast.walk(ast.parse((FOLDER / name).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0].startswith("agl") for module in modules)


def test_the_configuration_trains_both_roles():
    config = Config.load(FOLDER / "config.yaml")
    assert set(config.agent_roles.roles) == {"planner", "executor"}
    assert config.require_train().instrument == ["agl_autogen"]
    assert set(config.rewards) == set(score(eval_tasks()[0], {"plan": "", "called": False, "answer": ""}))
    assert sum(config.rewards.values()) == pytest.approx(1)
