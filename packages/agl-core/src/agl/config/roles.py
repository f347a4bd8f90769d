"""`agent_roles`: the roles of an agent, each with its own LoRA adapter."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from agl.config.section import Count, Fraction, Name, Section


class RoleConfig(Section):
    """One role, with its own LoRA adapter on its base model."""

    model: Name | None = None
    """The model of the section `models` that its adapter is on; not needed if there is only one."""
    lora_r: Count = 16
    """Rank of the role's adapter."""
    lora_alpha: Count = 32
    """Scale of the role's adapter."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that training passes zero."""
    lora_target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Linear layers with the adapter, by the ends of their names, e.g. `[q_proj, v_proj]`; not the output layer."""
    use_rslora: bool = False
    """Scale by `lora_alpha` / sqrt(`lora_r`) in place of `lora_alpha` / `lora_r` (arXiv 2312.03732)."""
    adapter: Name | None = None
    """Another role whose adapter this one shares, with that role's LoRA keys and `frozen`."""
    frozen: bool = False
    """The adapter samples but is not trained."""
    rewards: dict[str, float] = Field(default_factory=dict)
    """Weights of reward dimensions for this role, 0 for others; empty: the scalar reward as emitted."""

    @model_validator(mode="after")
    def _shares_or_has(self) -> Self:
        own = sorted(name for name in self.model_fields_set if name == "frozen" or "lora" in name)
        if self.adapter is not None and own:
            raise ValueError(f"a role that shares an adapter takes {', '.join(own)} from it; remove them")
        return self


class AgentRoles(Section):
    """The roles to train: each is a key in this section, beside `gamma` and `turn_gamma`."""

    gamma: Fraction = 0.85
    """Discount of a rollout's reward for each hand-off between roles after a call."""
    turn_gamma: Fraction = 1.0
    """Discount of a rollout's reward for each call after a call."""
    roles: dict[Name, RoleConfig] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_roles(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "roles" in data:
            return data
        factors = {name: data[name] for name in ("gamma", "turn_gamma") if name in data}
        return factors | {"roles": {name: role or {} for name, role in data.items() if name not in factors}}

    def owner_of(self, role: str) -> RoleConfig:
        """The role whose adapter `role` uses, which may be itself."""
        return self.roles[self.roles[role].adapter or role]

    @model_validator(mode="after")
    def _share_adapters(self) -> Self:
        for name, role in self.roles.items():
            owner = self.roles.get(role.adapter) if role.adapter else None
            if role.adapter and (owner is None or owner.adapter):
                known = ", ".join(other for other, config in self.roles.items() if not config.adapter)
                raise ValueError(
                    f"role {name} shares the adapter of {role.adapter!r}, expected a role with its own adapter: {known}"
                )
        return self
