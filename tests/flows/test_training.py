"""Whole trainings of a tiny model through store, engine, gateway and agents: they learn, survive, and go on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from safetensors.torch import load_file

from agl import semconv
from agl.cli import main
from agl.cli.inspection import Inspection
from agl.config import Config
from agl.errors import ConfigError, NothingTrainedError, RunnerError, TrainingError
from agl.inspection.token_text import token_texts, tokenizer_in
from agl.page.comparison import Comparison
from agl.span import Span
from agl.store import RolloutState, Store, open_store
from agl.trajectory import DropReason, Trajectory, build_trajectory, collect_trained
from agl_trainer import Trainer
from agl_trainer.loop import training as training_module
from agl_trainer.loop.checkpoint import load_checkpoint
from agl_trainer.model.tiny import build_tiny_model
from agl_trainer.report.evaluation import EvalResult
from agl_trainer.report.progress import Progress
from tests.core.scripted_judge import ScriptedJudge
from tests.core.span_maker import gateway_call
from tests.flows import toy_agent
from tests.waiting import is_alive, wait_until

TOY = "tests.flows.toy_agent"
TRAIN: dict[str, Any] = {
    "model": "tiny",
    "agent": f"{TOY}:answer",
    "tasks": f"{TOY}:tasks",
    "eval_tasks": f"{TOY}:tasks",
    "reward": f"{TOY}:letters",
    "group_size": 4,
    "groups_per_step": 4,
    "steps": 3,
    "learning_rate": 3e-3,
    "max_tokens": 8,
    "timeout_s": 30,
}
SFT = {"examples": f"{TOY}:examples", "epochs": 2, "batch_size": 4, "learning_rate": 3e-3}


def config_in(
    folder: Path, *, role: str = "solver", lora_r: int = 8, lora: dict[str, Any] | None = None, **train: Any
) -> Config:
    data = {
        "store_uri": f"sqlite:///{folder / 'agl.db'}",
        "agent_roles": {"gamma": 1.0, role: lora or {"lora_r": lora_r}},
        "engine": {"max_batch": 16, "max_model_len": 96},
        "train": TRAIN | {"output_dir": str(folder / "run")} | train,
        "sft": SFT,
    }
    return Config.parse(data)


def metrics_of(folder: Path, run: str = "run") -> list[dict[str, float]]:
    """Metrics of each step, which is there once."""
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["metrics"] for line in lines]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Where the training in `tmp_path` writes."""
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    yield store
    store.close()


def rollout_names(steps: range, groups: int = 4, rollouts: int = 4) -> list[str]:
    return [f"run-{step:05d}-g{g}-r{r}" for step in steps for g in range(groups) for r in range(rollouts)]


def trajectory_of(store: Store, rollout_id: str) -> Trajectory:
    return build_trajectory(store.query_spans(rollout_id))


# --- learning -------------------------------------------------------------------------------------------------------


def test_a_few_steps_raise_the_reward_and_every_call_is_accounted_for(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(config_in(tmp_path, group_size=8, learning_rate=5e-3))
    with trainer.open():
        before = trainer.evaluate("before")
        trainer.grpo()
        after = trainer.evaluate("after")
        page = httpx.get(f"{trainer.session.page_url}runs/view?id=run")
    check_page(trainer, store, page, capsys.readouterr().err)
    comparison = Comparison.of(store, "run", "before", "after")
    assert (comparison.mean("left"), comparison.mean("right")) == pytest.approx((before.mean(), after.mean()))
    metrics = metrics_of(tmp_path)
    assert [step["calls"] for step in metrics] == [32.0] * 3
    assert metrics[-1]["reward/mean"] > metrics[0]["reward/mean"] + 0.3
    assert sum(after.scores().values()) > sum(before.scores().values()) + 0.2 * 8
    assert list(after.tasks) == toy_agent.WORDS
    version = 0
    for step, step_metrics in enumerate(metrics, start=1):
        version = check_step(store, step, version, step_metrics)
    adapter = store.get_resource("run/solver")
    assert adapter is not None and adapter.version == version > 1
    assert sorted(path.name for path in Path(adapter.uri).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [step for step, _ in store.query_metrics("run")["reward/mean"]] == [1, 2, 3]


def test_the_page_answers_while_the_model_is_loading(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    note = Progress.note

    def visit(progress: Progress, text: str) -> None:
        note(progress, text)
        if text.startswith("page: "):
            found.append(httpx.get(text.removeprefix("page: "), follow_redirects=True).text)
            found.append(httpx.get(f"{text.removeprefix('page: ')}runs/view?id=run").text)

    def state() -> object:
        claim = store.get_resource("run run")
        return claim and claim.metadata["state"]

    monkeypatch.setattr(Progress, "note", visit)
    with Trainer(config_in(tmp_path)).open():
        assert state() == "training"
    assert ["loading" in page for page in found] == [True, True] and "loading the model" in found[1]
    assert state() == "ended"
    with pytest.raises(ValueError, match="broken"), Trainer(config_in(tmp_path)).open():
        raise ValueError("broken")
    assert state() == "training"


def check_page(trainer: Trainer, store: Store, page: httpx.Response, printed: str) -> None:
    """The training prints the address of its page first, and leaves what the page needs."""
    assert printed.splitlines()[0] == f"page: {page.url.copy_with(path='/', query=None)}"
    assert "before, after" in page.text
    call = trajectory_of(store, rollout_names(range(1, 2), rollouts=8)[0]).calls[0]
    tokenizer, fault = tokenizer_in(str(trainer.folder))
    assert fault is None and any(token_texts(tokenizer, call.response_ids or []))


def check_step(store: Store, step: int, version: int, metrics: dict[str, float]) -> int:
    """The previous version sampled each call of the step, and each has an outcome; returns the new version."""
    trained, ratios = 0, list[float]()
    for name in rollout_names(range(step, step + 1), rollouts=8):
        made = trajectory_of(store, name)
        assert (made.mode, made.group_id) == ("train", name.rpartition("-")[0])
        (call,) = made.calls
        assert len(made.drops) + sum(len(row.turns) for row in made.rows) == 1
        assert call.policy_version == f"solver@{version}"
        (word,) = collect_trained(store.query_spans(name))[call.span_id]
        assert word.step == step
        assert (word.advantage is None) == (word.reason == DropReason.ZERO_ADVANTAGE)
        trained += word.reason is None
        ratios += word.ratios
    assert trained == metrics["calls/trained"]
    bounds = [metrics[f"solver/ratio_{bound}"] for bound in ("min", "max")]
    assert [min(ratios), max(ratios)] == pytest.approx(bounds, rel=1e-6)
    assert 32 - trained == metrics.get("calls/dropped/zero_advantage", 0)
    return version + bool(trained)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "sampling": {"top_p": 0.9, "top_k": 40, "min_p": 0.001}}])
