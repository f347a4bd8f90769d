"""The files in `deploy` as tests read them: the chart rendered, Compose with its variables, their `agl` commands."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "chart"
NAMESPACE = "agents"
RELEASE = "prod"
TRAINING: dict[str, Any] = {
    "enabled": True,
    "run": "sql",
    "config": {
        "train": {"model": "tiny", "agent": "examples.sql_agent.agent:run", "tasks": "examples.sql_agent.tasks:train"},
        "agent_roles": {"writer": {"lora_r": 16}},
    },
}
EVERYTHING: dict[str, Any] = {
    "trainer": TRAINING,
    "monitoring": {"enabled": True},
    "keda": {"enabled": True, "prometheus": "http://prometheus:9090"},
    "images": {"pullSecrets": ["registry"]},
    "config": {"gateway": {"engines": [{"url": "http://vllm:8000/v1"}]}},
}
"""Values that switch on all that the chart has."""
SECRETS = {"AGL_TOKEN": "token-1", "POSTGRES_PASSWORD": "password-1", "AGL_UPSTREAM": "http://engine:8000/v1"}
"""What `deploy/.env` has in the tests."""

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A process that the manifests start: its words after `agl`, its environment, and its configuration as text."""

    name: str
    words: list[str]
    environment: dict[str, str]
    config: str
    ports: list[int]


def rendered(values: Mapping[str, Any] | None = None) -> list[Manifest]:
    """The manifests of the chart. Raises HelmError."""
    with Chart.load(CHART) as chart:
        files = chart.render(dict(values or {}), name=RELEASE, namespace=NAMESPACE)
    texts = (text for name, text in files.items() if name.endswith(".yaml"))
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (each for each in of_kind(manifests, kind) if each["metadata"]["name"] == f"{RELEASE}-{name}")
    return found


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The specification of each Pod."""
    for manifest in of_kind(manifests, "Deployment", "StatefulSet", "Job"):
        yield manifest["spec"]["template"]["spec"]


def chart_parts(manifests: list[Manifest]) -> list[Part]:
    """The processes of `agl` in the chart, with the values of its own Secret."""
    secret = named(manifests, "Secret", "secrets")["stringData"]
    parts = []
    for pod in pods(manifests):
        (container,) = pod["containers"]
        if not container["image"].startswith("agl-"):
            continue
        variables = container["env"]
        environment = {each["name"]: each.get("value") or secret[_key(each)] for each in variables}
        (config,) = (volume["configMap"]["name"] for volume in pod["volumes"] if volume["name"] == "config")
        text = named(manifests, "ConfigMap", config.removeprefix(f"{RELEASE}-"))["data"]["agl.yaml"]
        ports = [port["containerPort"] for port in container.get("ports", ())]
        parts.append(Part(container["name"], container["args"], environment, text, ports))
    return parts


def _key(variable: Manifest) -> str:
    return variable["valueFrom"]["secretKeyRef"]["key"]


def compose(variables: Mapping[str, str]) -> dict[str, Manifest]:
    """The services of `compose.yaml`, with `${NAME}` and `${NAME:?}` replaced. Raises KeyError for others."""
    text = (DEPLOY / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+)(?::\?)?\}", lambda found: variables[found[1]], text))["services"]


def compose_parts(services: Mapping[str, Manifest]) -> list[Part]:
    """The processes of `agl` in `compose.yaml`."""
    parts = []
    for name, service in services.items():
        if not service["image"].startswith("agl-"):
            continue
        mounted = dict(volume.split(":")[:2] for volume in service["volumes"])
        (source,) = (source for source, target in mounted.items() if target.startswith("/etc/agl/"))
        ports = [int(port.split(":")[1]) for port in service.get("ports", ())]
        parts.append(Part(name, service["command"], service["environment"], (DEPLOY / source).read_text(), ports))
    return parts
