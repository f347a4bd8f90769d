"""Secrets in URLs and settings: what is shown of them, and that each key that takes one has a type that hides it."""

import copy
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import agl
from agl.config import Config
from agl.config.file import _SECTIONS
from agl.errors import AglError, ConfigError
from agl.secret_url import SecretUrl
from agl.store import open_store


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://TOKEN@h:1/v1", "http://***@h:1/v1"),
        ("postgresql://me:SECRET@h1,h2:5/db?sslmode=require&password=SECRET", "postgresql://***@h1,h2:5/db?***"),
        ("redis://:SECRET@h#SECRET", "redis://***@h?***"),
        ("me:SECRET@h/v1", "***@h/v1"),
        ("sqlite:///a@b?c.db", "sqlite:///a@b?c.db"),
        ("local", "local"),
    ],
)
def test_the_text_shows_where_and_never_the_secret(url: str, shown: str) -> None:
    made = SecretUrl(url)
    shows = [
        made,
        f"{made}",
        "".join(made),
        "a" + made,
        repr(made).strip("'"),
        json.loads(json.dumps({"a": made}))["a"],
    ]
    assert [str(text).removeprefix("a") if text != shown else text for text in shows] == [shown] * len(shows)
    for copied in (made, SecretUrl(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert (copied.secret, str(copied)) == (url, shown)


@pytest.mark.parametrize("url", ["redis://:SEC/RET@h", "x://me:SE@CRET@h/db", "http://h/v1?key=SEC@RET", "S?ECRET@h"])
def test_a_url_in_which_the_end_of_the_password_is_ambiguous_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"write @ as %40") as caught:
        SecretUrl(url)
    assert "RET" not in str(caught.value).replace("***", "")


def test_login_and_errors_of_drivers() -> None:
    url = SecretUrl("postgresql://me:p%40ss@h/db?sslpassword=w0rd&port=5")
    assert (url.login, url.without_login) == (("me", "p@ss"), "postgresql://h/db?sslpassword=w0rd&port=5")
    assert SecretUrl("http://h/v1").login is None
    said = f"cannot open {url.secret}: password p@ss (p%40ss) or w0rd of me is wrong at port 5"
    assert url.hide(said) == "cannot open ***: password *** (***) or *** of me is wrong at port 5"


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    yield "", Config
    yield from _SECTIONS.items()


def test_every_key_that_takes_a_url_a_password_or_a_token_has_a_type_that_hides_it() -> None:
    secret = [
        (f"{name}.{key}", str(field.annotation))
        for name, section in sections()
        for key, field in section.model_fields.items()
        if re.search(r"(url|uri|upstream|password|secret|token|on_queue_high)$", key)
    ]
    assert len(secret) >= 6
    assert [key for key, annotation in secret if "Secret" not in annotation] == []


@pytest.mark.parametrize(
    "text",
    [
        "store_uri: [SECRET]",
        "queue_uri: redis://:SE/CRET@h",
        "gateway: {upstream: 'http://u:SECRET@h/v1', engines: [{url: 'http://u:SECRET@h/v1'}]}",
        "gateway: {engines: [{url: 'u:SECRET@h/v1'}]}",
        "gateway: {engines: [{url: 'http://u:SECRET@h/v1?SECRET'}]}",
        "gateway: {engines: [{url: 'http://u:SECRET@h/v1', key_env: K}]}",
        "gateway: {engines: [{url: 'http://u:SECRET@h:99999/v1'}]}",
        "gateway: {engines: ['http://u:SECRET@h/v1']}",
        "judge: {url: 'ftp://u:SECRET@h', model: m, criteria: c}",
        "rewards: {x: 1}\nstore_uri: http://SECRET@h\njudge: {url: 'http://u:SECRET@h', model: m, criteria: c}",
        "store_uri: http://SECRET@h/ : x",
        "queue: {on_queue_high: [SECRET]}",
    ],
)
def test_errors_about_a_configuration_name_the_key_and_hide_the_secret(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.load(tmp_path / "config.yaml")
    assert "CRET" not in str(caught.value)
    assert re.search(
        r"config\.yaml(: (store_uri|queue_uri|gateway|judge|queue)|: : Value error| is not valid)", str(caught.value)
    )


def test_a_configuration_keeps_its_secrets_and_shows_none() -> None:
    high = "curl -H SECRET http://h"
    config = Config.parse({"store_uri": "http://SECRET@h", "queue": {"on_queue_high": high}})
    assert config.queue.on_queue_high is not None and config.queue.on_queue_high.get_secret_value() == high
    assert Config.model_validate(config.model_dump()).store_uri.secret == "http://SECRET@h"
    shows = [repr(config), config.to_yaml(), config.model_dump_json(), json.dumps(config.model_dump(), default=str)]
    assert not [text for text in shows if "SECRET" in text]
    assert yaml.safe_load(config.to_yaml())["store_uri"] == "http://***@h"


@pytest.mark.parametrize("uri", ["postgres://u:SECRET@127.0.0.1:1/x", "http://SECRET@h:x", "mysql://u:SE@CRET@h"])
def test_a_store_that_does_not_open_hides_the_secret(uri: str) -> None:
    with pytest.raises(AglError) as caught:
        open_store(uri)
    assert "CRET" not in str(caught.value) and caught.value.__cause__ is None


def test_a_wrong_endpoint_of_the_collector_hides_the_secret() -> None:
    with pytest.raises(ConfigError, match=r"endpoint is 'ftp://\*\*\*@h'") as caught:
        agl.init(endpoint="ftp://me:SECRET@h")
    assert "SECRET" not in str(caught.value)
