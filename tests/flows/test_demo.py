"""`agl demo --tiny` from the command line: SFT, GRPO and evaluation with the tiny model, which must learn."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from agl.store import open_store
from agl.trajectory import build_trajectory
from agl_trainer.report.evaluation import EvalResult, paired_difference

pytestmark = pytest.mark.timeout(900)  # The first test waits for the training, which takes longer on a busy machine.

ROOT = Path(__file__).parents[2]
AGL = Path(sys.executable).with_name("agl")


def agl(*arguments: str) -> str:
    return subprocess.run([AGL, *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """Folder, report and CPU seconds of one run."""
    folder = tmp_path_factory.mktemp("demo") / "tiny"
    before = cpu_seconds()
    report = agl("demo", "--tiny", "--output", str(folder))
    return folder, report, cpu_seconds() - before


def cpu_seconds() -> float:
    """CPU time of the processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_it_learns_by_examples_and_then_by_reward(demo: tuple[Path, str, float]) -> None:
    folder, _, _ = demo
    base, sft, grpo = (EvalResult.load(folder / "eval" / f"{label}.json") for label in ("base", "sft", "grpo"))
    assert len(base.tasks) >= 64
    assert sft.mean() > base.mean() + 0.2
    for part in (None, "efficiency"):
        gain = paired_difference(sft.scores(part), grpo.scores(part))
        assert gain.mean >= 0.1
        assert gain.low > 0


def test_what_it_learns_depends_on_the_question(demo: tuple[Path, str, float]) -> None:
    folder, report, _ = demo
    base, grpo = (EvalResult.load(folder / "eval" / f"{label}.json") for label in ("base", "grpo"))
    assert grpo.mean("goal") >= 0.15 and base.mean("goal") == 0
    assert grpo.answers["writer"].share < 0.5
    assert f"same answer, writer  {base.answers['writer']} " in report
    store = open_store(f"sqlite:///{folder / 'agl.db'}")
    calls = [
        call
        for index in range(len(grpo.tasks))
        for call in build_trajectory(store.query_spans(f"tiny-eval-grpo-{index:04d}")).calls
        if call.role == "writer"
    ]
    store.close()
    assert len(calls) == len(grpo.tasks) and len({call.packed_response for call in calls}) > 5


def test_it_takes_less_than_90_seconds_of_two_cores(demo: tuple[Path, str, float]) -> None:
    """Measured as CPU time, because the wall time depends on other work on the machine."""
    assert demo[2] < 2 * 90


def test_the_report_says_where_everything_lies(demo: tuple[Path, str, float]) -> None:
    folder, report, _ = demo
    for named in (folder / "reward.png", folder / "adapters", folder / "agl.db"):
        assert named.exists()
        assert str(named) in report
    assert "grpo - sft" in report
    assert "agl inspect --last" in report


def test_the_report_comes_again_without_training_again(demo: tuple[Path, str, float]) -> None:
    folder, report, _ = demo
    before = (folder / "metrics.jsonl").read_text()
    assert agl("demo", "--tiny", "--output", str(folder)) == report
    assert (folder / "metrics.jsonl").read_text() == before


def test_both_roles_have_adapters_of_their_own(demo: tuple[Path, str, float]) -> None:
    adapters = {path.name.split("@")[0]: path for path in sorted((demo[0] / "adapters").iterdir())}
    assert set(adapters) == {"writer", "fixer"}
    writer, fixer = (load_file(path / "adapter_model.safetensors") for path in adapters.values())
    assert writer.keys() == fixer.keys()
    assert all(not bool((writer[name] == fixer[name]).all()) for name in writer)


def test_every_call_of_a_training_rollout_is_accounted_for(demo: tuple[Path, str, float]) -> None:
    uri = f"sqlite:///{demo[0] / 'agl.db'}"
    store = open_store(uri)
    trajectory = build_trajectory(store.query_spans("tiny-00001-g0-r0"))
    store.close()
    assert trajectory.calls
    assert sum(len(row.turns) for row in trajectory.rows) + len(trajectory.drops) == len(trajectory.calls)
    tree = agl("inspect", "tiny-00001-g0-r0", "--store", uri)
    assert "invoke_agent writer" in tree
    assert "writer@" in tree
    assert "trained in step" in tree


def test_the_metrics_name_each_step_once(demo: tuple[Path, str, float]) -> None:
    lines = [json.loads(line) for line in (demo[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    last = lines[-1]["metrics"]
    dropped = sum(value for name, value in last.items() if name.startswith("calls/dropped/"))
    assert last["calls/trained"] + dropped == last["calls"]
