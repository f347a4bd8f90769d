"""Bearer tokens: how they are read and checked, and which hosts are loopback."""

from pathlib import Path

import pytest

from agl.errors import ConfigError
from agl.server.auth import BearerTokens, Grant, is_loopback


def test_the_token_and_those_of_the_file_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("one\n\n# zero trainer\n#zero\n  two  # zero\n")
    tokens = BearerTokens.read("three", tmp_path / "tokens")
    assert [
        bool(tokens.grant(f"Bearer {token}".encode())) for token in ("one", "two", "three", "#zero", "zero", "")
    ] == [
        *[True] * 3,
        *[False] * 3,
    ]


@pytest.mark.parametrize("header", [None, b"", b"one", b"Basic one", b"Bearer", b"Bearer on", b"Bearer one two"])
def test_other_headers_are_rejected(header: bytes | None) -> None:
    assert BearerTokens(["one"]).grant(header) is None


def test_the_scheme_is_case_insensitive() -> None:
    assert BearerTokens(["one"]).grant(b"bEARER  one") == Grant()


def test_without_tokens_every_request_is_accepted() -> None:
    tokens = BearerTokens.read(None, None)
    assert not tokens
    assert tokens.grant(None) == Grant()


def test_an_empty_token_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("\n")
    for token, path, message in [(" ", None, "empty"), (None, tmp_path / "tokens", "holds no token")]:
        with pytest.raises(ConfigError, match=message):
            BearerTokens.read(token, path)
    with pytest.raises(ConfigError, match=r"cannot read the tokens in .*nowhere"):
        BearerTokens.read(None, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("store-host", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
