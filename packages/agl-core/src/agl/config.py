"""The configuration: one YAML file, one typed tree. Unknown keys are errors that name the key and its neighbours.

The tree lives in agl-core so that it can be read and checked without torch; each part says which command reads it.
"""

import difflib
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from agl.errors import ConfigError
from agl.store import DEFAULT_URI

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Reference = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
"""`module:function`, importable from the folder where the command runs."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class RoleConfig(_Section):
    """One role: its own LoRA adapter on the shared base model."""

    lora_r: Count = 16
    lora_alpha: Count = 32
    adapter: str | None = None
    """Another role whose adapter this one shares; it then has no rank of its own."""
    frozen: bool = False
    """Its adapter answers but is not trained."""
    rewards: dict[str, float] = Field(default_factory=dict)
    """Weights of reward dimensions for this role; none: the scalar as it was emitted."""

    @model_validator(mode="after")
    def _shares_or_has(self) -> Self:
        if self.adapter is not None and self.model_fields_set & {"lora_r", "lora_alpha", "frozen"}:
            raise ValueError("a role with the adapter of another takes lora_r, lora_alpha and frozen from it")
        return self


class AgentRoles(_Section):
    """The roles to train, each a key of its own beside `gamma`."""

    gamma: Fraction = 0.85
    """Factor on a reward for each hand-off between roles that lies between a call and the reward."""
    turn_gamma: Fraction = 1.0
    """Factor on a reward for each call that lies between a call and the reward."""
    roles: dict[str, RoleConfig] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_roles(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "roles" in data:
            return data
        factors = {name: data[name] for name in ("gamma", "turn_gamma") if name in data}
        return factors | {"roles": {name: role or {} for name, role in data.items() if name not in factors}}

    @model_validator(mode="after")
    def _share_adapters(self) -> Self:
        for name, role in self.roles.items():
            owner = self.roles.get(role.adapter) if role.adapter else None
            if role.adapter and (owner is None or owner.adapter):
                known = ", ".join(other for other, config in self.roles.items() if not config.adapter)
                raise ValueError(
                    f"role {name} shares the adapter of {role.adapter!r}; adapters of their own have {known}"
                )
        return self


class TlsConfig(_Section):
    """PEM files."""

    certificate: Path
    """The certificate, followed by those that it rests on."""
    key: Path
    client_ca: Path | None = None
    """Who signs the certificates of senders; without one senders need none."""


class UpstreamConfig(_Section):
    """An engine behind the gateway."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    """Base URL of an OpenAI-compatible server (ending in `/v1`)."""
    kind: Literal["vllm", "sglang"] = "vllm"
    """How it is asked for token ids, and given them; `vllm` also for servers in the shape of vLLM."""
    key_env: str | None = None
    """Environment variable of its key; clients then show the engine none of theirs."""
    models: list[str] = Field(default_factory=list)
    """Roles, policies and models that it serves, in every version; empty: whatever it is asked for."""
    max_concurrent: Count = 256
    """Calls there at once; further ones wait, and rollouts take turns."""


class TimeoutsConfig(_Section):
    """How long the gateway waits at each hop of a call."""

    connect_s: Positive = 10.0
    queue_s: Positive = 300.0
    """For a place at the engine."""
    first_byte_s: Positive = 300.0
    """Where the answer is not streamed, that is all of it."""
    chunk_s: Positive = 120.0
    """Between two pieces of a stream."""
    total_s: Positive = 1800.0
    """For all of it, from the call's arrival."""


RecordMode = Literal["closed", "open"]


