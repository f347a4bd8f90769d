"""How surely an adapter on vLLM is proved in bfloat16, where rounding hides the change of a small step.

    .venv/bin/python -m benchmarks.vllm_proof [--pushes 100] [--sizes 1e-5 2e-4]

The trainer is SmolLM2 in bfloat16 with the trainer's attention; the engine is a second SmolLM2 in bfloat16 with
transformers' eager attention, which rounds differently. Each push is one step of Adam from fresh adapters: every weight
changes by the learning rate. The first push of each size takes the whole way of a training. The others are compared at
the factor that it found, with three engines: one that serves the version, one that serves the version of the push
before, and one that answers as the base model, with the rounding errors of a third attention.
"""

import agl_trainer  # noqa: F401  # before torch, which reads how long an idle thread spins

# isort: split
import argparse
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from agl.config import RoleConfig
from agl.errors import TrainingError
from agl_trainer.engine.vllm.proof import AdapterProof, Version
from agl_trainer.engine.vllm.verification import Verification, rms
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.model.base_model import load_model
from agl_trainer.model.model_folder import find_model, model_folder
from agl_trainer.model.policy import Policy
from tests.trainer.engine.served_policy import ServedPolicy

BASE, ROLE = "smollm2", "writer"


@dataclass
class Tally:
    """Outcomes of the proofs with one engine."""

    accepted: list[Verification] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.accepted)} of {len(self.accepted) + len(self.refused)}"


@dataclass
class Setup:
    """Trainer and engine of a step size."""

    trained: Policy
    fresh: list[Tensor]
    engine: ServedPolicy
    proof: AdapterProof
    folder: Path
    size: float

    def push(self, number: int) -> Version:
        """A step from the fresh adapter, saved."""
        with torch.no_grad():
            for parameter, start in zip(self.trained.parameters(ROLE), self.fresh, strict=True):
                parameter.copy_(start + torch.randn_like(start).sign() * self.size)
        name = f"{ROLE}@{number}"
        version = Version(name, ROLE, self.folder / name)
        save_adapter(version.folder, self.trained.adapter(ROLE), self.trained.adapter_config(ROLE))
        return version

    def found(self, version: Version) -> Verification:
        """By the way that a training takes."""
        self.engine.load(version.name, version.folder)
        found = self.proof.prove(self.engine, version)
        self.engine.unload(version.name)
        assert found is not None, "a step changes something"
        return found

    def served(self, version: Version, factor: int) -> tuple[Tensor, Tensor]:
        """Logprobs of the engine with the amplified version."""
        self.engine.load(version.name, version.folder)
        weights = self.engine.loaded[version.name]
        self.engine.loaded[version.name] = {
            key: value * (factor if ".lora_B." in key else 1) for key, value in weights.items()
        }
        found = self.proof.served(self.engine, version.name)
        self.engine.unload(version.name)
        return found


def policy(attention: str | None) -> Policy:
    """With the trainer's attention, or with one of transformers'."""
    model, tokenizer = load_model(model_folder(BASE))
    model = model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers' decorator hides the method's type
    if attention:
        model.set_attn_implementation(attention)
    return Policy(model, tokenizer, {ROLE: RoleConfig()}, base_name=BASE, seed=0, packs=attention is None)


def measure(setup: Setup, pushes: int, missing: tuple[Tensor, Tensor]) -> None:
    """Print a table's rows as they are found."""
    first = setup.push(0)
    factor = round(setup.found(first).factor)
    change = (
        f"{rms(first.changes[1]):.4f} nats with rounding, {rms(first.changes[factor]):.2f} amplified {factor} times"
    )
    print(f"\nstep of {setup.size:g}: changes {change}", flush=True)
    tallies = {name: Tally() for name in ("served", "the version before", "base model")}
    before = setup.served(first, factor)
    for number in range(1, pushes + 1):
        version = setup.push(number)
        own = setup.served(version, factor)
        for tally, served in zip(tallies.values(), (own, before, missing), strict=True):
            try:
                tally.accepted.append(setup.proof.compare(setup.engine, version, factor, served))
            except TrainingError as error:
                tally.refused.append(str(error))
        before = own
        if number % 10 == 0 or number == pushes:
            report(tallies)


def report(tallies: dict[str, Tally]) -> None:
    found = tallies["served"].accepted
    spread = "; ".join(
        f"{name} {min(values):.3f} to {max(values):.3f}, median {statistics.median(values):.3f}"
        for name, values in (("share", [one.share for one in found]), ("cosine", [one.cosine for one in found]))
        if values
    )
    accepted = ", ".join(f"{name}: {tally}" for name, tally in tallies.items())
    print(f"accepted {accepted}; {spread}", flush=True)
    for error in tallies["served"].refused:
        print(f"  {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pushes", type=int, default=100, help="for each size of a step")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e-5, 2e-4], help="of a step")
    arguments = parser.parse_args()
    find_model(BASE, downloads=True)
    torch.manual_seed(0)
    trained, engine, other = policy(None), ServedPolicy("engine", policy("eager")), policy("sdpa")
    fresh = [parameter.detach().clone() for parameter in trained.parameters(ROLE)]
    proof = AdapterProof(trained, tolerance=0.05)
    proof.add(engine, BASE)
    missing = proof.served(ServedPolicy("other", other), BASE)
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            setup = Setup(trained, fresh, engine, proof, Path(folder, f"{size:g}"), size)
            measure(setup, arguments.pushes, missing)


if __name__ == "__main__":
    main()
