"""Chart, Compose and alerts state what the code understands: options, ports, keys; and no secret in the open."""

import json
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import HelmError, lint

from agl.cli import _parser
from agl.config import Config
from agl_trainer.cluster.plan import Plan
from tests.deploy.manifests import (
    CHART,
    DEPLOY,
    EVERYTHING,
    NAMESPACE,
    RELEASE,
    SECRETS,
    TRAINING,
    Part,
    chart_parts,
    compose,
    compose_parts,
    named,
    of_kind,
    pods,
    rendered,
)

PARTS = [*chart_parts(rendered(EVERYTHING)), *compose_parts(compose(SECRETS))]
_CUSTOM = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
"""Kinds that operators bring, so Kubernetes has no schema of them."""


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_chart_is_linted_and_its_manifests_are_valid(values: dict[str, Any]) -> None:
    assert not [message for message in lint(CHART, values=values)["messages"] if message["severity"] > 1]
    manifests = rendered(values)
    assert len(manifests) >= 18
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(names) == len({*names})
    for manifest in manifests:
        if manifest["apiVersion"] not in _CUSTOM:
            for version in ("1.27", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colector": {"replicas": 3}}, "colector"),
        ({"gateway": {"replica": 3}}, "replica"),
        ({"postgresql": {"enabled": False}}, "set secret.existing to a Secret with AGL_TOKEN"),
        ({"secret": {"existing": "mine"}}, "set postgresql.enabled and redis.enabled to false"),
        ({"keda": {"enabled": True}}, "keda.enabled needs monitoring.enabled"),
        ({"keda": {"enabled": True}, "monitoring": {"enabled": True}}, "keda.prometheus is empty"),
        ({"trainer": {"enabled": True, "run": "a"}}, "trainer.config.train is empty"),
        ({"trainer": {**TRAINING, "run": ""}}, "trainer.run is empty"),
        ({"config": {"gateway": {"upstream": "http://me:secret@vllm/v1"}}}, "config holds a URL with a password"),
        ({"trainer": {**TRAINING, "config": {"judge": {"url": "http://me:x@j"}}}}, "trainer.config holds a URL"),
    ],
)
def test_wrong_values_are_refused_with_what_to_do(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError, match=message):
        rendered(values)


