"""The configuration file: what YAML and shells would do silently is done, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from agl.config import Config
from agl.errors import ConfigError, StoreError
from agl.store import open_store, sqlite_path


def load(text: str | bytes, folder: Path) -> Config:
    file = folder / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Config.load(file)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train:\n  model: tiny\ntrain:\n  model: x\n", "'train' is given twice, in lines 1 and 3"),
        ("train:\n  steps: 1\n  model: tiny\n  steps: 2\n", "'steps' is given twice, in lines 2 and 4"),
        ("rewards: {form: 1, form: 2}\n", "'form' is given twice, in lines 1 and 1"),
        ("agent_roles: [{a: 1}, {b: 1,\n  b: 2}]\n", "'b' is given twice, in lines 1 and 2"),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(text, tmp_path)


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    text = "agent_roles:\n  planner: &base {lora_r: 4, lora_alpha: 8}\n  writer: &more {<<: *base, lora_r: 2}\n"
    roles = load(text + "  critic: {<<: *more, lora_r: 1}\n", tmp_path).agent_roles.roles
    assert [(role.lora_r, role.lora_alpha) for role in roles.values()] == [(4, 8), (2, 8), (1, 8)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("train: {model: 'té'}".encode("latin-1"), r"not UTF-8 \(b'\\xe9' at byte 17: .*save it as UTF-8"),
        ("train: {model: x}".encode("utf-16"), "not UTF-8"),
        (b"rewards: {since: 2026-13-45}", "not valid YAML"),
        (b"rewards: [", "not valid YAML"),
        (b"", "expected a mapping of sections"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(content: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"config.yaml.*{problem}"):
        load(content, tmp_path)


def test_variables_and_the_home_folder_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECRET", "s3cret")
    text = (
        "store_uri: postgresql://agl:${SECRET}@db/x\ntrain:\n  model: ~/models/m\n  output_dir: ${HOME}/runs\n"
        "  report_to: []\ncollector: {token_file: ~/tokens}\ngateway: {tls: {certificate: ~/c.pem, key: ~/k.pem}}\n"
    )
    config = load(text, tmp_path)
    assert config.store_uri.secret == "postgresql://agl:s3cret@db/x"
    assert config.require_train().model == f"{tmp_path}/models/m"
    assert config.require_train().output_dir == f"{tmp_path}/runs"
    assert config.collector.token_file == tmp_path / "tokens"
    assert config.gateway.tls is not None and config.gateway.tls.key == tmp_path / "k.pem"
    assert load(config.to_yaml(), tmp_path) == config
    assert sqlite_path("sqlite:///~/agl.db") == tmp_path / "agl.db"


def test_what_only_a_shell_expands_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.output_dir: the environment has no NO_SUCH_VARIABLE"):
        load("train: {model: tiny, output_dir: '${NO_SUCH_VARIABLE}/x'}", tmp_path)
    for path in ("$HOME/x", "~no-such-user/x"):
        with pytest.raises(ConfigError, match=r"train\.output_dir: .*read without a shell"):
            load(f"train: {{model: tiny, output_dir: {path}}}", tmp_path)
        with pytest.raises(StoreError, match="read without a shell"):
            open_store(f"sqlite:///{path}/agl.db")
    assert not [*tmp_path.glob("*~*"), *tmp_path.glob("*$*")]


def test_without_a_role_there_is_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="agent_roles names no role to train"):
        Config.parse({"train": {"model": "tiny"}}).require_roles()


@pytest.mark.parametrize(
    "name", ["../../escaped", "/abs", "a/b", "..", ".", "", "x\0y", "a@3", "é", "a" * 65, "a b", "a\n"]
)
def test_a_role_that_is_no_name_is_refused_where_it_enters(name: str) -> None:
    for roles in ({name: {}}, {"writer": {}, "fixer": {"adapter": name}}):
        with pytest.raises(ConfigError, match=r"(?s)agent_roles.*expected a name of letters, digits"):
            Config.parse({"agent_roles": roles})
    assert Config.parse({"agent_roles": {"Writer_2.b-c": {}}}).require_roles()


@pytest.mark.parametrize("host", ["agl:8400", "http://agl", "[2001:db8::1]", "*.example.com", "agl/", ""])
def test_an_allowed_host_that_no_request_can_name_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.allowed_hosts\.0: .*expected a host name or an address"):
        Config.parse({"server": {"allowed_hosts": [host]}})
    given = ["agl", "my_agl.example", "192.0.2.7", "2001:db8::1"]
    assert Config.parse({"server": {"allowed_hosts": given}}).server.allowed_hosts == given


TEAM: dict[str, Any] = {
    "models": {"small": {"path": "a"}, "large": {"path": "b"}},
    "agent_roles": {"planner": {"model": "large"}, "executor": {"model": "small"}},
    "train": {},
}


def vllm(port: int = 0) -> dict[str, Any]:
    return {"kind": "vllm", "launch": {"port": port}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"models": {}}, r"train\.model names no base model: set it, or name several in `models`"),
        ({"models": {}, "train": {"model": "a"}}, r"agent_roles\.planner\.model names a model of the section `models`"),
        ({"train": {"model": "a"}}, r"train\.model and `models` exclude each other: set models\.<name>\.path"),
        ({"train": {"chat_template": "t"}}, r"train\.chat_template and `models` exclude each other"),
        ({"agent_roles": {"planner": {}}}, r"agent_roles\.planner\.model is not set: expected one of .* small, large"),
        ({"agent_roles": {"planner": {"model": "big"}}}, r"agent_roles\.planner\.model names 'big': expected one of"),
        ({"agent_roles": {"planner": {"model": "large"}}}, r"models\.small: no role has its adapter on it"),
        (
            {"agent_roles": TEAM["agent_roles"] | {"critic": {"adapter": "planner", "model": "small"}}},
            r"critic shares the adapter of planner, which is on the model 'large', not on 'small'",
        ),
        ({"agent_roles": {"large": {"model": "small"}}}, r"models and agent_roles both have 'large'"),
        ({"models": TEAM["models"] | {"v2.5": {"path": "c"}}}, r"models\.v2\.5: expected a name without dots"),
        ({"models": {"small": {"path": "a", "pth": 1}}}, r"models\.small\.pth: unknown key; did you mean 'path'"),
        ({"models": {"small": {"path": "a", "engine": {"kid": 1}}}}, r"engine\.kid: unknown key; did you mean 'kind'"),
        (
            {"models": {name: {"path": name, "engine": vllm(8000)} for name in ("small", "large")}},
            r"models\.small\.engine\.launch and models\.large\.engine\.launch both start a server at port 8000",
        ),
        (
            {"models": TEAM["models"] | {"small": {"path": "a", "engine": vllm()}}}
            | {"gateway": {"engines": [{"url": "http://h/v1", "models": ["small"]}]}},
            r"models\.small\.engine\.launch starts the engine that gateway names",
        ),
        ({"gateway": {"upstream": "http://h/v1"}}, r"gateway\.upstream serves one base model: list the servers"),
        ({"gateway": {"engines": [{"url": "http://h/v1"}]}}, r"http://h/v1 serves small and large, and a server has"),
    ],
)
def test_models_and_roles_that_do_not_fit_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Config.parse(TEAM | change)


def test_one_base_is_a_list_of_one_and_a_shared_adapter_stays_on_its_base() -> None:
    config = Config.parse(TEAM | {"agent_roles": TEAM["agent_roles"] | {"critic": {"adapter": "planner"}}})
    assert [(base.key, base.path, [*base.roles]) for base in config.bases()] == [
        ("models.small.path", "a", ["executor"]),
        ("models.large.path", "b", ["planner", "critic"]),
    ]
    assert Config.parse(yaml.safe_load(config.to_yaml())) == config
    alone = Config.parse({"agent_roles": {"planner": {}}, "train": {"model": "me/small@v2"}})
    assert [(base.key, base.name, [*base.roles]) for base in alone.bases()] == [("train.model", "small", ["planner"])]
    only = Config.parse({"models": {"small": {"path": "a"}}, "agent_roles": {"planner": {}}, "train": {}})
    assert [(base.name, [*base.roles]) for base in only.bases()] == [("small", ["planner"])]


def test_the_server_of_a_base_also_gets_the_calls_of_its_roles() -> None:
    servers = [{"url": "http://h/v1", "models": ["large"]}, {"url": "http://judge/v1", "models": ["gpt-4o"]}]
    config = Config.parse(TEAM | {"gateway": {"engines": servers}})
    routed = {engine.url: engine.models for engine in config.routed_engines()}
    assert routed == {"http://h/v1": ["large", "planner"], "http://judge/v1": ["gpt-4o"]}
    of = {base.name: [engine.url for engine in config.servers_of(base)] for base in config.bases()}
    assert of == {"small": [], "large": ["http://h/v1"]}


def test_a_written_configuration_that_names_engines_can_be_read_again() -> None:
    train = {"train": {"model": "tiny"}}
    for named in (
        {"gateway": {"engines": [{"url": "http://x/v1"}]}},
        {"engine": {"kind": "vllm", "launch": {}}},
        {"engine": {"kind": "remote", "launch": {}, "key_env": "KEY"}},
    ):
        config = Config.parse({**train, **named})
        assert Config.parse(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("engine", "problem"),
    [
        ({"kind": "remote"}, "engine: remote engines register; remove gateway.engines and upstream"),
        ({"kind": "vllm", "launch": {}}, "engine.launch starts the engine that gateway names"),
        ({"kind": "remote", "launch": {"sleep": True}}, "launch.sleep frees the GPU for the training, which kind: rem"),
        ({"kind": "vllm", "key_env": "KEY"}, "key_env is for kind: remote"),
    ],
)
def test_engines_that_exclude_each_other_are_refused(engine: dict[str, Any], problem: str) -> None:
    gateway = {"engines": [{"url": "http://x/v1"}]}
    with pytest.raises(ConfigError, match=problem):
        Config.parse({"engine": engine, "gateway": gateway, "train": {"model": "tiny"}})