class GatewayConfig(_Section):
    """The OpenAI-compatible proxy in front of engines (`agl serve`, `agl train`)."""

    upstream: str = "local"
    """`local` for the in-process engine, else the base URL of an OpenAI-compatible server (ending in `/v1`)."""
    engines: list[UpstreamConfig] = Field(default_factory=list)
    """Several engines, or one that needs a key, in place of `upstream`."""
    models: dict[str, str] = Field(default_factory=dict)
    """Names that clients ask for, and what each stands for at the engines: a role, a policy or a pinned version."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields put into every request that the client did not set itself; engines are asked for token ids without it."""
    exact_prefix: bool = False
    """Make the prompt of a turn that continues a conversation of the tokens sampled so far, where the engine takes
    tokens; the chat template writes only what is new."""
    record: RecordMode = "closed"
    """What becomes of an answer that cannot be recorded: `closed` withholds it, `open` lets it pass and says so."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further tries of a call of which nothing was passed on yet."""
    backoff_s: Positive = 0.5
    """Pause before the first of them; each further one is twice as long."""
    hedge_after_s: Positive | None = None
    """Ask a second engine too when the first has been silent for so long."""
    health_s: Positive = 10.0
    """Time between two looks at the engines, where there are several."""
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig)
    max_body_bytes: Count = 32 * 2**20
    """Largest request."""
    tls: TlsConfig | None = None
    """Of the gateway's port; the receivers' is `collector.tls`."""

    @model_validator(mode="after")
    def _names_its_engines_once(self) -> Self:
        if self.engines and "upstream" in self.model_fields_set:
            raise ValueError("upstream and engines both name engines: list them all in engines")
        return self

    @model_validator(mode="after")
    def _asks_engines_of_one_model_alike(self) -> Self:
        for one, other in itertools.combinations(self.engines, 2):
            if one.kind != other.kind and (not one.models or not other.models or {*one.models} & {*other.models}):
                raise ValueError(f"{one.url} and {other.url} serve the same models, so both must be of one kind")
        return self

    @model_validator(mode="after")
    def _holds_the_tokens_it_needs(self) -> Self:
        is_left_out = self.extra_body.get("return_token_ids", True) is None
        if self.exact_prefix and is_left_out and not any(engine.kind == "sglang" for engine in self.engines):
            raise ValueError("exact_prefix needs the token ids that return_token_ids: null in extra_body leaves out")
        return self


class EngineConfig(_Section):
    """What samples: the in-process engine, or vLLM. `engine: vllm` stands for `engine: {kind: vllm}`."""

    kind: Literal["local", "vllm"] = "local"
    """`vllm`: a training pushes its adapters to the servers that `gateway` names."""
    max_batch: Count = 64
    """Sequences that the in-process engine decodes together."""
    max_model_len: Count = 2048
    """Longest prompt plus answer, in tokens."""
    tolerance: Positive = 0.05
    """Largest mean difference between the logprobs of vLLM and the trainer at which an adapter counts as live, in nats
    a token."""

    @model_validator(mode="before")
    @classmethod
    def _name_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data


class CollectorConfig(_Section):
    """What receives spans, over OTLP/HTTP and OTLP/gRPC (`agl serve`)."""

    max_body_bytes: Count = 64 * 2**20
    """Largest request, after decompression."""
    max_pending_bytes: Count = 128 * 2**20
    """Most bytes of requests that are not committed yet; above it senders are asked to send again."""
    token_file: Path | None = None
    """Bearer tokens, one a line, beside `--token`; a request needs one of them."""
    tls: TlsConfig | None = None

    @model_validator(mode="after")
    def _leave_room(self) -> Self:
        if self.max_pending_bytes < 2 * self.max_body_bytes:
            raise ValueError("max_pending_bytes must be twice max_body_bytes: a body is held compressed and plain")
        return self


Appendfsync = Literal["everysec", "always"]


class QueueConfig(_Section):
    """The queue in Redis between receivers and the store, and the writers that empty it (`agl serve --queue`)."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "agl"
    """Queues of other names in the same Redis are others."""
    appendfsync: Appendfsync = "everysec"
    """The weakest setting of Redis that is accepted: what `everysec` may lose is warned of."""
    high: Count = 5000
    """Spans in the queue; above it writers are added, and `on_queue_high` is called."""
    hard_limit: Count = 100_000
    """Spans in the queue; from there on senders are asked to send again."""
    min_writers: Count = 1
    max_writers: Count = 4
    """Processes."""
    shrink_after_s: Positive = 30.0
    """A writer ends each time that the queue was below half of `high` for so long."""
    check_s: Positive = 1.0
    """Time between two looks at the queue and its writers."""
    claim_after_s: Positive = 60.0
    """What a writer has taken and not finished by then, another takes over."""
    on_queue_high: str | None = None
    """A command, or a URL to POST to, when the queue gets above `high` and each minute that it stays there."""

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.max_writers < self.min_writers:
            raise ValueError("max_writers must not be below min_writers")
        if self.hard_limit <= self.high:
            raise ValueError("hard_limit must be above high: else no writer is ever added")
        return self


class TracesConfig(_Section):
    """Which rollouts of the store are learnt from."""

    modes: list[Literal["train", "eval", "prod"]] = Field(default_factory=lambda: ["train", "prod"])
    tags: dict[str, str | bool | int | float] = Field(default_factory=dict)
    """Attributes that some span of a rollout must have, as `agl.emit_annotation` writes them."""


class SftTracesConfig(TracesConfig):
    """The same, and which calls of them."""

    min_reward: float | None = None
    """Least reward, of the call's role or else of the rollout; none: any, or none at all."""
    roles: list[str] = Field(default_factory=list)
    """Roles whose calls are learnt from; none: all under `agent_roles`."""


