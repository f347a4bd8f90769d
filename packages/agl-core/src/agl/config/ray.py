"""`ray`: what a training gets of a Ray cluster (`agl train --on ray`)."""

from typing import Annotated

from pydantic import Field

from agl.config.section import Count, Positive, Section


class RayRunnersConfig(Section):
    """The processes that run the agents, each in an actor of its own."""

    count: Count = 2
    """Number of runners; they share `train.concurrency`."""
    cpus: Positive = 0.5
    """CPUs that Ray reserves for each, which may be a fraction."""


class RayTrainerConfig(Section):
    """The processes that train, which Ray places as close together as it can (PACK)."""

    devices: Annotated[int, Field(ge=0)] = 0
    """GPUs, with a process for each; 0: one process on CPUs."""
    cpus: Positive = 1.0
    """CPUs that Ray reserves for each process."""


class RayConfig(Section):
    """What `agl train --on ray` starts."""

    runners: RayRunnersConfig = Field(default_factory=RayRunnersConfig)
    trainer: RayTrainerConfig = Field(default_factory=RayTrainerConfig)
