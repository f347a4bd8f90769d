"""Opens the policy of a configuration: the base model, built first if it is tiny, with fresh adapters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from agl.config import Base, Config, TrainConfig
from agl.errors import ConfigError
from agl_trainer.compute.devices import device_count
from agl_trainer.model.base_model import (
    check_lengths,
    check_sampled,
    check_trainable,
    load_model,
    use_bfloat16_products,
)
from agl_trainer.model.device import best_device
from agl_trainer.model.fingerprint import fingerprint
from agl_trainer.model.model_folder import TINY, load_pretrained, model_folder
from agl_trainer.model.packing_probe import supports_packing
from agl_trainer.model.policies import Policies
from agl_trainer.model.policy import Policy
from agl_trainer.model.tiny import build_tiny_model
from agl_trainer.rollout.task_list import load_list


def open_policy(config: Config, base: Base, *, samples: bool = False) -> Policy:
    """`base` with fresh adapters. Raises ConfigError if it cannot be trained or, with `samples`, sampled."""
    train = config.require_train()
    disable_progress_bar()  # it would disturb the progress of the training
    shards = is_sharded(train) and not samples
    folder, longest = base_folder(config, base), base.engine.max_model_len
    try:
        model, tokenizer = load_model(folder, _device(base), on_cpu=shards, in_4bit=train.load_in_4bit)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{base.key} {base.path!r}: transformers cannot load {folder}: {error}") from error
    _set_chat_template(tokenizer, base)
    check_trainable(model)
    check_lengths(model.config, longest)
    packs = supports_packing(model)
    if samples:
        check_sampled(model.config, longest, packs=packs)
    if train.bf16:
        use_bfloat16_products(model)
    return Policy(
        model,
        tokenizer,
        base.roles,
        base_name=base.name,
        seed=train.seed,
        packs=packs,
        recomputes=train.gradient_checkpointing,
        compiles=train.compile,
        shards=shards,
    )


def _device(base: Base) -> torch.device | None:
    """The accelerator of `base`, if the configuration names one. Raises ConfigError if it is not there."""
    count = torch.accelerator.device_count()
    if base.device is None:
        return None
    if base.device >= count:
        has = f"the accelerators 0 to {count - 1}" if count else "no accelerator"
        raise ConfigError(f"models.{base.name}.device is {base.device}, and this machine has {has}")
    return torch.device(best_device().type, base.device)


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, base: Base) -> None:
    if base.chat_template is not None:
        try:
            tokenizer.chat_template = Path(base.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            message = f"{base.template_key}: cannot read {base.chat_template}: {error.strerror}"
            raise ConfigError(message) from error
    elif tokenizer.chat_template is None:
        raise ConfigError(
            f"{base.key} {base.path!r} has no chat template, so no messages can be written for it; set "
            f"{base.template_key} to a Jinja file, or choose the instruct version of the model"
        )


def is_sharded(train: TrainConfig) -> bool:
    """Whether the training policy is sharded across several devices."""
    return train.fsdp and device_count() > 1


def base_folder(config: Config, base: Base) -> Path:
    """The folder of `base`; a tiny model is built if it does not exist. Raises ConfigError."""
    train = config.require_train()
    if base.path != TINY:
        return model_folder(base.path, base.key)
    folder = Path(train.output_dir) / f"{base.prefix}model"
    if not folder.exists():
        build_tiny_model(folder, _texts(config, train), train.seed)
    return folder


def fingerprint_of(config: Config, base: Base) -> dict[str, str]:
    """Fingerprint of `base` on this machine, without its weights in memory. Raises ConfigError."""
    folder = base_folder(config, base)
    tokenizer = load_pretrained(AutoTokenizer, folder)
    _set_chat_template(tokenizer, base)
    return fingerprint(folder, tokenizer)


def fingerprints(config: Config, policies: Policies) -> dict[str, str]:
    """`fingerprint` of each base model. Of several, the names of its parts begin with that of the model."""
    return {
        f"{base.prefix}{part}": digest
        for base, policy in zip(config.bases(), policies, strict=True)
        for part, digest in fingerprint(base_folder(config, base), policy.tokenizer).items()
    }


def _texts(config: Config, train: TrainConfig) -> Iterator[str]:
    """All strings in tasks and examples, to train the tokenizer of a tiny model on."""
    if train.tasks is not None or config.sft is None:
        yield from _strings(load_list(train.tasks, "train.tasks"))
    if config.sft is not None and config.sft.examples is not None:
        yield from _strings(load_list(config.sft.examples, "sft.examples"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
