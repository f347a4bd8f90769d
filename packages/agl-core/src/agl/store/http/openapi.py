"""The OpenAPI document of the verbs."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from inspect import getdoc
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from agl.store.http.verb import ERRORS, JSON, MAX_WAIT_S, PROTOBUF, VERBS, Verb

Schema = dict[str, Any]

_REF: Final = "#/components/schemas/{model}"
_SPANS: Final[Schema] = {
    PROTOBUF: {"schema": {"type": "string", "format": "binary", "description": "OTLP ExportTraceServiceRequest"}}
}
_TOKEN: Final[Schema] = {"type": "http", "scheme": "bearer"}
_ERROR: Final[Schema] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "code"],
            "properties": {
                "message": {"type": "string"},
                "code": {"type": "string", "examples": list(ERRORS)},
                "type": {"type": "string"},
                "param": {"type": "null"},
            },
        }
    },
}


@cache
def document() -> Schema:
    """The OpenAPI 3.1 document as a JSON value."""
    schemas, definitions = _schemas()
    return {
        "openapi": "3.1.0",
        "info": {"title": "Agent training store", "version": version("agl-core"), "description": _about()},
        "security": [{"token": []}, {}],
        "paths": {verb.path: {verb.method.lower(): _operation(verb, schemas)} for verb in VERBS.values()},
        "components": {"schemas": definitions | {"Error": _ERROR}, "securitySchemes": {"token": _TOKEN}},
    }


def _about() -> str:
    final = ", ".join(f"{status} {code}" for code, (status, _) in ERRORS.items())
    return (
        f"The verbs of the store. Errors: {final}; a request that gets 503 may be repeated after Retry-After seconds. "
        f"A verb that waits responds within {MAX_WAIT_S:g} s; repeat it while rollouts are not over."
    )


def _schemas() -> tuple[Mapping[tuple[str, JsonSchemaMode], Schema], Schema]:
    """Schemas of the arguments ("validation") and the result ("serialization") of each verb, and the shared ones."""
    wanted: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = []
    for verb in VERBS.values():
        if verb.method == "POST" and not verb.takes_spans:
            wanted.append((verb.name, "validation", TypeAdapter(verb.arguments)))
        if not verb.returns_spans:
            wanted.append((verb.name, "serialization", TypeAdapter(verb.result)))
    schemas, shared = TypeAdapter.json_schemas(wanted, ref_template=_REF)
    return schemas, shared.get("$defs", {})


def _operation(verb: Verb, schemas: Mapping[tuple[str, JsonSchemaMode], Schema]) -> Schema:
    content = _SPANS if verb.returns_spans else {JSON: {"schema": schemas[verb.name, "serialization"]}}
    operation: Schema = {
        "operationId": verb.name,
        "description": getdoc(verb.function) or "",
        "responses": {
            "200": {"description": "Done, and committed.", "content": content},
            "default": {"description": "Refused.", "content": {JSON: {"schema": {"$ref": _REF.format(model="Error")}}}},
        },
    }
    if verb.method == "GET":
        return operation | {"parameters": _parameters(verb.arguments.model_json_schema())}
    body = _SPANS if verb.takes_spans else {JSON: {"schema": schemas[verb.name, "validation"]}}
    return operation | {"requestBody": {"required": True, "content": body}}


def _parameters(arguments: Schema) -> list[Schema]:
    required = arguments.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": schema}
        for name, schema in arguments["properties"].items()
    ]
