"""The configuration file: what YAML and shells would do silently is done, or refused by name."""

from pathlib import Path

import pytest

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
