"""The policy: one frozen base model with one LoRA adapter per role.

The in-process engine samples from the same modules that the trainer updates; `lock` serializes the two. On a CPU,
sampling keeps a second, repacked copy of the frozen weights (`cpu.frozen_linear`), but none of the adapters.
"""

import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agl.config import RoleConfig
from agl.errors import ConfigError, TrainingError
from agl.seeds import derive
from agl_trainer.model.attention import NAME, AttentionPlan
from agl_trainer.model.compiled import compile_layers
from agl_trainer.model.cpu.frozen_linear import FrozenLinear
from agl_trainer.model.cpu.fused_decoder import FusedDecoder, can_be_fused
from agl_trainer.model.device import wide_product
from agl_trainer.model.lora import BASE, AdapterRouting, route_layers
from agl_trainer.model.recompute import recompute_layers
from agl_trainer.model.sharding import shard_layers


class Policy:
    """Base model with an adapter for each role (or one that several roles share), and each role's version number."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        roles: Mapping[str, RoleConfig],
        *,
        base_name: str,
        seed: int,
        packs: bool = True,
        recomputes: bool = False,
        compiles: bool = False,
        shards: bool = False,
    ) -> None:
        """`recomputes`: the backward pass recomputes activations. `compiles`: training passes run compiled layers.
        `shards`: the layers of `model`, which is on the CPU, are sharded over several devices.

        Raises ConfigError for invalid role names, and for options that the model or this machine does not support.
        """
        _check_names(roles, base_name)
        self.packs = packs
        """Rows are packed as a prefix tree; if False, they are padded because the model does not support packing."""
        self.pack_limit: int | None = None
        """Tokens per pass that fit the memory, if `train.pack_tokens` is not set or did not fit."""
        self.token_bytes = _token_bytes(model, recomputes)
        if packs:
            model.set_attn_implementation(NAME)
        self.tokenizer = tokenizer
        self.base_name = base_name
        self.versions = dict.fromkeys(roles, 0)
        self._owner = {role: config.adapter or role for role, config in roles.items()}
        self.lock = threading.RLock()
        self._peft = _with_adapters(model, {role: config for role, config in roles.items() if not config.adapter}, seed)
        self._routing = AdapterRouting()
        route_layers(self._peft, self._routing)
        self._body = model.get_decoder()
        self.is_sharded = shards
        """Every pass needs all devices, see `sharding`."""
        drops = any(config.lora_dropout for config in roles.values())
        self._prepare_layers(recomputes=recomputes, compiles=compiles, drops=drops)
        self._can_be_fused = can_be_fused(self._body)
        self._fused: FusedDecoder | None = None
        self.vocabulary_size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]  # typed Module
        """Tokens that have an embedding; the tokenizer may know fewer or, if it is of another model, more."""
        output = model.get_output_embeddings()
        self.output_weight: Tensor = output.weight  # type: ignore[assignment]  # typed Module
        self.output_softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        """Logits become softcap * tanh(logit / softcap)."""
        self._output = FrozenLinear(output)
        self.config = model.config

    def _prepare_layers(self, *, recomputes: bool, compiles: bool, drops: bool) -> None:
        if self.is_sharded:
            shard_layers(self._peft, self._body)
        if compiles:  # after sharding, which decides the device
            compile_layers(self._body)
        if recomputes:
            recompute_layers(self._body, self._routing, drops=drops)

    @property
    def roles(self) -> list[str]:
        return list(self.versions)

    @property
    def adapters(self) -> dict[str, list[str]]:
        """Each role that owns an adapter, with all the roles that use it."""
        found: dict[str, list[str]] = {}
        for role, owner in self._owner.items():
            found.setdefault(owner, []).append(role)
        return found

    @property
    def device(self) -> torch.device:
        return self.output_weight.device

    def hidden_states(self, tokens: Tensor, positions: Tensor, adapters: Sequence[str], plan: AttentionPlan) -> Tensor:
        """Final hidden states [N, H] for N tokens at `positions`.

        `adapters` names one adapter for all tokens, or one per token, with the tokens of an adapter adjacent.
        """
        self._route(adapters)
        # Clone: torch.compile guards on whether `positions` is a view and would recompile.
        inputs = {"input_ids": tokens[None], "position_ids": positions.clone()[None]}
        return self._body(**inputs, use_cache=False, plan=plan).last_hidden_state[0]

    def sampled_states(self, tokens: Tensor, positions: Tensor, adapters: Sequence[str], plan: AttentionPlan) -> Tensor:
        """As `hidden_states`, for sampling: without gradients, and faster if the decoder can be fused."""
        if not self._can_be_fused:
            return self.hidden_states(tokens, positions, adapters, plan)
        self._route(adapters)
        self._fused = self._fused or FusedDecoder(self._body)
        return self._fused(tokens, positions, plan)

    def padded_states(self, tokens: Tensor, lengths: Sequence[int], role: str) -> Tensor:
        """Final hidden states [B * T, H] of B rows of `lengths`, right-padded to T, by the model's own attention."""
        rows = tokens.view(len(lengths), -1)
        self._route([role])
        mask = torch.arange(rows.shape[1], device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None]
        inputs = {"input_ids": rows, "attention_mask": mask.long()}
        return self._body(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V], in float32 or wider, for final hidden states [N, H]; without gradients."""
        if self.output_weight.dtype.itemsize < torch.float32.itemsize:
            return wide_product(hidden, self.output_weight)
        return self._output(hidden)

    def _route(self, adapters: Sequence[str]) -> None:
        self._routing.set([BASE if adapter == BASE else self._owner[adapter] for adapter in adapters])

    def parameters(self, role: str) -> list[torch.nn.Parameter]:
        """The LoRA matrices of `role`, in a fixed order."""
        owner = self._owner[role]
        ends = (f".lora_A.{owner}.weight", f".lora_B.{owner}.weight")
        return [parameter for name, parameter in self._peft.named_parameters() if name.endswith(ends)]

    def adapter(self, role: str) -> dict[str, Tensor]:
        """Tensors of the adapter of `role`, by the names that PEFT saves them under (without the role)."""
        state = get_peft_model_state_dict(self._peft, adapter_name=self._owner[role])
        return {name: tensor.detach().contiguous() for name, tensor in state.items()}

    def adapter_config(self, role: str) -> dict[str, object]:
        """Content of `adapter_config.json` for `role`."""
        config = self._peft.peft_config[self._owner[role]].to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}

    def load_adapter(self, role: str, adapter: Mapping[str, Tensor], version: int) -> None:
        """Replace the adapter of `role` by saved weights of `version`. Raises TrainingError if the shapes differ."""
        got = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self.adapter(role).items()}
        if got != expected:
            name = next(name for name in expected | got if got.get(name) != expected.get(name))
            raise TrainingError(
                f"the saved adapter of role {role!r} does not fit: {name} is {got.get(name, 'missing')}, expected "
                f"{expected.get(name, 'no such tensor')}; was it trained with another lora_r or base model?"
            )
        set_peft_model_state_dict(self._peft, dict(adapter), adapter_name=self._owner[role])
        self.versions[role] = version

    @contextmanager
    def replaced_adapter(self, role: str, adapter: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which `role` has the weights `adapter`; its own are back afterwards, bit by bit."""
        own = {name: tensor.clone() for name, tensor in self.adapter(role).items()}
        self.load_adapter(role, adapter, self.versions[role])
        try:
            yield
        finally:
            self.load_adapter(role, own, self.versions[role])

    def version_name(self, adapter: str) -> str:
        """`<role-or-model>@<n>`."""
        return f"{self.base_name}@0" if adapter == BASE else f"{adapter}@{self.versions[adapter]}"


