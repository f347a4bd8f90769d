"""Imports functions that the configuration names as `module:function`."""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from agl.errors import ConfigError


def load_function(reference: str | None, key: str) -> Callable[..., Any]:
    """Import the function `reference` (`module:function`), from the current folder or `sys.path`.

    `key` is the configuration key of the reference, for messages. Raises ConfigError if `reference` is None or
    malformed, the module does not exist or its import fails, or the attribute is missing or not callable.
    """
    if reference is None:
        raise ConfigError(f"{key} is not set; name a function as module:function")
    where = f"{key}: {reference}"
    module_name, separator, name = reference.partition(":")
    if not (module_name and separator and name):
        raise ConfigError(f"{where} is not of the form module:function")
    module = _import(module_name, where)
    function = getattr(module, name, None)
    if function is None:
        raise ConfigError(f"{where}: {module.__file__} defines no {name!r}")
    if not callable(function):
        raise ConfigError(f"{where} is a {type(function).__name__}, expected a function")
    return function


def _import(name: str, where: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{where}: there is no module {error.name!r} in {folder} or on sys.path") from error
        raise ConfigError(f"{where}: importing {name} needs {error.name!r}, which is not installed") from error
    except (Exception, SystemExit) as error:  # the module is the user's: show any error of it
        raise ConfigError(f"{where}: importing {name} raised {type(error).__name__}: {error}") from error
