"""What a training wants of a cluster: its processes, with their commands and variables."""

import math
from dataclasses import dataclass
from typing import Any

import yaml

from agl.config import RayConfig
from agl.config.collector import TOKEN_VARIABLE
from agl.errors import ConfigError
from agl_trainer.cluster.worker import CONFIG, Address, Job

_OWN_KEYS = ("runners", "host", "port", "otlp_http_port")
"""Keys of `train` that the cluster decides."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A training on a cluster. `config` is the content of its file, in which variables are not replaced yet."""

    name: str
    config: dict[str, Any]
    ray: RayConfig
    output_dir: str
    concurrency: int
    folder: str
    """The folder that the command runs in."""
    token: str
    """Empty: all processes are on one machine, and servers listen on loopback."""
    options: tuple[str, ...] = ()
    """Of `agl train`."""

    def check(self) -> None:
        """Raises ConfigError if `train` has a key that the cluster decides, or it cannot train `models`."""
        if own := [key for key in _OWN_KEYS if key in self.config["train"]]:
            raise ConfigError(f"--on ray decides train.{own[0]}: remove it; `ray.runners` is the number of runners")

        if self.processes > 1 and self.config.get("models"):
            raise ConfigError(
                "several processes train one base model, and `models` names several: set ray.trainer.devices to 1 or 0"
            )

    @property
    def processes(self) -> int:
        """Number of processes that train."""
        return max(1, self.ray.trainer.devices)

    def bundle(self) -> dict[str, float]:
        """Resources of a process that trains."""
        return {"CPU": self.ray.trainer.cpus} | ({"GPU": 1.0} if self.ray.trainer.devices else {})

    def check_room(self, has: dict[str, float]) -> None:
        """Raises ConfigError if a cluster that has these resources in all can never run the plan."""
        runners, gpus = self.ray.runners, self.ray.trainer.devices
        if gpus > has.get("GPU", 0):
            raise ConfigError(
                f"ray.trainer.devices asks for {gpus} GPUs, and the Ray cluster has {has.get('GPU', 0):g}: set "
                "ray.trainer.devices: 0 to train on CPUs, or add a machine with GPUs to the cluster"
            )
        cpus = self.processes * self.ray.trainer.cpus + runners.count * runners.cpus
        if cpus > has.get("CPU", 0):
            raise ConfigError(
                f"ray.trainer and ray.runners ask for {cpus:g} CPUs, and the Ray cluster has {has.get('CPU', 0):g}: "
                "lower ray.runners.count, ray.runners.cpus or ray.trainer.cpus, or add a machine to the cluster"
            )

    def trainer_job(self, rank: int, address: Address) -> Job:
        """The process `rank` of the training, which serves at `address`."""
        servers = {"host": address.host, "port": address.api_port, "otlp_http_port": address.otlp_port}
        config = self.config | {"train": self.config["train"] | servers | {"runners": "external"}}
        return Job(("train", CONFIG, *self.options), yaml.safe_dump(config), self._variables(rank, address))

    def runner_job(self, run: str, address: Address) -> Job:
        """A runner of `run`, whose training serves at `address`."""
        options = {
            "--store": address.api_url,
            "--collector": address.otlp_url,
            "--run": run,
            "--concurrency": str(math.ceil(self.concurrency / self.ray.runners.count)),
        }
        words = ("runner", CONFIG, *(word for option in options.items() for word in option))
        return Job(words, yaml.safe_dump(self.config), self._token())

    def _variables(self, rank: int, address: Address) -> dict[str, str]:
        """Those of torchrun, if there are several processes. Ray shows each process its own GPU only."""
        if self.processes == 1:
            return self._token()
        return self._token() | {
            "MASTER_ADDR": address.host,
            "MASTER_PORT": str(address.meeting_port),
            "WORLD_SIZE": str(self.processes),
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
        }

    def _token(self) -> dict[str, str]:
        return {TOKEN_VARIABLE: self.token} if self.token else {}