def test_choices_stops_and_declared_limits_train_with_a_ratio_of_one(
    tmp_path: Path, store: Store, options: dict[str, Any]
) -> None:
    """Each choice is a call with all its tokens, a stop's too. The client's temperature and top_p do nothing."""
    reward, tasks = f"{TOY}:letters", f"{TOY}:few_tasks"
    given: dict[str, Any] = {"steps": 1, "max_tokens": 24, "agent": f"{TOY}:best_of_three"} | options
    Trainer(config_in(tmp_path, reward=reward, tasks=tasks, **given)).fit()
    (metrics,) = metrics_of(tmp_path)
    assert metrics["calls"] == 3 * 4 * 4 and metrics["calls/trained"] > 0
    assert {name for name in metrics if name.startswith("calls/dropped/")} <= {"calls/dropped/zero_advantage"}
    for bound in ("max", "min"):
        assert metrics[f"solver/ratio_{bound}"] == pytest.approx(1.0, abs=2e-3)
    calls = [call for name in rollout_names(range(1, 2)) for call in trajectory_of(store, name).calls]
    assert Counter(call.choice for call in calls) == {0: 16, 1: 16, 2: 16}
    assert "stop" in {call.finish_reason for call in calls}
    assert {call.temperature for call in calls} == {options.get("temperature", 1.0)}
    assert all(call.sampling == options.get("sampling", {}) for call in calls)


def test_groups_without_a_difference_are_replaced_so_often_and_no_more(tmp_path: Path, store: Store) -> None:
    """All rewards are equal: of 2 + 2 + 2 groups the first four are replaced, and nothing trains."""
    options: dict[str, Any] = {"group_size": 2, "groups_per_step": 2, "shuffle": False, "dynamic_sampling": 2}
    for steps in (1, 2):
        with pytest.raises(NothingTrainedError):
            Trainer(config_in(tmp_path, reward=f"{TOY}:flat", steps=steps, **options)).fit()
    for metrics in metrics_of(tmp_path):
        assert (metrics["groups"], metrics["groups/replaced"], metrics["calls"]) == (6, 4, 12)
        dropped = {name: count for name, count in metrics.items() if name.startswith("calls/dropped/")}
        assert dropped == {"calls/dropped/replaced_group": 8, "calls/dropped/zero_advantage": 4}
        assert metrics["calls/trained"] == 0
    # The second step, in another process's place, goes on where the first one stopped drawing.
    names = [f"run-{step:05d}-g{group}-r0" for step in (1, 2) for group in range(6)]
    drawn = [rollout.input["id"] for name in names if (rollout := store.get_rollout(name))]
    assert drawn == [toy_agent.WORDS[place % 8] for place in range(12)]
    words = [collect_trained(store.query_spans(name)) for name in names]
    assert [len(word) for word in words] == [1] * 12


