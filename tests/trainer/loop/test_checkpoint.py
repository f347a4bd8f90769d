"""Checkpoints: what goes in comes out bit by bit, and a kill or a damaged file never costs more than the last one."""

import hashlib
import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from agl.errors import TrainingError
from agl_trainer.loop import rng
from agl_trainer.loop.checkpoint import Checkpoint, load_checkpoint, load_latest, prune, save_checkpoint

ROLES = ("writer", "fixer")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )


def trained(seed: int) -> tuple[PeftModel, torch.optim.Optimizer]:
    """A LoRA model after two AdamW steps, so that the optimizer has moments."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, betas=(0.9, 0.95))
    for _ in range(2):
        ids = torch.randint(32, (2, 8))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model, optimizer


def state_of(step: int) -> Checkpoint:
    pairs = {role: trained(step + index) for index, role in enumerate(ROLES)}
    return Checkpoint(
        step=step,
        phase="grpo",
        position=step * 64,
        versions={role: step for role in ROLES},
        adapters={role: get_peft_model_state_dict(model) for role, (model, _) in pairs.items()},
        adapter_configs={role: model.peft_config["default"].to_dict() for role, (model, _) in pairs.items()},
        optimizers={role: optimizer.state_dict() for role, (_, optimizer) in pairs.items()},
        config="train:\n  model: tiny\n",
        references={"writer": get_peft_model_state_dict(trained(step + 7)[0])},
        baselines={"writer": 0.6},
        baseline_weights={"writer": 0.05},
    )


def small_state(step: int) -> Checkpoint:
    """Without a model: every adapter value is the step."""
    return Checkpoint(
        step,
        "sft",
        step,
        {"writer": step},
        {"writer": {"a": torch.full((64, 64), float(step))}},
        {"writer": {}},
        {},
        "",
    )


def load(folder: Path) -> Checkpoint:
    state = load_latest(folder)
    assert state is not None
    return state


def assert_same_bits(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype and one.shape == other.shape
    assert one.reshape(-1).view(torch.uint8).tolist() == other.reshape(-1).view(torch.uint8).tolist()


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = state_of(12)
    assert save_checkpoint(tmp_path, saved) == tmp_path / "step-000012"
    loaded = load(tmp_path)
    assert (loaded.step, loaded.phase, loaded.position, loaded.config) == (12, "grpo", 768, saved.config)
    assert loaded.versions == {"writer": 12, "fixer": 12}
    assert (loaded.baselines, loaded.baseline_weights) == ({"writer": 0.6}, {"writer": 0.05})
    assert list(loaded.adapters) == list(ROLES)
    assert loaded.references is not None and saved.references is not None
    assert loaded.references.keys() == saved.references.keys() == {"writer"}
    for name, tensor in saved.references["writer"].items():
        assert_same_bits(loaded.references["writer"][name], tensor)
    for role in ROLES:
        assert loaded.adapters[role].keys() == saved.adapters[role].keys()
        for name, tensor in saved.adapters[role].items():
            assert_same_bits(loaded.adapters[role][name], tensor)
        assert sorted(loaded.adapter_configs[role]["target_modules"]) == ["q_proj", "v_proj"]


def test_an_optimizer_goes_on_bitwise_where_it_stopped(tmp_path: Path) -> None:
    _, optimizer = trained(3)
    optimizers = {"writer": optimizer.state_dict(), "fixer": torch.optim.AdamW([torch.nn.Parameter()]).state_dict()}
    save_checkpoint(tmp_path, Checkpoint(1, "grpo", 0, {}, {}, {}, optimizers, ""))
    back = load(tmp_path).optimizers
    assert back["fixer"] == optimizers["fixer"]
    assert back["writer"]["param_groups"] == optimizers["writer"]["param_groups"]
    assert back["writer"]["state"].keys() == optimizers["writer"]["state"].keys()
    for index, entries in optimizers["writer"]["state"].items():
        for name, value in entries.items():
            assert_same_bits(back["writer"]["state"][index][name], value)
    _, other = trained(4)
    other.load_state_dict(back["writer"])
    assert other.param_groups[0]["betas"] == (0.9, 0.95)


def test_the_adapter_folder_is_a_plain_peft_adapter(tmp_path: Path) -> None:
    model, _ = trained(5)
    state = state_of(5)
    folder = save_checkpoint(tmp_path, state) / "adapters" / "writer"
    loaded = PeftModel.from_pretrained(tiny_model(), str(folder))
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_random_numbers_of_torch_go_on_where_they_stopped(tmp_path: Path) -> None:
    torch.manual_seed(7)
    save_checkpoint(tmp_path, small_state(1))
    expected, before = torch.rand(3), random.getstate()
    rng.restore(load(tmp_path).rng)
    assert torch.equal(torch.rand(3), expected)
    assert random.getstate() == before  # span ids are drawn from it: they must not come again


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None


def damage_bytes(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_json(folder: Path) -> None:
    plain = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(plain | {"position": 999}))


def damage_adapter(folder: Path) -> None:
    (folder / "adapters" / "writer" / "adapter_model.safetensors").unlink()


def damage_sums(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text("")


def damage_link(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    (folder / "SHA256SUMS").symlink_to("SHA256SUMS")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_bytes, "optimizer.safetensors has changed since it was written"),
        (damage_json, "state.json has changed since it was written"),
        (damage_adapter, "adapters/writer/adapter_model.safetensors is missing"),
        (damage_sums, "state.json is missing or not listed in SHA256SUMS"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS: No such file"),
        (damage_link, "SHA256SUMS: Too many levels"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, message: str
) -> None:
    save_checkpoint(tmp_path, small_state(1))
    damage(save_checkpoint(tmp_path, small_state(2)))
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).step == 1
    assert re.search(f"step-000002.*{message}", caplog.text)


def test_nothing_is_started_afresh_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        damage_bytes(save_checkpoint(tmp_path, small_state(step)))
    with pytest.raises(TrainingError, match=r"all 2 checkpoints in .* are damaged"):
        load_latest(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_state(3))
    save_checkpoint(tmp_path, Checkpoint(3, "grpo", 0, {}, {}, {}, {}, ""))
    assert load(tmp_path).phase == "grpo"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_state(3)).rename(tmp_path / "step-000003.old")
    assert load(tmp_path).step == 3
    save_checkpoint(tmp_path, Checkpoint(3, "grpo", 0, {}, {}, {}, {}, ""))
    assert load(tmp_path).phase == "grpo"


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (9, 10, 1_000_000):
        save_checkpoint(tmp_path, small_state(step))
    (tmp_path / ".removing-step-000008").mkdir()  # a kill in the middle of an earlier prune
    (tmp_path / ".writing-step-000011").mkdir()  # and of an earlier save
    prune(tmp_path, 1_000_000, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-1000000"]


STRAYS = (
    "step-000002/.DS_Store",
    "step-000002/.ipynb_checkpoints/state-checkpoint.json",
    "step-000002/adapters/.nfs0001",
    "step-000002/adapters/writer/adapter_model.safetensors.part",
    "step-000002/optimizer.safetensors.tmp",
    ".DS_Store",
    "step-000002 (copy)/state.json",
    "step-000009.part/state.json",
    "step-000004",
)


def test_files_that_are_not_the_checkpoints_own_do_no_harm(tmp_path: Path) -> None:
    """Neither to the checkpoint beside them, nor to themselves."""
    save_checkpoint(tmp_path, small_state(1))
    save_checkpoint(tmp_path, small_state(2))
    for name in STRAYS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert load(tmp_path).step == 2
    save_checkpoint(tmp_path, small_state(3))
    prune(tmp_path, 3)
    assert load(tmp_path).step == 3 and load_checkpoint(tmp_path / "step-000002").step == 2
    assert all((tmp_path / name).exists() for name in STRAYS)


def test_half_of_a_copy_costs_no_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two folders of higher steps whose copy is not complete: neither is loaded, nor kept in the place of others."""
    save_checkpoint(tmp_path, small_state(2))
    for step in (8, 9):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-000009" / "SHA256SUMS").write_bytes(b"\xff\xfe half")
    assert load(tmp_path).step == 2
    assert "step-000009" in caplog.text and "step-000008" in caplog.text
    save_checkpoint(tmp_path, small_state(3))
    prune(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:06d}" for step in (2, 3, 8, 9)]
    save_checkpoint(tmp_path, small_state(8))
    assert load_checkpoint(tmp_path / "step-000008").step == 8


