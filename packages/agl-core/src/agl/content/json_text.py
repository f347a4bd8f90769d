"""Content as JSON text: messages, tool definitions, arguments and results that the plug-ins put on spans."""

import json
from collections.abc import Callable
from typing import Any

import orjson

_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


def content_json(value: Any, default: Callable[[Any], Any] = str) -> str:
    """`value` as compact JSON. `default` converts objects that JSON has no form for; NaN and infinity become null.

    orjson, because this runs for each message of each model call and `json` takes ten times as long.
    """
    try:
        return orjson.dumps(value, default, _OPTIONS).decode()
    except TypeError:  # a lone surrogate, an integer beyond 64 bits, or a key that is not a string
        return json.dumps(value, separators=(",", ":"), default=default)
