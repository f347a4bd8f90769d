"""Trainings in which no call trains: the run says why, ends with exit code 1, and publishes nothing."""

from pathlib import Path
from typing import Any

import pytest

from agl.cli import main
from agl.errors import NothingTrainedError
from agl_trainer import Trainer
from tests.flows.test_training import TOY, config_in, metrics_of

FEW: dict[str, Any] = {"tasks": f"{TOY}:few_tasks", "group_size": 2, "groups_per_step": 2, "max_tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model, made by a step that trains."""
    folder = tmp_path_factory.mktemp("model")
    Trainer(config_in(folder, steps=1, **FEW)).fit()
    return str(folder / "run" / "model")


@pytest.mark.parametrize(
    "options, why",
    [
        ({"agent": f"{TOY}:no_answer"}, "4 of 4 rollouts failed, 4 of them with: RuntimeError: no database"),
        ({"agent": f"{TOY}:answer_of_nobody"}, "none of 4 calls trained: 4 failed_call (the request failed: 404"),
        ({"reward": f"{TOY}:flat"}, "none of 4 calls trained: 4 zero_advantage (all rollouts of its group earned the"),
        ({"reward": None}, "none of 4 calls trained: 4 no_reward (no reward reaches the call; set train.reward"),
        ({"reward": f"{TOY}:infinite"}, "4 no_reward (4 of 4 rewards are missing, 4 of them with: agl.errors.Telemet"),
    ],
)
def test_a_training_without_a_trained_call_ends_with_1_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, options: dict[str, Any], why: str
) -> None:
    config = config_in(tmp_path, **FEW | {"model": model, "steps": 1} | options)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert main(["train", str(path)]) == 1
    said = capsys.readouterr()
    assert "step 1: " in said.err and why in said.err
    assert "trained 0/" in said.err and "no adapter is published of solver" in said.err
    assert "agl: no call trained in the 1 step of" in said.err and "adapters:" not in said.out
    assert [step["calls/trained"] for step in metrics_of(tmp_path)] == [0]
    assert list((tmp_path / "run" / "adapters").iterdir()) == []


def test_so_many_empty_steps_in_a_row_end_the_training(tmp_path: Path, model: str) -> None:
    options = FEW | {"model": model, "steps": 9, "stop_after_empty_steps": 2, "reward": f"{TOY}:flat"}
    with pytest.raises(NothingTrainedError, match="no call trained in the 2 steps"):
        Trainer(config_in(tmp_path, **options)).fit()
    with pytest.raises(NothingTrainedError, match="no call trained in the 3 steps"):
        Trainer(config_in(tmp_path, **options)).fit()
    trainer = Trainer(config_in(tmp_path, **options | {"reward": f"{TOY}:letters", "steps": 4}), accept_changes=True)
    trainer.fit()
    assert metrics_of(tmp_path)[3]["calls/trained"] > 0
    with pytest.raises(NothingTrainedError, match="stopped at step 6: no call trained in the last 2 steps"):
        Trainer(config_in(tmp_path, **options | {"reward": None}), accept_changes=True).fit()
    Trainer(config_in(tmp_path, **options), accept_changes=True).fit()  # learned, perhaps: all rollouts earn the same
    assert [step["calls/trained"] for step in metrics_of(tmp_path)][4:] == [0] * 5
    assert [path.name for path in (tmp_path / "run" / "adapters").iterdir()] == ["solver@1"]
