"""`agent_roles`: the roles of an agent, each with its own LoRA adapter."""

from typing import Any, Self

from pydantic import Field, model_validator

from agl.config.section import Count, Fraction, Section


class RoleConfig(Section):
    """One role, with its own LoRA adapter on the shared base model."""

    lora_r: Count = 16
    lora_alpha: Count = 32
    adapter: str | None = None
    """Another role whose adapter this one shares, with that role's `lora_r`, `lora_alpha` and `frozen`."""
    frozen: bool = False
    """The adapter is used but not trained."""
    rewards: dict[str, float] = Field(default_factory=dict)
    """Weights of reward dimensions for this role, 0 for others; empty: the scalar reward as emitted."""

    @model_validator(mode="after")
    def _shares_or_has(self) -> Self:
        if self.adapter is not None and self.model_fields_set & {"lora_r", "lora_alpha", "frozen"}:
            raise ValueError("a role that shares an adapter takes lora_r, lora_alpha and frozen from it; remove them")
        return self


class AgentRoles(Section):
    """The roles to train: each is a key in this section, beside `gamma` and `turn_gamma`."""

    gamma: Fraction = 0.85
    """Discount per hand-off between roles from a call to the reward."""
    turn_gamma: Fraction = 1.0
    """Discount per call from a call to the reward."""
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
                    f"role {name} shares the adapter of {role.adapter!r}, expected a role with its own adapter: {known}"
                )
        return self
