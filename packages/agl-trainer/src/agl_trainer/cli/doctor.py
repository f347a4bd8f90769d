"""The check of `agl doctor` that the base model is available."""

from collections.abc import Iterator

from agl.cli.doctor import Check
from agl.config import Config
from agl.errors import ConfigError
from agl_trainer.model.model_folder import model_folder

_BUILT_BY_RUN = "tiny"


def check_model(config: Config) -> Iterator[Check]:
    """One check if the configuration has a `train` section; the first check of `smollm2` unpacks it."""
    if config.train is None:
        return
    name = config.train.model
    if name == _BUILT_BY_RUN:
        yield Check("model", f"{name} is made by the run that needs it")
        return
    try:
        yield Check("model", f"{name} in {model_folder(name, downloads=False)}")
    except ConfigError as error:
        yield Check("model", f"{name} is not there", str(error))