class SftConfig(_Section):
    """Supervised fine-tuning (`agl sft`), on examples or on what the store holds."""

    examples: Reference | None = None
    """Function without arguments that returns a list of `{"role", "messages", "completion"}`."""
    traces: SftTracesConfig | None = None
    """Rollouts of the store in place of examples."""
    epochs: Count = 3
    batch_size: Count = 8
    learning_rate: Positive = 1e-3

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.examples is None) == (self.traces is None):
            raise ValueError("expected either examples or traces")
        return self


class LossConfig(_Section):
    """The keys of `train` that make rewards into a loss, named as in TRL's GRPOConfig."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "max@k", "ema"] = "grpo"
    """How rewards are compared (agl_trainer.advantages)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages of grpo are divided by: the standard deviation of their group, of the whole step, or nothing."""
    max_at_k: Annotated[int, Field(ge=2)] = 4
    """The k of advantage max@k."""
    ema_decay: Fraction = 0.95
    """How much of a role's running mean is kept in a step, of advantage ema."""
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = "grpo"
    """What is made of advantage and ratio (agl_trainer.losses)."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] | None = None
    """Normalise as TRL does for this loss; none: each rollout weighs the same."""
    epsilon: Positive = 0.2
    """Clip range of the probability ratio (PPO, arXiv 1707.06347, eq. 7)."""
    epsilon_high: Positive | None = None
    """Above 1; as `epsilon` where it is not set. For cispo the cap of the ratio, 5.0."""
    delta: Positive | None = None
    """Upper bound of the ratio at negative advantages (dual clip)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole row (GSPO)."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence from the base model."""
    use_bias_correction_kl: bool = True
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the tokens, those of highest entropy, that train."""
    mask_truncated_completions: bool = False
    """Do not train on answers that were cut at their longest."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Tokens before `max_tokens` within which an answer loses reward (DAPO, arXiv 2503.14476, eq. 13); 0: none."""
    overlong_penalty: Positive = 1.0
    """What an answer of `max_tokens` loses."""
    off_policy_mask_threshold: Positive | None = None
    """KL divergence from which on a bad row that the policy has left behind is not trained on."""
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = (
        None
    )
    """Correct for an engine that samples otherwise than the policy; TRL's names begin with `vllm_`."""
    importance_sampling_clip_max: Positive | None = 3.0
    importance_sampling_clip_min: Positive | None = None
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """Versions that a call's policy may be behind; older calls are dropped."""
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    """What the engine records, in vLLM's words: the model's own logprobs, or those after the temperature."""
    sapo_temperature_pos: Positive = 1.0
    sapo_temperature_neg: Positive = 1.05
    vespo_k_pos: Positive = 2.0
    vespo_lambda_pos: Positive = 3.0
    vespo_k_neg: Positive = 3.0
    vespo_lambda_neg: Positive = 2.0

    @model_validator(mode="after")
    def _is_used(self) -> Self:
        for key, owner, there in (
            ("max_at_k", "advantage max@k", self.advantage == "max@k"),
            ("ema_decay", "advantage ema", self.advantage == "ema"),
            ("scale_rewards", "advantage grpo", self.advantage == "grpo"),
            ("epsilon", "a loss that clips", self.loss not in ("cispo", "sapo", "vespo")),
            ("epsilon_high", "a loss that clips", self.loss not in ("sapo", "vespo")),
            ("delta", "a loss that clips", self.loss not in ("cispo", "sapo", "vespo")),
            ("overlong_penalty", "overlong_buffer", self.overlong_buffer > 0),
            ("use_bias_correction_kl", "beta", self.beta > 0),
        ):
            if (
                key in self.model_fields_set
                and not there
                and getattr(self, key) != type(self).model_fields[key].default
            ):
                raise ValueError(f"{key} does nothing without {owner}")
        return self


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


