"""The verbs of `agl.store.protocol.Store` over HTTP: one table for server, client and OpenAPI document.

A verb's signature in the protocol defines arguments and result. Both are JSON (`{"result": ...}`, bytes in base64url),
spans of one rollout OTLP protobuf.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any, Final, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from agl.errors import DamageError, InputError, StoreError, TransitionError, UnknownIdError
from agl.store.protocol import Store
from agl.store.span_row import MAX_SPANS, parse

PREFIX: Final = "/api/v1"
JSON: Final = "application/json"
PROTOBUF: Final = "application/x-protobuf"

MAX_WAIT_S: Final = 20.0
"""Limit for one request of a verb that waits, because proxies close silent connections; the caller repeats it."""

INVALID: Final = "invalid"
UNAVAILABLE: Final = "unavailable"
ERRORS: Final[Mapping[str, tuple[int, type[StoreError]]]] = {
    "unknown_id": (404, UnknownIdError),
    "refused_transition": (409, TransitionError),
    INVALID: (422, InputError),
    "damaged": (500, DamageError),
    UNAVAILABLE: (503, StoreError),
}
"""Code of an error to its HTTP status, and to the exception that the client raises."""

# Metrics may be NaN, which strict JSON cannot express.
_CONFIG = ConfigDict(
    extra="forbid",
    ser_json_inf_nan="strings",
    ser_json_bytes="base64",
    val_json_bytes="base64",
    use_attribute_docstrings=True,
)


class VerbResult(BaseModel):
    """The JSON response of a verb."""

    model_config = ConfigDict(
        ser_json_inf_nan="strings", ser_json_bytes="base64", val_json_bytes="base64", use_attribute_docstrings=True
    )

    result: Any


@dataclass(frozen=True)
class Verb:
    """One verb. A GET takes its arguments from the query, a POST from a JSON object."""

    name: str
    method: Literal["GET", "POST"] = "POST"
    is_repeatable: bool = True
    """Whether a caller that got no response may repeat the verb, which may have been performed."""
    path_name: str = ""
    takes_spans: bool = False
    returns_spans: bool = False

    @property
    def path(self) -> str:
        return f"{PREFIX}/{self.path_name or self.name}"

    @property
    def content_type(self) -> str:
        """Content type of the request body."""
        return PROTOBUF if self.takes_spans else JSON

    @property
    def waits(self) -> bool:
        return "timeout_s" in signature(self.function).parameters

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The method of the protocol."""
        return getattr(Store, self.name)

    @cached_property
    def arguments(self) -> type[BaseModel]:
        """Model with a field for each argument."""
        hints, parameters = get_type_hints(self.function), list(signature(self.function).parameters.values())[1:]
        fields: dict[str, Any] = {
            p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in parameters
        }
        return create_model(self._camel("Arguments"), __config__=_CONFIG, **fields)

    @cached_property
    def result(self) -> type[VerbResult]:
        """Model whose `result` has the return type of the verb."""
        hint = get_type_hints(self.function)["return"]
        return create_model(self._camel("Answer"), __base__=VerbResult, result=(hint, Field()))

    def write_arguments(self, arguments: Mapping[str, Any]) -> bytes | dict[str, str]:
        """Request body of a POST, or query of a GET. Raises InputError for values that JSON cannot express."""
        try:
            written = self.arguments(**arguments).model_dump_json(exclude_none=self.method == "GET", warnings=False)
        except (ValueError, RecursionError) as error:  # By validation, serialization, or half a surrogate pair.
            raise InputError(f"{self.name} cannot take these arguments: {error}") from error
        return written.encode() if self.method == "POST" else {n: str(v) for n, v in json.loads(written).items()}

    def read_arguments(self, sent: bytes | Mapping[str, str]) -> dict[str, Any]:
        """Arguments from a request body or a query. Raises InputError or OtlpError if they are invalid."""
        model = self.arguments
        try:
            if not isinstance(sent, bytes):
                given = model.model_validate(dict(sent))
            elif self.takes_spans:
                return {"rows": parse(sent, MAX_SPANS).all_rows()}
            else:
                given = model.model_validate_json(sent)
        except ValidationError as error:
            raise InputError(f"{self.name}: {_describe(error)}") from error
        return {name: getattr(given, name) for name in model.model_fields}

    def write_result(self, result: Any) -> bytes:
        if self.returns_spans:
            return b"".join(result)
        return self.result.model_construct(result=result).model_dump_json(warnings=False).encode()

    def read_result(self, response: bytes) -> Any:
        """The result in a JSON response. Raises StoreError if it is invalid."""
        try:
            return self.result.model_validate_json(response).result
        except ValidationError as error:
            raise StoreError(
                f"the response to {self.name} is of another version ({_describe(error)}); update agl-core on both sides"
            ) from error

    def _camel(self, suffix: str) -> str:
        return self.name.title().replace("_", "") + suffix


VERBS: Final = {
    verb.name: verb
    for verb in (
        Verb("append_rows", path_name="append_spans", takes_spans=True),
        Verb("query_rows", "GET", path_name="query_spans", returns_spans=True),
        Verb("query_rows_by_rollout"),
        Verb("count_spans", "GET"),
        Verb("last_rollout_id", "GET"),
        Verb("rollout_ids", "GET"),
        Verb("list_rollouts", "GET"),
        Verb("enqueue_rollouts"),
        # A repetition would lease a second rollout; the worker knows of one.
        Verb("lease_rollout", is_repeatable=False),
        Verb("heartbeat"),
        Verb("finish_attempt"),
        Verb("cancel_rollouts"),
        Verb("end_overdue_attempts"),
        Verb("wait_for_rollouts"),
        Verb("wait_for_group"),
        Verb("get_rollout", "GET"),
        Verb("get_rollouts"),
        Verb("query_rollouts", "GET"),
        Verb("query_attempts", "GET"),
        Verb("count_rollouts", "GET"),
        Verb("put_resource"),
        Verb("add_resource"),
        Verb("get_resource", "GET"),
        Verb("query_resources", "GET"),
        Verb("lease_resource"),
        Verb("release_resource"),
        # A repetition would return nothing; nobody would delete the files of the collected versions.
        Verb("collect_resources", is_repeatable=False),
        Verb("put_resource_part"),
        Verb("get_resource_part", "GET"),
        Verb("append_metrics"),
        Verb("query_metrics", "GET"),
        Verb("damaged_rows", "GET"),
        Verb("gc"),
    )
}


def _describe(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'the body'}: {item['msg']}" for item in found)
