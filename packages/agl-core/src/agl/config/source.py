"""Reads a configuration file: YAML in which no key is given twice, and `${NAME}` for variables of the environment."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from agl.errors import ConfigError


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file. Raises ConfigError if it cannot be read, or gives a key of a mapping twice."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        place = f"{error.object[error.start : error.start + 1]!r} at byte {error.start}"
        raise ConfigError(f"{path} is not UTF-8 ({place}: {error.reason}); save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:  # Its own text quotes the line, in which a secret may be.
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path} is not valid YAML: {error.problem or error.context}{place}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that YAML allows and Python does not
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def expand_variables(data: Any, source: str) -> Any:
    """`data` with each `${NAME}` replaced by that environment variable. Raises ConfigError for unset ones."""
    if unset := list(_unset(data, "")):
        raise ConfigError("\n".join(f"{source}: {where}: the environment has no {name}" for where, name in unset))
    return _expand(data)


class _UniqueKeys(yaml.SafeLoader):
    """YAML would take the last of equal keys. Checked before `<<` adds keys, which the mapping's own may override."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"the key {key.value!r} is given twice, in lines {lines[name]} and {line}; remove one, or join them"
                )
            lines[name] = line
        return node


_VARIABLE = re.compile(r"\$\{(\w+)\}")


def _unset(data: Any, where: str) -> Iterator[tuple[str, str]]:
    """Path and name of each variable that the environment does not have."""
    if isinstance(data, str):
        yield from ((where, name) for name in _VARIABLE.findall(data) if name not in os.environ)
    elif isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _unset(value, f"{where}.{key}" if where else str(key))


def _expand(data: Any) -> Any:
    if isinstance(data, str):
        return _VARIABLE.sub(lambda found: os.environ[found[1]], data)
    if isinstance(data, dict):
        return {key: _expand(value) for key, value in data.items()}
    return [_expand(value) for value in data] if isinstance(data, list) else data