class JudgeConfig(_Section):
    """A language model that ranks the rollouts of each group, as a reward (`agl train`)."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    """Base URL of an OpenAI-compatible server (ending in `/v1`)."""
    model: str
    """Its model."""
    key_env: str | None = None
    """Environment variable of its key."""
    criteria: str
    """What makes one rollout better than another, in words."""
    roles: list[str] = Field(default_factory=list)
    """Roles whose parts are ranked each by themselves; none: rollouts as a whole."""
    rankings: Count = 2
    """Rankings of each group, in orders of their own."""
    max_chars: Count = 8000
    """Longest text of a rollout, and of the task, that it is shown."""
    timeout_s: Positive = 120.0
    """For each of its answers."""


class Config(_Section):
    """The whole file."""

    store_uri: str = Field(default=DEFAULT_URI, validation_alias=AliasChoices("store_uri", "lightning_store_uri"))
    queue_uri: str | None = None
    """`redis://host:port`: a durable queue between receivers and the store."""
    rewards: dict[str, float] = Field(default_factory=dict)
    """Weight of each reward dimension in the scalar reward."""
    agent_roles: AgentRoles = Field(default_factory=AgentRoles)
    collector: CollectorConfig = Field(default_factory=CollectorConfig)
    queue: QueueConfig = Field(default_factory=QueueConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    train: TrainConfig | None = None
    sft: SftConfig | None = None
    judge: JudgeConfig | None = None

    @model_validator(mode="after")
    def _weighs_its_judge(self) -> Self:
        if self.judge is not None and self.rewards and "judge" not in self.rewards:
            raise ValueError("rewards has no weight for the dimension judge")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file. Raises ConfigError that names the file and every wrong key or value."""
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds {type(data).__name__}, expected a mapping of sections")
        return cls.parse(data, source=str(path))

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "configuration") -> Self:
        """Check `data`. Raises ConfigError that names `source` and every wrong key or value."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError("\n".join(f"{source}: {_say(item)}" for item in error.errors())) from error

    def require_train(self) -> TrainConfig:
        """The `train` section. Raises ConfigError where the file has none."""
        if self.train is None:
            raise ConfigError(
                "the configuration has no `train` section; this command needs train.model and train.agent"
            )
        return self.train

    def to_yaml(self) -> str:
        """The resolved tree as YAML that `load` reads back."""
        data = self.model_dump(mode="json", exclude_none=True)
        roles = data["agent_roles"].pop("roles")
        data["agent_roles"].update(roles)
        return yaml.safe_dump(data, sort_keys=False)


def _say(item: Any) -> str:
    """One pydantic error as a sentence with the path of the key."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{path}: {item['msg']} (got {item['input']!r})"
    known = _keys_beside(item["loc"])
    close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"{path}: unknown key; {hint}"


def _keys_beside(loc: tuple[str | int, ...]) -> list[str]:
    """Keys that the section holding `loc` knows."""
    section: type[BaseModel] = Config
    for part in (part for part in loc[:-1] if isinstance(part, str)):
        section = _SECTIONS.get(part, RoleConfig)
    return sorted(section.model_fields)


_SECTIONS: dict[str, type[BaseModel]] = {
    "agent_roles": AgentRoles,
    "collector": CollectorConfig,
    "tls": TlsConfig,
    "queue": QueueConfig,
    "gateway": GatewayConfig,
    "timeouts": TimeoutsConfig,
    "engines": UpstreamConfig,
    "engine": EngineConfig,
    "train": TrainConfig,
    "sft": SftConfig,
    "traces": SftTracesConfig,
    "judge": JudgeConfig,
}
