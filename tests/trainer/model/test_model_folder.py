"""`train.model` by name: the Hub's client against a Hub on loopback, its cache without one, GGUF files, and errors."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from agl.errors import ConfigError
from agl_trainer.model.base_model import load_model
from agl_trainer.model.fingerprint import fingerprint
from agl_trainer.model.model_folder import SMOLLM2_PACKAGE, _smollm2_gguf, model_folder
from agl_trainer.model.tiny import build_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIND = """
import sys
from agl.errors import ConfigError
from agl_trainer.model.model_folder import model_folder
try:
    print(model_folder(sys.argv[1], downloads=len(sys.argv) < 3))
except ConfigError as error:
    sys.exit(str(error))
"""


@contextmanager
def hub(files: dict[str, bytes], requests: list[str]) -> Iterator[str]:
    """A Hub with the model `me/small`, whose branches are `main` and `v2`, and the gated model `me/gated`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            path = self.path.partition("?")[0]
            if path.startswith(("/api/models/me/gated", "/me/gated")):
                self._reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif not path.startswith(("/api/models/me/small", "/me/small")):
                self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif path.endswith(("/revision/main", "/revision/v2", "/api/models/me/small", f"/revision/{COMMIT}")):
                siblings = [{"rfilename": name} for name in files]
                self._reply(200, json.dumps({"id": "me/small", "sha": COMMIT, "siblings": siblings}).encode())
            elif "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self._reply(200, json.dumps(tree).encode())
            elif "/resolve/" in path and (name := path.rpartition("/")[2]) in files:
                etag = {"ETag": f'"{sha1(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self._reply(200, files[name], etag)
            else:
                self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

        do_HEAD = do_GET

        def _reply(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def find(home: Path, endpoint: str, *arguments: str, **environment: str) -> tuple[str, str]:
    """Folder and error of a process in which a user names a model."""
    variables = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", FIND, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_a_model_of_the_hub_is_downloaded_once_and_then_found_without_network(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "made", ["a few words"], 0)
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    requests: list[str] = []
    with hub(files | {"pytorch_model.bin": b"a pickle"}, requests) as endpoint:
        folder, error = find(tmp_path / "home", endpoint, "me/small@v2")
        assert folder.endswith(f"models--me--small/snapshots/{COMMIT}"), error
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == files
        assert find(tmp_path / "home", endpoint, "me/small@v3")[1].startswith(
            "train.model 'me/small@v3': the model has no revision 'v3' at the Hub"
        )
        assert "is gated: accept its terms at" in find(tmp_path / "home", endpoint, "me/gated")[1]
        assert "no such model at" in find(tmp_path / "home", endpoint, "me/smal")[1]
    # The Hub is gone.
    assert find(tmp_path / "home", endpoint, "me/small@v2")[0] == folder
    requests.clear()
    assert find(tmp_path / "home", endpoint, "me/small@v2", HF_HUB_OFFLINE="1")[0] == folder
    assert find(tmp_path / "home", endpoint, "me/small@v2", "no download")[0] == folder
    for options in ({}, {"HF_HUB_OFFLINE": "1"}):
        _, error = find(tmp_path / "empty", endpoint, "me/small@v2", **options)
        assert f"train.model 'me/small@v2' is not in the cache {tmp_path / 'empty'}" in error
        assert "`hf download me/small --revision v2`" in error and "copy models--me--small from its cache" in error


def test_weights_that_are_pickled_only_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(
        ConfigError, match=r"no safetensors weights model\.safetensors; pickled ones, as pytorch_model\.bin"
    ):
        model_folder(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "other.safetensors", "b": "pytorch_model.bin"}}))
    with pytest.raises(ConfigError, match=r"no safetensors weights pytorch_model\.bin; pickled"):
        model_folder(str(tmp_path))
    index.write_text("[]")
    with pytest.raises(ConfigError, match="is no index of weights"):
        model_folder(str(tmp_path))


def test_no_pickle_is_read_and_no_code_of_the_model_is_run_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever loads a model: its folder was not looked at before."""
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("a pickle was read"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    model = tmp_path / "model"
    build_tiny_model(model, ["a few words"], 0)
    load_model(model, on_cpu=True)
    (model / "model.safetensors").rename(model / "kept")
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="can run code and are not read"):
        load_model(model, on_cpu=True)
    (model / "kept").rename(model / "model.safetensors")
    (model / "own.py").write_text("raise SystemExit('the code of the model ran')")
    config = json.loads((model / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(ConfigError, match=r"needs its own code \(auto_map\), which is never run"):
        load_model(model, on_cpu=True)
    (model / "config.json").write_text(json.dumps(config))
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter, expected a base model"):
        load_model(model, on_cpu=True)


def test_the_error_for_a_missing_model_names_it_and_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*smollm2.*config.json"):
        model_folder(str(tmp_path / "nowhere"))


def test_a_gguf_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of SmolLM2 under another name is the same model."""
    known = model_folder("smollm2")
    monkeypatch.setenv("AGL_CACHE", str(tmp_path))
    file = tmp_path / "mine.gguf"
    file.symlink_to(_smollm2_gguf())
    folder = model_folder(str(file))
    assert SMOLLM2_PACKAGE not in str(folder) and folder.parent == tmp_path / "models"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert fingerprint(folder, tokenizer) == fingerprint(known, AutoTokenizer.from_pretrained(known))
    before = (folder / "config.json").stat().st_mtime_ns
    assert model_folder(str(file)) == folder and (folder / "config.json").stat().st_mtime_ns == before