def test_a_checkpoint_of_another_version_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, small_state(1))
    state = folder / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"mood": "good"}))
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    kept = [line for line in sums if not line.endswith("state.json")]
    digest = hashlib.sha256(state.read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text("\n".join([*kept, f"{digest}  state.json"]))
    with pytest.raises(TrainingError, match=r"another version of agl wrote it .*mood"):
        load_checkpoint(folder)


@contextmanager
def without_rights() -> Iterator[Path]:
    """A folder, in a context in which this process has no rights that its files do not grant."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        folder.chmod(0o777)
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("closed", [".", "step-000002", "step-000002/state.json", "step-000002/SHA256SUMS"])
def test_what_may_not_be_read_is_not_taken_for_damage(closed: str) -> None:
    """Else the training would go on from an older checkpoint, or from none, and overwrite what it could not read."""
    with without_rights() as folder:
        for step in (1, 2):
            save_checkpoint(folder / "checkpoints", small_state(step))
        (folder / "checkpoints" / closed).chmod(0)
        with pytest.raises(TrainingError, match=f"{closed.strip('.')}.*Permission denied"):
            load_latest(folder / "checkpoints")
        (folder / "checkpoints" / closed).chmod(0o700)
        assert load(folder / "checkpoints").step == 2


def test_a_folder_that_cannot_be_written_is_named_and_keeps_its_checkpoints() -> None:
    with without_rights() as folder:
        save_checkpoint(folder / "checkpoints", small_state(1))
        (folder / "checkpoints").chmod(0o500)
        with pytest.raises(TrainingError, match=r"cannot write the checkpoint of step 2: .*Permission denied"):
            save_checkpoint(folder / "checkpoints", small_state(2))
        assert load(folder / "checkpoints").step == 1
        (folder / "checkpoints").chmod(0o700)


SAVE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import torch
from agl_trainer.loop.checkpoint import Checkpoint, prune, save_checkpoint

MOMENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def die_at(moment):
    left = [moment]
    def hook(event, arguments):
        if event in MOMENTS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for line in sys.stdin:
    step, moment = map(int, line.split())
    child = os.fork()
    if child == 0:
        tensors = {"a": torch.full((64, 64), float(step))}
        state = Checkpoint(step, "sft", step, {"writer": step}, {"writer": tensors}, {"writer": {}}, {}, "")
        die_at(moment)
        save_checkpoint(Path(sys.argv[1]), state)
        prune(Path(sys.argv[1]), step, keep=1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_process_killed_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL before the first, the second, ... change to the disk, until a save and its pruning come to their end.

    Each time the checkpoint that was there, or the new one, loads; first as a new step, then as one that replaces its
    like.
    """
    command = [sys.executable, "-c", SAVE_AND_DIE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def save(step: int, moment: int) -> int:
            process.stdin.write(f"{step} {moment}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        assert save(1, 0) == 0
        for step in (2, 2):
            moment, code = 0, -signal.SIGKILL
            while code:
                moment += 1
                code = save(step, moment)
                assert code in (0, -signal.SIGKILL)
                state = load(tmp_path)
                assert state.step in (1, 2)
                assert torch.equal(state.adapters["writer"]["a"], torch.full((64, 64), float(state.step)))
            assert moment > 10
            assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("limit", [0, 100, 10_000])
def test_a_disk_that_fills_during_a_save_is_one_clear_line_and_the_last_checkpoint_stays(
    limit: int, tmp_path: Path
) -> None:
    """The system ends each write after `limit` bytes of a file, with an error that names no file, as a full disk."""
    save_checkpoint(tmp_path, small_state(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(TrainingError) as caught:
            save_checkpoint(tmp_path, small_state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch(
        rf"cannot write the checkpoint of step 2: {tmp_path}/\S+: File too large; earlier checkpoints are whole\. .*",
        str(caught.value),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"], "what was written takes no space"
    assert load(tmp_path).step == 1


@pytest.mark.parametrize("name", ["../../escaped", "/abs", "a/b", "..", ".", "", "x\0y", "a@3", "é", "a" * 65])
def test_names_that_are_paths_go_into_no_checkpoint_and_are_read_from_none(name: str, tmp_path: Path) -> None:
    state = small_state(1)
    named = replace(state, versions={name: 1}, adapters={name: state.adapters["writer"]}, adapter_configs={name: {}})
    with pytest.raises(TrainingError, match="cannot have the role"):
        save_checkpoint(tmp_path / "run", named)
    path = save_checkpoint(tmp_path / "run", state)
    plain = (path / "state.json").read_text().replace('"writer"', json.dumps(name))
    (path / "state.json").write_text(plain)
    sums = (path / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256(plain.encode()).hexdigest()
    lines = [f"{digest}  state.json" if line.endswith("state.json") else line for line in sums]
    (path / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    with pytest.raises(TrainingError, match="cannot have the role"):
        load_checkpoint(path)
    assert [each.name for each in tmp_path.iterdir()] == ["run"]
