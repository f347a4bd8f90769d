"""The training step of TRL's GRPOTrainer over the rows of a shape. `benchmarks.trainer` runs it in TRL's environment.

It calls `GRPOTrainer.training_step` with the batches that `_generate_and_score_completions` would build from the same
rollouts: one row for each answer. All batches of a step have the same size, so the time of some can be extrapolated to
all. Gradient checkpointing, which TRL enables by default, is disabled: a step is faster and takes more memory.
"""

import math
import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.step_rows import SHAPES, Measured, Shape, draw_adapter, peak_mb, rollouts, sgemm_flops

Batch = dict[str, torch.Tensor]


class Fed(GRPOTrainer):
    """Trains on the batch it is given, instead of sampling one."""

    def _prepare_inputs(self, generation_batch: Batch) -> Batch:
        return generation_batch


def trainer(folder: str, batch_size: int, batches: int) -> Fed:
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=batches,
        num_generations=batch_size,
        loss_type="grpo",
        beta=0.0,
        epsilon=1e9,
        gradient_checkpointing=False,
    )
    made = Fed(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["x"] * batch_size}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    made.current_gradient_accumulation_steps = batches
    made.create_optimizer()
    draw_adapter(made.model)
    return made


def batches(shape: Shape, size: int) -> list[Batch]:
    """Batches as TRL builds them: prompts padded on the left to the longest of all rows, then split."""
    rows = [(prompt, answer, made.advantage) for made in rollouts(shape) for prompt, answer in made.turns()]
    longest = max(len(prompt) for prompt, _, _ in rows)
    return [_batch(rows[start : start + size], longest) for start in range(0, len(rows), size)]


def _batch(rows: list[tuple[list[int], list[int], float]], longest: int) -> Batch:
    answers = torch.tensor([answer for _, answer, _ in rows])
    return {
        "prompt_ids": torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _, _ in rows]),
        "completion_ids": answers,
        "completion_mask": torch.ones_like(answers),
        "advantages": torch.tensor([advantage for _, _, advantage in rows]),
        "num_items_in_batch": torch.tensor(float(answers.numel())),
    }


def main() -> None:
    name, folder, size, steps, measured = sys.argv[1:]
    parts = batches(SHAPES[name], int(size))
    made = trainer(folder, int(size), len(parts))
    whole = len(parts) / int(measured)
    parts = parts[: int(measured)]
    model = made.model_wrapped
    made.training_step(model, {name: tensor[:1] for name, tensor in parts[0].items() if tensor.dim()}, None)
    made.optimizer.zero_grad()
    sgemm, seconds, cpu_seconds, norm = sgemm_flops(), [], [], 0.0
    for _ in range(int(steps)):
        started, cpu_started = time.perf_counter(), time.process_time()
        for part in parts:
            made.training_step(model, part, None)
        norm = float(made.accelerator.clip_grad_norm_(model.parameters(), 1.0))
        made.optimizer.step()
        made.optimizer.zero_grad()
        seconds.append((time.perf_counter() - started) * whole)
        cpu_seconds.append((time.process_time() - cpu_started) * whole)
        draw_adapter(model)
    Measured(seconds, cpu_seconds, norm if whole == 1 else math.nan, sgemm, peak_mb()).print_json()


if __name__ == "__main__":
    main()