def test_examples_teach(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    assert config.sft is not None
    trainer = Trainer(config.model_copy(update={"sft": config.sft.model_copy(update={"epochs": 8})}))
    with trainer.open():
        trainer.sft()
        assert sum(trainer.evaluate("sft").scores().values()) > 0.8 * 8
        trainer.sft()
    losses = [step["sft/solver/loss"] for step in metrics_of(tmp_path)]
    assert len(losses) == 16
    assert losses[-1] < losses[0] / 2


def test_a_judge_is_reward_enough(tmp_path: Path, store: Store) -> None:
    """Ranked by how many letters they have; neither agent nor configuration gives a reward."""

    def most_letters_first(attempts: list[str], _: int) -> str:
        order = sorted(range(len(attempts)), key=lambda place: -toy_agent.letters({}, attempts[place]))
        return json.dumps({"ranking": [place + 1 for place in order]})

    with ScriptedJudge(most_letters_first) as server:
        config = config_in(tmp_path, steps=1, reward=None)
        judge = {"url": server.url, "model": "judge", "criteria": "Letters only.", "rankings": 1}
        Trainer(Config.parse(yaml.safe_load(config.to_yaml()) | {"judge": judge})).fit()
    (metrics,) = metrics_of(tmp_path)
    assert (metrics["judge/groups"], metrics["judge/failed"], metrics["judge/input_tokens"]) == (4, 0, 400)
    assert metrics["reward/judge"] == metrics["reward/mean"] == pytest.approx(0.5)
    assert metrics["calls/trained"] > 0
    made = [trajectory_of(store, f"run-00001-g0-r{i}") for i in range(4)]
    rewards = [one.reward for one in made if one.reward is not None]
    assert sum(rewards) == pytest.approx(4 / 2) and max(rewards) > min(rewards)


# --- training on stored rollouts ----------------------------------------------------------------------------


def test_rollouts_of_a_store_train_without_an_agent_or_an_engine(tmp_path: Path, store: Store) -> None:
    """One step of rollouts, taken again from the store in a folder of its own: the same step, to rounding."""
    Trainer(config_in(tmp_path, steps=1, shuffle=False, learning_rate=1e-3)).fit()
    store.append_spans([untrained_call("prod-1"), untrained_call("eval-1", mode="eval")])
    again: dict[str, Any] = {"model": str(tmp_path / "run" / "model"), "output_dir": str(tmp_path / "again")}
    config = config_in(tmp_path, steps=1, shuffle=False, learning_rate=1e-3, **again)
    assert config.train is not None
    unneeded = {"agent": None, "tasks": None, "reward": None, "eval_tasks": None}
    trainer = Trainer(config.model_copy(update={"train": config.train.model_copy(update=unneeded)}))
    trainer.fit(from_store=True)
    (first,), (second,) = metrics_of(tmp_path), metrics_of(tmp_path, "again")
    assert (first["calls"], second["calls"], second["rollouts"], second["groups"]) == (16, 16, 16, 4)
    for name in ("reward/mean", "calls/trained", "solver/loss", "solver/grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name
    words = [collect_trained(store.query_spans(name)) for name in rollout_names(range(1, 2))]
    assert all(len(steps) == 2 for word in words for steps in word.values())
    adapters = [tmp_path / run / "adapters" / "solver@1" / "adapter_model.safetensors" for run in ("run", "again")]
    one, other = (load_file(path) for path in adapters)
    # AdamW's first step is as long where a gradient is the rounding of 0: nearly all of the step is the same.
    first_step, second_step = (
        torch.cat([made[name].flatten() for name in one if "lora_B" in name]) for made in (one, other)
    )
    assert torch.cosine_similarity(first_step, second_step, dim=0) > 0.99


def untrained_call(rollout_id: str, mode: str = "prod") -> Span:
    """A call that no training step has used, in a group of its own."""
    named = {semconv.ROLLOUT_ID: rollout_id, semconv.MODE: mode}
    return gateway_call(role="solver", attributes=named)


def test_a_training_from_an_empty_store_says_what_it_looked_for(tmp_path: Path) -> None:
    trainer = Trainer(config_in(tmp_path))
    with pytest.raises(TrainingError, match="holds no rollout of mode train or prod that made a model call"):
        trainer.fit(from_store=True)
    with pytest.raises(ConfigError, match=r"train\.eval_every needs an engine"):
        Trainer(config_in(tmp_path, eval_every=1)).fit(from_store=True)
    with trainer.open(samples=False), pytest.raises(TrainingError, match="opened without an engine"):
        trainer.evaluate("x")


def test_traces_that_earned_enough_teach(tmp_path: Path, store: Store) -> None:
    """Supervised steps on the better rollouts of a first step; every call has an outcome in the store."""
    Trainer(config_in(tmp_path, steps=1, alternate_steps=0, learning_rate=1e-9)).fit()
    traces = {"traces": {"modes": ["train"], "min_reward": 0.4}, "epochs": 2, "batch_size": 4, "learning_rate": 3e-3}
    again: dict[str, Any] = {"model": str(tmp_path / "run" / "model"), "output_dir": str(tmp_path / "again")}
    config = Config.parse(yaml.safe_load(config_in(tmp_path, **again).to_yaml()) | {"sft": traces})
    trainer = Trainer(config)
    with trainer.open(samples=False):
        trainer.sft()
    metrics = metrics_of(tmp_path, "again")
    rewards = [trajectory_of(store, name).reward or 0 for name in rollout_names(range(1, 2))]
    good = sum(value >= 0.4 for value in rewards)
    assert 0 < good < 16
    trained = sum(step["calls/trained"] for step in metrics)
    assert (trained, metrics[0]["calls/dropped/rejected"]) == (2 * good, 16 - good)
    assert metrics[-1]["sft/solver/loss"] < metrics[0]["sft/solver/loss"]


def test_rejection_sampling_raises_the_reward(tmp_path: Path) -> None:
    options: dict[str, Any] = {"algorithm": "rejection", "min_reward": 0.5, "group_size": 8, "learning_rate": 5e-3}
    Trainer(config_in(tmp_path, **options)).fit()
    metrics = metrics_of(tmp_path)
    assert metrics[-1]["reward/mean"] > metrics[0]["reward/mean"] + 0.2
    for step in metrics:
        assert step["calls/trained"] + step.get("calls/dropped/rejected", 0) == step["calls"] == 32
    assert all(step["solver/loss"] > 0 for step in metrics)  # a likelihood, not a difference


def test_the_best_adapters_are_kept_and_the_training_ends_when_they_stay_the_best(tmp_path: Path, store: Store) -> None:
    """Evaluated before the first step and after each: the second does best, and two that do not end it."""
    options: dict[str, Any] = {"eval_every": 1, "early_stop": 2, "steps": 30, "reward": f"{TOY}:letters_or_as_planned"}
    config = config_in(tmp_path, **options, eval_tasks=f"{TOY}:held_out_tasks")
    toy_agent.held_out_rewards = [0.2, 0.1, 0.9, 0.5, 0.9]
    Trainer(config).fit()
    assert toy_agent.held_out_rewards == []
    assert [step["eval/reward/mean"] for step in metrics_of(tmp_path)] == [0.1, 0.9, 0.5, 0.9]
    labels = [EvalResult.load(path).label for path in sorted((tmp_path / "run" / "eval").iterdir())]
    assert labels == [f"step-{step:05d}" for step in range(5)]
    (kept,) = (tmp_path / "run" / "best").iterdir()
    state, published = load_checkpoint(kept), store.get_resource("run/solver")
    assert published is not None
    assert (state.step, published.version) == (2, state.versions["solver"])
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000004").versions["solver"] > published.version
    written = load_file(Path(published.uri) / "adapter_model.safetensors")
    assert written and all(torch.equal(written[name], tensor) for name, tensor in state.adapters["solver"].items())
    # Started again it takes no step; the best adapters can be loaded.
    trainer = Trainer(config)
    with trainer.open():
        trainer.grpo()
        trainer.take_best()
        found = trainer.session.policies.of("solver").adapter("solver")
        assert all(torch.equal(found[name], tensor) for name, tensor in state.adapters["solver"].items())
    assert len(metrics_of(tmp_path)) == 4


def test_a_rollout_without_a_reward_is_left_out_of_an_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"agent": f"{TOY}:answer_with_a_reward_but_for_the_first", "reward": None}
    few: dict[str, Any] = {
        "tasks": f"{TOY}:few_tasks",
        "eval_tasks": f"{TOY}:few_tasks",
        "eval_every": 1,
        "steps": 1,
        "group_size": 2,
    }
    trainer = Trainer(config_in(tmp_path, **options | few))
    with trainer.open():
        result = trainer.evaluate("after")
        assert list(result.tasks) == toy_agent.WORDS[1:3] and result.without_reward == 1
        assert "no reward reaches 1 rollouts (run-eval-after-0000): they are left out of the evaluation" in caplog.text
        trainer.grpo()
    assert metrics_of(tmp_path)[0]["eval/reward/mean"] > 0
    trainer = Trainer(config_in(tmp_path, **options | few | {"eval_tasks": f"{TOY}:held_out_tasks"}))
    with trainer.open(trains=False), pytest.raises(TrainingError, match=r"run-eval-none: no rollout has a reward; set"):
        trainer.evaluate("none")


def test_samples_are_compared_with_an_earlier_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(config_in(tmp_path, eval_temperature=1.0, steps=1).to_yaml())
    command = ["eval", str(tmp_path / "config.yaml"), "--samples", "3", "--pass-at", "1", "3", "--success", "0.5"]
    assert main([*command, "--of", "base", "--label", "before"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["reward", "pass@1", "pass@3"]
    assert main([*command, "--of", "base", "--label", "after", "--against", "before", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["before", "after", "after - before"]
    assert results["after"]["tasks"] == 8 and 0 <= results["after"]["pass@1"] <= results["after"]["pass@3"] <= 1
    assert results["after - before"]["reward"].keys() == {"mean", "low", "high", "count"}
    for missing in ("last", "best"):
        assert main([*command, "--of", missing]) == 2
        assert "there is no checkpoint in" in capsys.readouterr().err
    # Saved results, without an evaluation.
    assert main([*command[:2], "--compare", "before", "after", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results
    assert main([*command[:2], "--compare", "before", "later"]) == 2
    assert "has no result 'later'; saved are: after, before" in capsys.readouterr().err
    assert main([*command, "--compare", "before", "after"]) == 2
    assert "so --samples, --pass-at, --success would have no effect" in capsys.readouterr().err


# --- rollouts beside the training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 2])
def test_rollouts_run_ahead_of_the_steps_that_take_them(tmp_path: Path, store: Store, ahead: int) -> None:
    options: dict[str, Any] = {"asynchronous": True, "max_staleness": ahead, "steps": 5, "group_size": 8}
    Trainer(config_in(tmp_path, **options, learning_rate=5e-3)).fit()
    metrics = metrics_of(tmp_path)
    assert [step["calls"] for step in metrics] == [32.0] * 5
    assert not any("calls/dropped/stale" in step for step in metrics)
    assert metrics[0]["solver/staleness_max"] == 0
    assert max(step["solver/staleness_max"] for step in metrics) == ahead
    assert metrics[-1]["solver/staleness_max"] >= 1  # to the end
    assert metrics[-1]["reward/mean"] > metrics[0]["reward/mean"] + 0.1  # old rollouts teach more slowly
    names = [f"run-g{number:06d}-r{i}" for number in range(20) for i in range(8)]
    assert store.get_rollout("run-g000020-r0") is None  # no more than the steps take
    words = [collect_trained(store.query_spans(name)) for name in names]
    assert [len(word) for word in words] == [1] * 160
    # The groups of the second step began before the first had trained.
    first_word = min(span.start_ns for span in store.query_spans(names[0]) if span.name == semconv.SPAN_TRAINED)
    second = [made for made in words if any(trained.step == 2 for steps in made.values() for trained in steps)]
    assert len(second) == 32
    began = [span.start_ns for span in store.query_spans(names[4 * 8]) if span.name == semconv.SPAN_ROLLOUT]
    assert began[0] < first_word


def test_a_training_that_runs_ahead_goes_on_after_it_was_stopped(tmp_path: Path, store: Store) -> None:
    options: dict[str, Any] = {"asynchronous": True, "max_staleness": 2, "agent": f"{TOY}:interrupted_answer"}
    toy_agent.interrupt_after = [16 * 2 + 5]
    with pytest.raises(KeyboardInterrupt):
        Trainer(config_in(tmp_path, **options)).fit()
    toy_agent.interrupt_after = []
    assert not (tmp_path / "run" / "checkpoints" / "step-000003").exists()
    Trainer(config_in(tmp_path, **options)).fit()
    assert [(metrics["rollouts"], metrics["calls"]) for metrics in metrics_of(tmp_path)] == [(16, 16)] * 3
    assert store.count_rollouts()[RolloutState.RUNNING] == store.count_rollouts()[RolloutState.QUEUED] == 0


# --- agents that fail -----------------------------------------------------------------------------------------------


def test_agents_that_raise_or_hang_do_not_stop_the_training(tmp_path: Path, store: Store) -> None:
    toy_agent.release.clear()
    moody = {"agent": f"{TOY}:moody_answer", "tasks": f"{TOY}:moody_tasks", "shuffle": False}
    try:
        Trainer(config_in(tmp_path, **moody, steps=2, timeout_s=2)).fit()
    finally:
        toy_agent.release.set()
    for metrics in metrics_of(tmp_path):
        assert (metrics["rollouts"], metrics["rollouts/failed"]) == (16, 12)
        # Rollouts that hang at once make no call.
        assert metrics["calls"] == 12
        assert metrics["calls/dropped/failed_rollout"] == 8
        assert metrics["calls/trained"] == 4
    check_sums(store, rollout_names(range(1, 2)), metrics_of(tmp_path)[0])
    rollouts = {name: store.get_rollout(name) for name in rollout_names(range(1, 3))}
    states = {name: rollout.state for name, rollout in rollouts.items() if rollout}
    assert {state for name, state in states.items() if "-g0-" in name} == {RolloutState.SUCCEEDED}
    assert {state for name, state in states.items() if "-g0-" not in name} == {RolloutState.FAILED}
    assert len(states) == 32
    assert trajectory_of(store, "run-00002-g1-r0").error == "RuntimeError: no flame today"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_is_started_again_and_its_rollouts_run_again(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config_in(tmp_path, steps=1))
    with trainer.open():
        policy = trainer.session.policies.of("solver")
        sound, deaths = policy.sampled_states, [SystemExit()]

        def deadly(*arguments: Any) -> torch.Tensor:
            if deaths:
                raise deaths.pop()
            return sound(*arguments)

        monkeypatch.setattr(policy, "sampled_states", deadly)
        trainer.grpo()
    (metrics,) = metrics_of(tmp_path)
    lost = int(metrics["rollouts/failed"])
    assert lost > 0 and metrics["rollouts"] == 16 + lost
    assert metrics["calls/trained"] > 0 and metrics["solver/skipped"] == 0
    again = repeated(store, rollout_names(range(1, 2)))
    assert len(again) == lost
    check_sums(store, [*rollout_names(range(1, 2)), *(f"{name}~1" for name in again)], metrics)


def check_sums(store: Store, names: list[str], metrics: dict[str, float]) -> None:
    """The outcomes that `agl inspect` shows for these rollouts add up to the metrics of the step."""
    ends: Counter[str] = Counter()
    for name in names:
        if spans := store.query_spans(name):
            ends += Inspection(spans).outcomes
    counts = {
        name.removeprefix("calls/").removeprefix("dropped/"): n for name, n in metrics.items() if "calls/" in name
    }
    assert ends == {name: count for name, count in counts.items() if count}
    assert ends.total() == metrics["calls"]


# --- stopping and going on ------------------------------------------------------------------------------------------


def repeated(store: Store, names: list[str]) -> list[str]:
    """The rollouts of `names` that were repeated."""
    return [name for name in names if store.get_rollout(f"{name}~1") is not None]


def test_ctrl_c_costs_the_step_under_way(tmp_path: Path, store: Store) -> None:
    config = config_in(tmp_path, agent=f"{TOY}:interrupted_answer")
    toy_agent.interrupt_after = [16 + 5]
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).fit()
    assert len(metrics_of(tmp_path)) == 1
    toy_agent.interrupt_after = []
    Trainer(config).fit()
    assert [(metrics["rollouts"], metrics["calls"]) for metrics in metrics_of(tmp_path)] == [(16, 16)] * 3
    assert repeated(store, rollout_names(range(1, 4))) == rollout_names(range(2, 3))


@pytest.mark.parametrize("saved", [False, True], ids=["before", "after"])
def test_a_stop_just_before_or_after_a_checkpoint_leaves_each_step_once(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    save = training_module.save_checkpoint

    def stop_at_two(folder: Path, state: Any) -> None:
        if saved or state.step != 2:
            save(folder, state)
        if state.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training_module, "save_checkpoint", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            Trainer(config_in(tmp_path)).fit()
    Trainer(config_in(tmp_path)).fit()
    assert [(metrics["rollouts"], metrics["calls"]) for metrics in metrics_of(tmp_path)] == [(16, 16)] * 3
    assert repeated(store, rollout_names(range(1, 4))) == ([] if saved else rollout_names(range(2, 3)))
    for name in rollout_names(range(1, 4)):
        spans = store.query_spans(name)
        assert set(collect_trained(spans)) == {call.span_id for call in build_trajectory(spans).calls}


def test_the_groups_that_were_in_flight_are_drawn_again(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first group ends last: the step before the stop took others, and each group trains once all the same."""
    save = training_module.save_checkpoint

    def stop_at_one(folder: Path, state: Any) -> None:
        save(folder, state)
        raise KeyboardInterrupt

    options: dict[str, Any] = {"asynchronous": True, "max_staleness": 2, "agent": f"{TOY}:held_answer"}
    config = config_in(tmp_path, **options, groups_per_step=2, steps=4, shuffle=False)
    toy_agent.release.clear()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training_module, "save_checkpoint", stop_at_one)
        Trainer(config).fit()
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000001")
    assert state.position == 2 and state.open_groups[0] == 0 and len(state.open_groups) == 4
    toy_agent.release.set()
    Trainer(config).fit()
    for number in range(8):
        name = f"run-g{number:06d}-r0"
        spans = [span for one in (name, f"{name}~1") for span in store.query_spans(one)]
        assert sum(map(len, collect_trained(spans).values())) == 1, number
    assert store.get_rollout("run-g000008-r0") is None


RUN_DEMOS = """
import os, sys
from pathlib import Path
from agl.config import Config
from agl_trainer.loop import session  # What Demo imports only when it runs, each child would import again.
from agl_trainer.loop.demo import Demo

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        folder = Path(line.strip())
        Demo(Config.load(folder / "config.yaml"), folder / "run").run()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Demos:
    """Runs demos in processes of their own, forked from one that has loaded everything."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None and process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    def run(self, folder: Path, kill_when: Callable[[], bool] | None = None) -> int:
        """Exit code of a demo in `folder`; it gets SIGKILL as soon as `kill_when` is true."""
        self._stdin.write(f"{folder}\n")
        self._stdin.flush()
        child = int(self._stdout.readline())
        if kill_when is not None:
            deadline = time.monotonic() + 60
            while not kill_when():
                assert time.monotonic() < deadline, "the demo does not get to where it is to be killed"
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
        return int(self._stdout.readline())


@pytest.fixture
def demos(tmp_path: Path) -> Iterator[Demos]:
    with (tmp_path / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN_DEMOS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        with process:
            yield Demos(process)
            process.kill()


def test_a_training_killed_again_and_again_ends_bitwise_as_one_that_was_not(tmp_path: Path, demos: Demos) -> None:
    """SIGKILL in SFT, in the first GRPO step after an evaluation, and in a later one; with a schedule and dropout."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        few = {"eval_tasks": f"{TOY}:few_tasks", "group_size": 3, "groups_per_step": 3}
        schedule = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "weight_decay": 0.1}
        config = config_in(folder, deterministic=True, **few, **schedule, lora={"lora_r": 8, "lora_dropout": 0.1})
        (folder / "config.yaml").write_text(config.to_yaml())
    store = open_store(f"sqlite:///{killed / 'agl.db'}")
    moments: list[Callable[[], bool]] = [
        (killed / "run" / "checkpoints" / "step-000002").exists,
        lambda: bool(store.query_attempts("run-00001-g1-r1")),
        lambda: bool(store.query_attempts("run-00002-g1-r1")),
    ]
    codes = [demos.run(killed, moment) for moment in moments]
    codes += [demos.run(killed), demos.run(whole)]
    assert codes == [-9, -9, -9, 0, 0], (tmp_path / "errors.txt").read_text()

    kept = ["adapters/solver@*/adapter_model.safetensors", "checkpoints/step-000007/*.safetensors", "eval/*.json"]
    for pattern in kept:
        files = sorted((whole / "run").glob(pattern))
        assert files, pattern
        for file in files:
            other = killed / "run" / file.relative_to(whole / "run")
            assert other.read_bytes() == file.read_bytes(), other
    assert len(metrics_of(killed)) == len(metrics_of(whole)) == 4 + 3
    for one, other in zip(metrics_of(whole), metrics_of(killed), strict=True):
        timeless = [
            {k: v for k, v in metrics.items() if not k.startswith("time/") and not k.endswith("_per_s")}
            for metrics in (one, other)
        ]
        assert timeless[0] == timeless[1]
    again = repeated(store, rollout_names(range(1, 4), 3, 3))
    store.close()
    # The first and the second step were cut short; the third was not.
    assert again == rollout_names(range(1, 3), 3, 3)


# --- going on with another configuration ------------------------------------------------------------------------------


def adapter_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(folder / "run" / "checkpoints" / f"step-{step:06d}").adapters["solver"])


def test_what_steers_is_applied_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(config_in(tmp_path, steps=1)).fit()
    capsys.readouterr()
    Trainer(config_in(tmp_path, steps=2, learning_rate=1e-12, group_size=3)).fit()
    said = capsys.readouterr().err
    changes = "train.group_size 4 -> 3, train.steps 1 -> 2, train.learning_rate 0.003 -> 1e-12"
    assert f"resumed at step 1 with changes: {changes}\n" in said
    assert metrics_of(tmp_path)[1]["rollouts"] == 12 and metrics_of(tmp_path)[1]["calls/trained"] > 0
    before, after = adapter_of(tmp_path, 1), adapter_of(tmp_path, 2)
    moved = max(float((after[name] - tensor).abs().max()) for name, tensor in before.items())
    assert 0 < moved < 1e-9
    Trainer(config_in(tmp_path, steps=2, learning_rate=1e-12, group_size=3)).fit()
    said = capsys.readouterr().err
    assert "with changes" not in said and "all 2 steps are done" in said


def test_what_changes_what_is_trained_is_refused_unless_it_is_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(config_in(tmp_path, steps=1)).fit()
    other = tmp_path / "other"
    build_tiny_model(other, ["apple"], 7)
    for changes, message in (
        ({"role": "judge"}, "the names in agent_roles solver -> judge"),
        ({"lora_r": 4}, "agent_roles.solver.lora_r 8 -> 4"),
        ({"seed": 1}, "train.seed 0 -> 1"),
        ({"loss": "cispo"}, "train.loss grpo -> cispo"),
        ({"model": str(other)}, f"train.model .architecture, weights, tokenizer differ. tiny -> {other}"),
        ({"tasks": f"{TOY}:few_tasks"}, f"train.tasks {TOY}:tasks -> {TOY}:few_tasks"),
    ):
        with pytest.raises(TrainingError, match=f"trained with another configuration: {message}.*--accept-changes"):
            Trainer(config_in(tmp_path, **changes)).fit()
    assert len(metrics_of(tmp_path)) == 1
    path = tmp_path / "config.yaml"
    path.write_text(config_in(tmp_path, seed=1, loss="cispo", tasks=f"{TOY}:few_tasks", steps=2).to_yaml())
    assert main(["train", str(path)]) == 2
    capsys.readouterr()
    assert main(["train", str(path), "--accept-changes"]) == 0
    said = capsys.readouterr().err
    assert all(change in said for change in ("train.seed 0 -> 1", "train.loss grpo -> cispo", "train.tasks"))
    assert len(metrics_of(tmp_path)) == 2
    # A role that is new begins with a fresh adapter; a rank that does not fit cannot be accepted.
    Trainer(config_in(tmp_path, role="judge", agent=f"{TOY}:judge_answer", steps=3), accept_changes=True).fit()
    assert metrics_of(tmp_path)[2]["judge/loss"] is not None
    with pytest.raises(TrainingError, match=r"adapter of role 'judge' does not fit: .* another lora_r"):
        Trainer(config_in(tmp_path, role="judge", lora_r=4), accept_changes=True).fit()


def test_supervised_steps_go_on_by_epochs_whatever_the_size_of_a_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight examples: two epochs of two batches, then a third of one, then none."""

    def tune(examples: str = "examples", **options: int) -> int:
        config = yaml.safe_load(config_in(tmp_path).to_yaml())
        config["sft"] |= options | {"examples": f"{TOY}:{examples}"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return main(["sft", str(tmp_path / "config.yaml")])

    assert tune() == 0 and len(metrics_of(tmp_path)) == 4
    assert tune(epochs=3, batch_size=8) == 0
    assert "sft.epochs 2 -> 3, sft.batch_size 4 -> 8" in capsys.readouterr().err
    assert len(metrics_of(tmp_path)) == 5
    assert tune(epochs=2) == 0 and len(metrics_of(tmp_path)) == 5
    assert "sft: all 2 epochs are done; more need a higher sft.epochs" in capsys.readouterr().err
    assert tune("few_examples", epochs=4) == 2
    assert f"sft.examples {TOY}:examples -> {TOY}:few_examples" in capsys.readouterr().err
    # The next phase need not know the examples any more.
    Trainer(config_in(tmp_path, steps=1, loss="cispo").model_copy(update={"sft": None})).fit()
    assert len(metrics_of(tmp_path)) == 6
    capsys.readouterr()
    assert tune() == 2
    said = capsys.readouterr().err
    assert "sft: takes no step, because GRPO has begun in" in said and "agl: no supervised step was taken" in said


def test_a_function_that_returns_another_number_of_items_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The position counts them, so that it would be another place."""
    config = config_in(tmp_path)
    trainer = Trainer(config)
    with trainer.open(samples=False):
        trainer.sft()
    examples, tasks = toy_agent.examples, toy_agent.tasks
    monkeypatch.setattr(toy_agent, "examples", lambda: examples()[:6])
    with trainer.open(samples=False), pytest.raises(TrainingError, match=r"number of items of sft\.examples 8 -> 6"):
        trainer.sft()
    Trainer(config_in(tmp_path, steps=1)).fit()
    monkeypatch.setattr(toy_agent, "tasks", lambda: tasks()[:5])
    with pytest.raises(TrainingError, match=r"number of items of train\.tasks 8 -> 5"):
        Trainer(config_in(tmp_path, steps=2)).fit()
    Trainer(config_in(tmp_path, steps=2), accept_changes=True).fit()
    assert len(metrics_of(tmp_path)) == 6


# --- what cannot start ----------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    with pytest.raises(ConfigError, match=f"train.model '{missing}': expected `smollm2`, `tiny`, a model of the"):
        Trainer(config_in(tmp_path, model=str(missing))).fit()


def test_the_reference_of_the_kl_term_is_the_adapter_as_grpo_began(tmp_path: Path) -> None:
    """SFT trained it; it is in the checkpoint, and a resumed training compares with it. Fresh ones are not copied."""

    def references(step: int) -> dict[str, Any] | None:
        found = load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:06d}").references
        return None if found is None else {owner: dict(tensors) for owner, tensors in found.items()}

    trainer = Trainer(config_in(tmp_path, beta=0.5, steps=1))
    with trainer.open():
        trainer.sft()
        start = {
            name: tensor.clone() for name, tensor in trainer.session.policies.of("solver").adapter("solver").items()
        }
        trainer.grpo()
    Trainer(config_in(tmp_path, beta=0.5, steps=3)).fit()
    *_, first, second, third = metrics_of(tmp_path)
    assert first["solver/kl_ref"] == pytest.approx(0.0, abs=1e-6)
    assert min(second["solver/kl_ref"], third["solver/kl_ref"]) > 0.01
    kept = references(len(metrics_of(tmp_path)))
    assert kept is not None and kept.keys() == {"solver"}
    assert all(torch.equal(tensor, start[name]) for name, tensor in kept["solver"].items())

    Trainer(config_in(tmp_path, beta=0.5, reference="base", steps=4)).fit()
    assert references(len(metrics_of(tmp_path))) is None
    with pytest.raises(TrainingError, match=r"no copy of the adapters as GRPO began.* set train.reference: base"):
        Trainer(config_in(tmp_path, beta=0.5, steps=5)).fit()

    fresh = config_in(tmp_path / "fresh", beta=0.5, steps=1)
    Trainer(fresh).fit()
    assert load_checkpoint(tmp_path / "fresh" / "run" / "checkpoints" / "step-000001").references == {}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda trainer: trainer.sft(), "no `sft` section"),
        (lambda trainer: trainer.evaluate("x"), "train.eval_tasks is not set"),
    ],
)
def test_a_phase_that_is_not_configured_is_refused(
    tmp_path: Path, act: Callable[[Trainer], object], message: str
) -> None:
    trainer = Trainer(config_in(tmp_path, eval_tasks=None).model_copy(update={"sft": None}))
    with trainer.open(), pytest.raises(ConfigError, match=message):
        act(trainer)


def test_an_agent_may_change_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few: dict[str, Any] = {"tasks": f"{TOY}:few_tasks", "group_size": 2, "groups_per_step": 2}
    config = config_in(tmp_path, steps=2, agent=f"{TOY}:answer_from_elsewhere", output_dir="run", **few)
    Trainer(config.model_copy(update={"store_uri": "sqlite:///agl.db"})).fit()
    assert len(metrics_of(tmp_path)) == 2 and list((tmp_path / "run" / "adapters").iterdir())


def test_a_trainer_works_only_while_it_is_open(tmp_path: Path) -> None:
    trainer = Trainer(config_in(tmp_path))
    with trainer.open():
        pass
    with pytest.raises(TrainingError, match="the trainer is not open"):
        trainer.grpo()


# --- seeds ----------------------------------------------------------------------------------------------------------


def seeded(folder: Path, name: str, **train: Any) -> tuple[list[list[int] | None], dict[int, EvalResult], list[Path]]:
    """Tokens of the rollouts, evaluations by step, and published adapters, of a training with another output folder."""
    options: dict[str, Any] = {"eval_temperature": 1.0, "steps": 2, "group_size": 2, "deterministic": True} | train
    store_uri = f"sqlite:///{folder / name}.db"
    config = config_in(folder, output_dir=str(folder / name), **options).model_copy(update={"store_uri": store_uri})
    Trainer(config).fit()
    store = open_store(store_uri)
    names = [f"{name}-{step:05d}-g{g}-r{r}" for step in (1, 2) for g in range(4) for r in range(2)]
    tokens = [trajectory_of(store, rollout).calls[0].response_ids for rollout in names]
    store.close()
    found = {int(path.stem[-5:]): EvalResult.load(path) for path in (folder / name / "eval").glob("step-*.json")}
    return tokens, found, sorted((folder / name / "adapters").rglob("*.safetensors"))


def test_the_seed_alone_decides_what_is_sampled_and_published(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build_tiny_model(model, [task["question"] for task in toy_agent.tasks()], seed=0)
    tokens, evaluations, adapters = seeded(tmp_path, "one", model=str(model), eval_every=1)
    same, same_evaluations, same_adapters = seeded(tmp_path, "two-1", model=str(model), eval_every=1)
    assert (same, same_evaluations) == (tokens, evaluations)
    assert [path.read_bytes() for path in same_adapters] == [path.read_bytes() for path in adapters] != []
    rarely, rare_evaluations, _ = seeded(tmp_path, "three", model=str(model), eval_every=2)
    assert rarely == tokens and rare_evaluations == {step: evaluations[step] for step in (0, 2)}
    other, *_ = seeded(tmp_path, "four", model=str(model), seed=1, shuffle=False)
    unshuffled, *_ = seeded(tmp_path, "five", model=str(model), shuffle=False)
    assert not any(one == two for one, two in zip(other, unshuffled, strict=True))


def test_an_agent_that_sets_its_own_seed_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(NothingTrainedError):
        Trainer(config_in(tmp_path, agent=f"{TOY}:answer_with_seed", steps=1)).fit()
    assert "in 4 of 4 groups, rollouts got equal answers because the request sets a seed (42)" in caplog.text


# --- several trainings ----------------------------------------------------------------------------------------------


def test_a_second_training_in_the_same_folder_is_refused_and_the_first_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, steps=1)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with Trainer(config).open() as trainer:
        assert main(["train", str(tmp_path / "config.yaml")]) == 2
        assert f"another training runs in {tmp_path / 'run'} (process {os.getpid()} on" in capsys.readouterr().err
        trainer.grpo()
        with Trainer(config).open(trains=False) as beside:
            assert len(beside.evaluate("beside").tasks) == 8
            with pytest.raises(TrainingError, match="opened with trains=False"):
                beside.grpo()


def test_two_trainings_in_one_store_keep_apart_and_each_is_served_by_its_configuration(tmp_path: Path) -> None:
    configs = [config_in(tmp_path, steps=1, seed=seed, output_dir=str(tmp_path / f"{seed}/run")) for seed in (0, 1)]
    with closing(open_store(configs[0].store_uri)) as store:
        for config in configs:
            Trainer(config).fit()
        runs = [Trainer(config).run for config in configs]
        metrics = [json.loads((Trainer(config).folder / "metrics.jsonl").read_text())["metrics"] for config in configs]
        found = [store.query_metrics(run)["reward/mean"] for run in runs]
        assert found == [[(1, one["reward/mean"])] for one in metrics] and found[0] != found[1]
        assert [len(store.query_rollouts(f"{run}-00001-g0")) for run in runs] == [4, 4]
        for config, run in zip(configs, runs, strict=True):
            published = store.get_resource(f"{run}/solver")
            assert published is not None and published.uri.startswith(str(Trainer(config).folder))


# --- several devices ------------------------------------------------------------------------------------------------


def test_torchrun_trains_with_the_same_configuration_to_the_same_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        path = folder / "config.yaml"
        path.write_text(config_in(folder, steps=1, groups_per_step=2, deterministic=True, seed=3).to_yaml())
        if devices == 1:
            assert main(["train", str(path)]) == 0
            printed = capsys.readouterr().out
        else:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
            command = [*torchrun, "--nproc-per-node", "2", str(Path(sys.executable).with_name("agl")), "train", path]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
        assert printed.count("adapters:") == 1
        found.append((metrics_of(folder)[-1], load_file(folder / "run/adapters/solver@1/adapter_model.safetensors")))
    (one, weights), (two, other) = found
    assert two["reward/mean"] == one["reward/mean"] and one["calls/trained"] == two["calls/trained"] > 0
    assert two["solver/loss"] == pytest.approx(one["solver/loss"], abs=1e-5)
    assert two["solver/grad_norm"] == pytest.approx(one["solver/grad_norm"], rel=1e-5)
    # Adam's first step goes by the sign of a gradient: where that is rounding alone, the two may part.
    off = torch.cat([(other[name] - tensor).abs().flatten() for name, tensor in weights.items()])
    assert (off > 1e-5).double().mean() < 1e-3, f"{int((off > 1e-5).sum())} of {len(off)}"


# --- runners --------------------------------------------------------------------------------------------------------


def test_agents_in_runner_processes_train_as_in_threads_and_a_killed_one_costs_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    config = config_in(tmp_path, runners=2, unresponsive_s=900, steps=2, agent=f"{TOY}:answer_or_kill_the_runner_once")
    watchdog = threading.Thread(target=end_what_the_killed_runner_held, args=(tmp_path / "killed", store), daemon=True)
    watchdog.start()
    with Trainer(config).open() as trainer:
        trainer.grpo()
    assert [(step["rollouts"], step["rollouts/failed"]) for step in metrics_of(tmp_path)] == [(16.0, 0.0)] * 2
    attempts = {name: store.query_attempts(name) for name in rollout_names(range(1, 3))}
    assert {attempt.worker_id.rpartition("-")[2] for each in attempts.values() for attempt in each} != {
        str(os.getpid())
    }
    again = [each for each in attempts.values() if len(each) > 1]
    assert again and all(each[0].state == "unresponsive" and each[-1].state == "succeeded" for each in again)
    assert (tmp_path / "run" / "runners.log").exists()


def end_what_the_killed_runner_held(file: Path, store: Store) -> None:
    """As the store's watchdog would after 900 s."""
    wait_until(lambda: file.exists() and file.read_text() != "" and not is_alive(int(file.read_text())))
    while True:
        last = [attempts[-1] for name in rollout_names(range(1, 2)) if (attempts := store.query_attempts(name))]
        held = [one for one in last if one.worker_id.endswith(f"-{file.read_text()}") and one.state == "running"]
        if held:
            store.end_overdue_attempts(time.time_ns() + 10**12)
        elif len(last) == 16 and all(one.state == "succeeded" for one in last):
            return
        time.sleep(0.1)


def test_runners_that_cannot_run_end_the_training_with_their_message(tmp_path: Path) -> None:
    config = config_in(tmp_path, runners=1, instrument=["agl_nothing"])
    with pytest.raises(RunnerError, match=r"(?s)ended with exit code 2.*no package offers 'agl_nothing'"):
        Trainer(config).fit()