def test_a_store_and_a_queue_elsewhere_replace_those_of_the_chart() -> None:
    values = {"secret": {"existing": "mine"}, "postgresql": {"enabled": False}, "redis": {"enabled": False}}
    manifests = rendered({**EVERYTHING, **values})
    assert not of_kind(manifests, "Secret", "StatefulSet")
    variables = [each for pod in pods(manifests) for each in pod["containers"][0]["env"] if "valueFrom" in each]
    assert {each["valueFrom"]["secretKeyRef"]["name"] for each in variables} == {"mine"}
    assert {each["name"] for each in variables} == {"AGL_TOKEN", "AGL_STORE_URI", "AGL_QUEUE_URI"}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_commands_and_configurations_are_those_of_agl(
    part: Part, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = _parser(part.words).parse_args(part.words)
    assert str(parsed.config).startswith("/etc/agl/")
    for name, value in part.environment.items():
        monkeypatch.setenv(name, value)
    file = tmp_path_factory.mktemp("config") / "agl.yaml"
    file.write_text(part.config)
    config = Config.load(file)
    if part.words[0] == "serve":
        assert {*part.ports} <= {parsed.port, parsed.otlp_http_port, parsed.otlp_grpc_port}
        assert (config.queue_uri is not None) == (part.name == "collector")
    else:
        train = config.require_train()
        assert (train.runners, train.host, train.port, train.otlp_http_port) == ("external", "0.0.0.0", 8400, 4318)
        assert config.store_uri.startswith("http://" if part.words[0] == "runner" else "postgresql://")
    if part.words[0] != "runner":
        hosts = {host.removeprefix(f"{RELEASE}-") for host in config.server.allowed_hosts}
        assert part.name in hosts


def test_services_are_asked_for_under_names_that_servers_allow() -> None:
    manifests = rendered({**EVERYTHING, "config": {"server": {"allowed_hosts": ["agl.example.com"]}}})
    data = named(manifests, "ConfigMap", "gateway")["data"]["agl.yaml"]
    name = f"{RELEASE}-gateway"
    inside = f"{name}.{NAMESPACE}"
    assert yaml.safe_load(data)["server"]["allowed_hosts"] == [
        *(name, inside, f"{inside}.svc", f"{inside}.svc.cluster.local", "agl.example.com")
    ]
    for service in of_kind(manifests, "Service"):
        labels = service["spec"]["selector"]
        (target,) = (
            each
            for each in of_kind(manifests, "Deployment", "StatefulSet", "Job")
            if labels.items() <= each["spec"]["template"]["metadata"]["labels"].items()
        )
        (container,) = target["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]


def test_secrets_are_in_the_secret_only() -> None:
    manifests = rendered(EVERYTHING)
    secret = named(manifests, "Secret", "secrets")["stringData"]
    hidden = [secret["AGL_TOKEN"], secret["POSTGRES_PASSWORD"], secret["REDISCLI_AUTH"]]
    assert len({*hidden}) == 3 and all(len(each) >= 40 for each in hidden)
    open_text = json.dumps([each for each in manifests if each["kind"] != "Secret"])
    assert not [each for each in hidden if each in open_text]
    for part in PARTS:
        words = [*part.words, part.config]
        assert not [value for value in (*hidden, "token-1", "password-1") for word in words if value in word]


def test_pods_are_limited_and_not_root() -> None:
    for pod in pods(rendered(EVERYTHING)):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_databases_are_open_to_the_pods_of_the_release_only() -> None:
    manifests = rendered(EVERYTHING)
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(manifests, "NetworkPolicy")}
    parts = {*(f"{RELEASE}-{part}" for part in ("collector", "gateway", "trainer", "runner", "postgresql", "redis"))}
    assert policies.keys() == parts
    ours = {"app.kubernetes.io/name": "agl", "app.kubernetes.io/instance": RELEASE}
    for name, port in (("postgresql", 5432), ("redis", 6379)):
        assert policies[f"{RELEASE}-{name}"]["ingress"] == [
            {"from": [{"podSelector": {"matchLabels": ours}}], "ports": [{"protocol": "TCP", "port": port}]}
        ]
    assert policies[f"{RELEASE}-runner"]["ingress"] == []


def test_collectors_grow_with_the_spans_in_the_queue() -> None:
    manifests = rendered(EVERYTHING)
    spec = named(manifests, "ScaledObject", "collector")["spec"]
    (trigger,) = spec["triggers"]
    assert trigger["metadata"]["threshold"] == "5000"
    assert trigger["metadata"]["query"] == f'max(span_queue_length{{namespace="{NAMESPACE}",service="prod-collector"}})'
    target = named(manifests, "Deployment", spec["scaleTargetRef"]["name"].removeprefix(f"{RELEASE}-"))
    assert "replicas" not in target["spec"], "the next upgrade would take back what KEDA has added"


def test_another_configuration_is_another_job() -> None:
    def job(**train: Any) -> str:
        config = {**TRAINING["config"], "train": {**TRAINING["config"]["train"], **train}}
        (found,) = of_kind(rendered({"trainer": {**TRAINING, "config": config}}), "Job")
        return found["metadata"]["name"]

    assert job() == job() != job(steps=3)


def test_the_ray_job_has_room_for_what_its_configuration_asks_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, claim, job = yaml.safe_load_all((DEPLOY / "ray-job.yaml").read_text())
    monkeypatch.setenv("AGL_STORE_URI", "postgresql://agl@db/agl")
    data = yaml.safe_load(settings["data"]["train.yaml"])
    config = Config.parse(data)
    train = config.require_train()
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod_specs = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *groups]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": group["template"]["spec"]}
        for group in pod_specs
    ]
    for manifest in (settings, claim, *pods):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    words = job["spec"]["entrypoint"].split()
    assert _parser(words[1:]).parse_args(words[1:]).on == "ray"
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    has = {
        "CPU": sum(float(each["cpu"]) for each in limits),
        "GPU": sum(each.get("nvidia.com/gpu", 0) for each in limits),
    }
    plan = Plan("sql", data, config.ray, train.output_dir, train.concurrency, "/", "token")
    plan.check()
    plan.check_room(has)