def _check_names(roles: Mapping[str, RoleConfig], base_name: str) -> None:
    if base_name in roles:
        raise ConfigError(f"agent_roles has a role named {base_name!r} like the base model; give it another name")
    for role in roles:
        # Besides what the configuration checks: a role names a torch submodule, which must not hide a method.
        if not re.fullmatch(r"[^\W_][\w-]*", role) or hasattr(torch.nn.ModuleDict, role):
            raise ConfigError(
                f"agent_roles has a role named {role!r}: expected a letter or digit, then letters, digits, _ and -, "
                "and not a method of dict or torch.nn.Module"
            )


def _token_bytes(model: PreTrainedModel, recomputes: bool) -> int:
    """Estimated memory of the activations of one token of a training pass.

    Twice the inputs and outputs of all linear layers, which also covers norms, rotations and products of activations;
    half of that with `recomputes`.
    """
    layers = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    values = sum(layer.in_features + layer.out_features for layer in layers)
    return values * model.dtype.itemsize * (1 if recomputes else 2)


def _target_modules(model: PreTrainedModel, role: str, config: RoleConfig) -> str | list[str]:
    """`lora_target_modules` of `role`. Raises ConfigError for a name that no linear layer of the decoder ends in."""
    wanted = config.lora_target_modules
    layers = [name for name, module in model.get_decoder().named_modules() if isinstance(module, torch.nn.Linear)]
    for name in [] if isinstance(wanted, str) else wanted:
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
            raise ConfigError(
                f"agent_roles.{role}.lora_target_modules: {name!r} is no linear layer of a {model.config.model_type} "
                f"model; expected all-linear, or some of {known}"
            )
    return wanted


def _with_adapters(model: PreTrainedModel, roles: Mapping[str, RoleConfig], seed: int) -> PeftModel:
    """Each adapter is initialised by a seed of its own, so that it does not depend on the other roles."""
    configs = {
        role: LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            target_modules=_target_modules(model, role, config),
            task_type="CAUSAL_LM",
        )
        for role, config in roles.items()
    }
    # PEFT's layers need an adapter; without roles it has the name of the base model, and no token is routed to it.
    (first, config), *others = (configs or {BASE: LoraConfig(r=1, target_modules="all-linear")}).items()
    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers has renamed; the user cannot do anything about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(derive(seed, "adapter", first))
        try:
            peft = get_peft_model(model, config, adapter_name=first)
            for role, other in others:
                torch.manual_seed(derive(seed, "adapter", role))
                peft.add_adapter(role, other)
        except ValueError as error:
            raise ConfigError(
                f"PEFT cannot add these adapters to a {model.config.model_type} model; name other layers "
                f"in lora_target_modules of the roles, or choose another model: {error}"
            ) from error
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return peft.eval()  # type: ignore[return-value]  # get_peft_model's annotation is wider than what it returns
