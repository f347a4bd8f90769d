"""`train`: what to train and how."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from agl.config.loss import LossConfig
from agl.config.section import Count, Fraction, Positive, Reference, Section, TextPath
from agl.config.sft import TracesConfig

_REJECTION_KEYS = {
    "normalization",
    "mask_truncated_completions",
    "overlong_buffer",
    "overlong_penalty",
    "max_staleness",
}
"""Keys of the loss that algorithm rejection reads."""

_NOT_EXACT: Final = {
    *("temperature", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "typical_p"),
    *("bad_words", "min_tokens"),
}
_ELSEWHERE: Final = {"temperature": "; set train.temperature"}


class SamplingConfig(Section):
    """The tokens that training rollouts are sampled from, besides `train.temperature`; by default all."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the fewest likeliest tokens whose probabilities reach this."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only this many tokens; 0: all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Only tokens at least this times as likely as the likeliest."""

    @field_validator("top_k")
    @classmethod
    def _leaves_a_choice(cls, value: int) -> int:
        if value == 1:
            raise ValueError("top_k 1 always takes the likeliest token, which trains nothing; expected 0, or 2 or more")
        return value

    @model_validator(mode="before")
    @classmethod
    def _has_only_what_is_exact(cls, data: Any) -> Any:
        inexact = sorted(_NOT_EXACT & data.keys()) if isinstance(data, dict) else []
        if inexact:
            raise ValueError(
                f"{inexact[0]} cannot be declared: the trainer does not apply it when it computes logprobs. Leave it "
                f"out; the gateway makes it neutral in training calls{_ELSEWHERE.get(inexact[0], '')}"
            )
        return data

    def settings(self) -> dict[str, Any]:
        """The request fields that are not neutral."""
        return self.model_dump(exclude_defaults=True)


Scheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]


class TrainConfig(LossConfig):
    """What to train and how (`agl train`, `agl eval`)."""

    algorithm: Literal["grpo", "rejection"] = "grpo"
    """`grpo`: policy gradient. `rejection`: supervised fine-tuning on the rollouts with the best rewards."""
    min_reward: float | None = None
    """Algorithm rejection: minimum reward of a rollout to train on; none: the best rollout of each group."""
    model: TextPath | None = None
    """`smollm2`, `tiny`, a model of the Hugging Face Hub (`owner/name@revision`), a GGUF file, or a model folder. The
    section `models` is in its place if several base models are trained together."""
    chat_template: TextPath | None = None
    """Jinja file of the chat template; none: the model's own."""
    agent: Reference | None = None
    """Agent function, sync or async: receives the task, returns its answer. Not needed with `--from-store`."""
    command: str | None = None
    """Command line of a program that is the agent, in place of `agent`: it reads the task, and prints its answer."""
    max_memory_mb: Count | None = None
    """Memory in MiB that a process of `command`, or of a runner, may reserve; none: no limit."""
    runners: Annotated[int, Field(ge=0)] | Literal["external"] = 0
    """Where agents run. 0: in threads of the training; N: in N processes of it; `external`: in `agl runner`."""
    unresponsive_s: Positive = 30.0
    """Seconds without a sign of life of its runner after which a rollout is given to another runner."""
    host: str = "127.0.0.1"
    """Address on which gateway, API and collector of the training listen, for external runners."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of gateway and API; 0: any free port."""
    otlp_http_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the collector; 0: any free port."""
    tasks: Reference | None = None
    """Function without arguments that returns the training tasks, JSON values in a list or another collection. Not
    needed with `--from-store`."""
    traces: TracesConfig = Field(default_factory=TracesConfig)
    """Rollouts of the store that `--from-store` trains on."""
    eval_tasks: Reference | None = None
    """Function without arguments that returns the held-out tasks."""
    reward: Reference | None = None
    """Scorer (`agl.rewards`): a function of (task, answer, rollout) that returns a number, `{dimension: number}`, or
    None for a missing reward. If not set, the agent emits its rewards."""
    instrument: list[str] = Field(default_factory=list)
    """Entry points of the instrumentors to enable for the agent: `agl_langchain`, `agl_autogen`."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts of each task in a group."""
    groups_per_step: Count = 8
    """Groups, and therefore tasks, of a training step."""
    minibatches: Count = 1
    """Optimizer steps per training step, each on its share of the groups; all but the first are off-policy."""
    steps: Count = 20
    """Training steps."""
    shuffle: bool = True
    """Shuffle the tasks anew in each epoch; otherwise keep their order."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Maximum number of times per step that groups of equal rewards are replaced by new ones (DAPO)."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations on `eval_tasks`; the adapters of the best one are kept. 0: no evaluations."""
    early_stop: Annotated[int, Field(ge=0)] = 0
    """Stop after this many evaluations in a row without a better reward; 0: never."""
    stop_after_empty_steps: Annotated[int, Field(ge=0)] = 3
    """Stop with exit code 1 after this many steps in a row in which no call trained; 0: never."""
    alternate_steps: Annotated[int, Field(ge=0)] = 0
    """Train one adapter at a time, each for this many steps in turn; 0: all adapters in every step."""
    learning_rate: Positive = 2e-4
    """Highest learning rate of GRPO (AdamW); `sft.learning_rate` is that of the supervised steps."""
    lr_scheduler_type: Scheduler = "constant"
    """Learning rate over the steps of a phase, as in transformers."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps of a phase, over which the learning rate grows from 0."""
    warmup_ratio: Fraction = 0.0
    """The same as a share of the phase's steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's mean of squared gradients."""
    temperature: Positive = 1.0
    """Sampling temperature of training rollouts."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """Limits of the distribution that training rollouts are sampled from; the policy gradient accounts for them."""
    eval_temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature of evaluation rollouts; 0 is greedy."""
    max_tokens: Count = 256
    """Maximum number of response tokens for requests that set no limit."""
    max_grad_norm: Positive = 1.0
    """Gradient norm above which the gradient is scaled down."""
    pack_tokens: Count | None = None
    """Maximum number of distinct tokens in one forward pass of a training step; none: 1536 on CPUs, 8192 on
    accelerators, less where memory is short."""
    concurrency: Count = 32
    """Maximum number of rollouts that run at the same time."""
    timeout_s: Positive = 120.0
    """Seconds after which a rollout whose agent has not returned fails; the reward function has as long again."""
    asynchronous: bool = False
    """Run the rollouts of later steps while a step trains, up to `max_staleness` steps ahead."""
    engine_retries: Annotated[int, Field(ge=0)] = 2
    """Maximum number of times that a rollout is repeated because the engine failed."""
    failed_reward: float | None = None
    """Reward of a rollout that failed by its agent, e.g. 0, in place of its rewards; none: it is not in its group."""
    bf16: bool = False
    """Multiply with the frozen weights in bfloat16 on CPUs that support it in hardware; GPUs always do."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    load_in_4bit: bool = False
    """Quantise the linear layers of the base model to 4 bits (QLoRA); needs bitsandbytes."""
    fsdp: bool = False
    """Shard the layers of the base model across the processes that torchrun starts (FSDP)."""
    compile: bool = False
    """Compile the layers for training passes (torch.compile)."""
    seed: int = 0
    """Seed of all randomness: adapters, order of tasks, sampling, evaluations, order of the judge's attempts."""
    deterministic: bool = False
    """Run one rollout and one sequence at a time, so that equal seeds give bitwise equal adapters."""
    output_dir: TextPath = "runs/default"
    """Folder of checkpoints, adapters and metrics."""
    report_to: list[Literal["wandb", "mlflow"]] = Field(default_factory=list)
    """Trackers that receive the metrics in addition to the store, `metrics.jsonl` and TensorBoard."""

    @model_validator(mode="after")
    def _runs_its_agent(self) -> Self:
        if self.agent is not None and self.command is not None:
            raise ValueError("agent and command both name the agent: leave out one")
        if self.runners == "external" and not (self.port and self.otlp_http_port):
            raise ValueError("runners: external needs port and otlp_http_port, at which runners reach the training")
        if self.runners and self.deterministic:
            raise ValueError("runners and deterministic exclude each other: several processes answer in any order")
        return self

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.eval_every and self.eval_tasks is None:
            raise ValueError("eval_every needs eval_tasks")
        if self.asynchronous and not self.max_staleness:
            raise ValueError("asynchronous needs max_staleness: how many steps ahead rollouts may begin")
        if self.asynchronous and self.deterministic:
            raise ValueError("asynchronous and deterministic exclude each other")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio exclude each other")
        if (self.warmup_steps or self.warmup_ratio) and self.lr_scheduler_type == "constant":
            raise ValueError("warmup does nothing with lr_scheduler_type constant; choose constant_with_warmup")
        if self.load_in_4bit and (self.bf16 or self.fsdp):
            raise ValueError(f"load_in_4bit and {'bf16' if self.bf16 else 'fsdp'} exclude each other")
        limits, moves = self.sampling.settings(), self.asynchronous or self.minibatches > 1
        if limits and moves and self.algorithm == "grpo":
            raise ValueError(
                f"sampling.{next(iter(limits))} keeps the likeliest tokens of the policy that samples, which is known "
                "only until its first update: set minibatches: 1 and asynchronous: false, or leave it out"
            )
        if self.early_stop and not self.eval_every:
            raise ValueError("early_stop does nothing without eval_every")
        if self.min_reward is not None and self.algorithm != "rejection":
            raise ValueError("min_reward does nothing without algorithm rejection")
        if self.algorithm == "rejection" and (unused := [key for key in self.keys_set() if key not in _REJECTION_KEYS]):
            raise ValueError(f"{unused[0]} does nothing with algorithm rejection")
        return self
