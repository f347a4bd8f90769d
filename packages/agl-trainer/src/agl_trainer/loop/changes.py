"""What has changed in a configuration since its last checkpoint, and which changes a resumed training accepts."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from agl.config import Config
from agl.errors import ConfigError, TrainingError
from agl_trainer.loop.checkpoint import Checkpoint
from agl_trainer.loop.state import GRPO, SFT

FIXED = frozenset(
    {
        "rewards",
        "agent_roles.gamma",
        "agent_roles.turn_gamma",
        "agent_roles.<role>.lora_r",
        "agent_roles.<role>.lora_alpha",
        "agent_roles.<role>.lora_target_modules",
        "agent_roles.<role>.use_rslora",
        "agent_roles.<role>.adapter",
        "agent_roles.<role>.model",
        "agent_roles.<role>.frozen",
        "agent_roles.<role>.rewards",
        "train.seed",
        "train.load_in_4bit",
    }
)
"""Keys that define what is trained. A key stands for those below it."""

FIXED_IN = {
    SFT: frozenset({"sft.examples", "sft.traces"}),
    GRPO: frozenset(
        {
            "train.algorithm",
            "train.agent",
            "train.command",
            "train.tasks",
            "train.traces",
            "train.reward",
            "train.failed_reward",
            "train.shuffle",
            "train.asynchronous",
            "train.advantage",
            "train.loss",
            "train.normalization",
            "train.importance_sampling_level",
        }
    ),
}
"""Phase to keys that define what it trains on; they may change as long as it has not begun."""

STEERING = frozenset(
    {
        "store_uri",
        "queue_uri",
        "collector",
        "queue",
        "ray",
        "gateway",
        "server",
        "canary",
        "sampling",
        "judge",
        "engine.kind",
        "engine.launch",
        "engine.lease_s",
        "engine.key_env",
        "engine.max_batch",
        "engine.max_model_len",
        "engine.tolerance",
        "sft.epochs",
        "sft.batch_size",
        "sft.learning_rate",
        "models.<name>.engine",
        "models.<name>.path",  # another name of the same model; the fingerprint tells models apart
        "models.<name>.chat_template",
        "models.<name>.device",
        "train.model",  # as models.<name>.path
        "train.min_reward",
        "train.eval_tasks",
        "train.chat_template",  # as the name of the model
        "train.instrument",
        "train.group_size",
        "train.groups_per_step",
        "train.minibatches",
        "train.steps",
        "train.dynamic_sampling",
        "train.eval_every",
        "train.early_stop",
        "train.stop_after_empty_steps",
        "train.alternate_steps",
        "agent_roles.<role>.lora_dropout",
        "train.learning_rate",
        "train.lr_scheduler_type",
        "train.warmup_steps",
        "train.warmup_ratio",
        "train.weight_decay",
        "train.adam_beta1",
        "train.adam_beta2",
        "train.temperature",
        "train.sampling",
        "train.eval_temperature",
        "train.max_tokens",
        "train.max_grad_norm",
        "train.pack_tokens",
        "train.concurrency",
        "train.max_memory_mb",
        "train.runners",
        "train.unresponsive_s",
        "train.host",
        "train.port",
        "train.otlp_http_port",
        "train.timeout_s",
        "train.engine_retries",
        "train.bf16",
        "train.gradient_checkpointing",
        "train.fsdp",
        "train.compile",
        "train.deterministic",
        "train.output_dir",
        "train.report_to",
        "train.scale_rewards",
        "train.max_at_k",
        "train.ema_decay",
        "train.epsilon",
        "train.epsilon_high",
        "train.delta",
        "train.beta",
        "train.reference",
        "train.use_bias_correction_kl",
        "train.entropy_coef",
        "train.top_entropy_quantile",
        "train.mask_truncated_completions",
        "train.overlong_buffer",
        "train.overlong_penalty",
        "train.off_policy_mask_threshold",
        "train.importance_sampling_mode",
        "train.importance_sampling_clip_max",
        "train.importance_sampling_clip_min",
        "train.max_staleness",
        "train.logprobs_mode",
        "train.sapo_temperature_pos",
        "train.sapo_temperature_neg",
        "train.vespo_k_pos",
        "train.vespo_lambda_pos",
        "train.vespo_k_neg",
        "train.vespo_lambda_neg",
    }
)
"""Keys that say how the training goes on: a change is applied, and named when the training resumes."""


@dataclass(frozen=True, slots=True)
class Change:
    """A key with its value in the checkpoint, and the value given now; None: not set."""

    key: str
    saved: Any
    given: Any
    fixed_in: str | None
    """The phase that refuses the change, `ANY` for all; None: it is applied."""

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.saved)} -> {_shown(self.given)}"


ANY = "any"
_NAMED = {"agent_roles": "<role>", "models": "<name>"}
"""Sections that hold sections of any name, and what stands for the name in the keys above."""


def changes_since(checkpoint: Checkpoint, config: Config, base: Mapping[str, str]) -> list[Change]:
    """Changes of the configuration, and of the base models' fingerprints `base`, since `checkpoint`.

    Raises TrainingError if the checkpoint's configuration has keys that this version does not know.
    """
    try:
        saved = Config.parse(yaml.safe_load(checkpoint.config), "the checkpoint's configuration")
    except ConfigError as error:
        raise TrainingError(f"another version of agl wrote the checkpoint: {error}") from error
    changes = list(_base_changes(checkpoint, saved, config, base))
    differing = {change.key.partition(" ")[0] for change in changes}
    changes += _role_changes(saved, config)
    kept = saved.agent_roles.roles.keys() & config.agent_roles.roles.keys()
    one, other = _leaves(saved, kept), _leaves(config, kept)
    for key in one | other:
        if one.get(key) != other.get(key) and key not in differing:
            changes.append(Change(key, one.get(key), other.get(key), phase_of(key)))
    return changes


def phase_of(key: str) -> str | None:
    """The phase that refuses a change of `key`, `ANY` for all, or None. Raises KeyError if it is not classified."""
    parts = key.split(".")
    if parts[0] in _NAMED and len(parts) > 2:
        parts[1] = _NAMED[parts[0]]
    above = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    if above & FIXED:
        return ANY
    for phase, keys in FIXED_IN.items():
        if above & keys:
            return phase
    if above & STEERING:
        return None
    raise KeyError(key)


def listed(changes: Iterable[Change]) -> str:
    return ", ".join(map(str, changes))


def _base_changes(
    checkpoint: Checkpoint, saved: Config, given: Config, fingerprints: Mapping[str, str]
) -> Iterator[Change]:
    """Base models that are others than those of the checkpoint."""
    before = {base.key: base.path for base in saved.bases()}
    for base in given.bases():
        parts = (part for part in fingerprints if part.rpartition(".")[0] == base.prefix.removesuffix("."))
        differing = [part for part in parts if fingerprints[part] != checkpoint.base.get(part)]
        if differing:
            names = ", ".join(part.rpartition(".")[2] for part in differing)
            yield Change(f"{base.key} ({names} differ)", before.get(base.key), base.path, ANY)


def _role_changes(saved: Config, given: Config) -> list[Change]:
    before, after = saved.agent_roles.roles, given.agent_roles.roles
    if before.keys() == after.keys():
        return []
    return [Change("the names in agent_roles", ", ".join(before), ", ".join(after), ANY)]


def _leaves(config: Config, roles: Collection[str]) -> dict[str, Any]:
    """Dotted key to value of everything that is set; of the roles only `roles`."""
    data = config.model_dump(mode="json", exclude_none=True)
    named = data["agent_roles"].pop("roles")
    data["agent_roles"] |= {role: named[role] for role in named if role in roles}
    return dict(_flattened(data, ""))


def _flattened(value: Any, key: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, item in value.items():
        yield from _flattened(item, f"{key}.{name}" if key else str(name))


def _shown(value: Any) -> str:
    return "(not set)" if value is None else str(value)
