"""`train`: what to train and how."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agl.config.loss import LossConfig
from agl.config.section import Count, Positive, Reference
from agl.config.sft import TracesConfig


class TrainConfig(LossConfig):
    """What to train and how (`agl train`, `agl eval`)."""

    algorithm: Literal["grpo", "rejection"] = "grpo"
    """`rejection`: fine-tuning on the rollouts that are good enough, in place of a policy gradient."""
    min_reward: float | None = None
    """What is good enough, of algorithm rejection; none: to be the best of its group."""
    model: str
    """`smollm2`, `tiny`, or a folder with a model that transformers loads."""
    agent: Reference | None = None
    """Agent function; it receives the task and returns its answer. Sync or async. Not needed with `--from-store`."""
    tasks: Reference | None = None
    """Function without arguments that returns the training tasks: a list of JSON values. Not needed there either."""
    traces: TracesConfig = Field(default_factory=TracesConfig)
    """What `--from-store` trains on in place of new rollouts."""
    eval_tasks: Reference | None = None
    """The same for held-out tasks."""
    reward: Reference | None = None
    """Function of (task, answer): a number or `{dimension: number}`. None: the agent emits its rewards itself."""
    instrument: list[str] = Field(default_factory=list)
    """Instrumentors to switch on around the agent, by entry point: `agl_langchain`, `agl_autogen`."""
    group_size: Annotated[int, Field(ge=2)] = 8
    groups_per_step: Count = 8
    minibatches: Count = 1
    """Optimizer steps that the groups of a step are dealt out to; sampling is then up to that many steps behind."""
    steps: Count = 20
    shuffle: bool = True
    """Draw the tasks of each epoch in a new order; otherwise as they are listed."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Rounds of new tasks in place of those whose rollouts all earned the same (DAPO), in each step."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two evaluations on `eval_tasks`, of which the best adapters are kept; 0: none."""
    early_stop: Annotated[int, Field(ge=0)] = 0
    """Evaluations in a row without a better reward after which the training ends; 0: never."""
    alternate_steps: Annotated[int, Field(ge=0)] = 0
    """Steps for which each adapter trains alone before it is the next one's turn; 0: all train in each step."""
    learning_rate: Positive = 2e-4
    temperature: Positive = 1.0
    """Sampling temperature put into training requests."""
    eval_temperature: Annotated[float, Field(ge=0)] = 0.0
    """The same for evaluation; 0 is greedy."""
    max_tokens: Count = 256
    """Longest answer, where the client did not say."""
    max_grad_norm: Positive = 1.0
    pack_tokens: Count = 4096
    """Most distinct tokens computed in one forward pass of a training step."""
    concurrency: Count = 32
    """Agents that run at once."""
    timeout_s: Positive = 120.0
    """An agent that has not answered by then is marked failed."""
    asynchronous: bool = False
    """Run the rollouts of the next steps while this one trains, up to `max_staleness` steps ahead."""
    engine_retries: Annotated[int, Field(ge=0)] = 2
    """How often a rollout is run again whose engine failed."""
    bf16: bool = False
    """Multiply with the frozen weights in bfloat16 where a CPU does that in hardware; a GPU always does."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    load_in_4bit: bool = False
    """Keep the linear layers of the base model in 4 bits (QLoRA); needs bitsandbytes."""
    fsdp: bool = False
    """Where torchrun starts several processes, keep a part of each layer of the base model on each device."""
    compile: bool = False
    """Compile the layers for training passes (torch.compile)."""
    seed: int = 0
    deterministic: bool = False
    """One agent and one sequence at a time, so that the same seed gives bitwise the same adapters."""
    output_dir: str = "runs/default"
    """Checkpoints, adapters and metrics."""
    report_to: list[Literal["wandb", "mlflow"]] = Field(default_factory=list)
    """Where metrics go beside the store, `metrics.jsonl` and TensorBoard."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.eval_every and self.eval_tasks is None:
            raise ValueError("eval_every needs eval_tasks")
        if self.asynchronous and not self.max_staleness:
            raise ValueError("asynchronous needs max_staleness: how many steps ahead rollouts may begin")
        if self.asynchronous and self.deterministic:
            raise ValueError("asynchronous and deterministic exclude each other")
        if self.load_in_4bit and (self.bf16 or self.fsdp):
            raise ValueError(f"load_in_4bit and {'bf16' if self.bf16 else 'fsdp'} exclude each other")
        if self.early_stop and not self.eval_every:
            raise ValueError("early_stop does nothing without eval_every")
        if self.min_reward is not None and self.algorithm != "rejection":
            raise ValueError("min_reward does nothing without algorithm rejection")
        if self.algorithm == "rejection" and (unused := self._of_policy_gradient()):
            raise ValueError(f"{unused[0]} does nothing with algorithm rejection")
        return self

    def _of_policy_gradient(self) -> list[str]:
        """Keys with a value of their own that only a policy gradient reads."""
        shared = {"loss_type", "mask_truncated_completions", "overlong_buffer", "overlong_penalty", "max_staleness"}
        return [
            name
            for name, field in LossConfig.model_fields.items()
            if name in self.model_fields_set - shared and getattr(self, name) != field.default
        ]
