"""TRL's part of `benchmarks.single_turn`. It runs in an environment with TRL."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.single_turn_task import GROUP_SIZE, GROUPS, LEARNING_RATE, MAX_TOKENS, WEIGHTS, Took
from examples.sql_agent.prompts import extract_sql, writer_messages
from examples.sql_agent.reward import score
from examples.sql_agent.tasks import train_tasks


def reward(completions: list[list[dict[str, str]]], gold: list[str], **_: object) -> list[float]:
    scored = [
        score({"gold": wanted}, {"sql": extract_sql(completion[0]["content"])})
        for completion, wanted in zip(completions, gold, strict=True)
    ]
    return [sum(WEIGHTS[part] * value for part, value in parts.items()) for parts in scored]


def arguments(folder: Path, seed: int, steps: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder / "trl-run"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=GROUPS * GROUP_SIZE // 4,
        gradient_accumulation_steps=4,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        loss_type="grpo",
        scale_rewards="group",
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
    )


def main() -> None:
    model_folder, folder, seed, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(2)
    tasks = [{"prompt": writer_messages(task["question"]), "gold": task["gold"]} for task in train_tasks()]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder / "start"), is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments(folder, seed, steps),
        train_dataset=Dataset.from_list(tasks),
        processing_class=tokenizer,
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer.train()
    took = Took(time.perf_counter() - started, time.process_time() - cpu_started)
    trainer.model.save_pretrained(str(folder / "trl"))
    (folder / "trl-took.json").write_text(json.dumps(asdict(took)))


if __name__ == "__main__":
    main()
