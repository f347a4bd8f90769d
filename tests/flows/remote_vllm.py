"""Stands for `vllm serve` on a machine of its own: reads adapters from files there, and asks a brain what they say.

    python remote_vllm.py PORT BRAIN FOLDER

It loads adapters from FOLDER only. While FOLDER/hold exists, chats wait. The paths of requests are in FOLDER/requests.
"""

import json
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PORT, BRAIN, FOLDER = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).resolve()
LOADED: dict[str, str] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        names = [{"id": name} for name in ("small", *LOADED)]
        text = 'vllm:num_requests_running{model_name="small"} 0.0\n'
        self._answer(200, text.encode() if self.path == "/metrics" else json.dumps({"data": names}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with (FOLDER / "requests").open("a") as file:
            file.write(f"{self.path}\n")
        if self.path.endswith("/load_lora_adapter"):
            self._load(body["lora_name"], Path(body["lora_path"]))
        elif self.path.endswith("/unload_lora_adapter"):
            self._answer(200 if LOADED.pop(body["lora_name"], None) else 404, b"{}")
        elif body["model"] not in ("small", *LOADED):
            self._refuse(f"The model {body['model']} does not exist.")
        else:
            while self.path.endswith("/chat/completions") and (FOLDER / "hold").exists():
                time.sleep(0.01)
            self._forward(body | {"path": LOADED.get(body["model"])})

    def _load(self, name: str, folder: Path) -> None:
        if not folder.is_relative_to(FOLDER) or not (folder / "adapter_config.json").exists():
            self._refuse(f"No adapter found for {folder}")
        elif name in LOADED:
            self._answer(400, b"it is loaded already")
        else:
            LOADED[name] = str(folder)
            self._answer(200, b"{}")

    def _forward(self, body: dict[str, Any]) -> None:
        headers = {"content-type": "application/json", "x-request-id": self.headers.get("x-request-id", "none")}
        request = urllib.request.Request(BRAIN + self.path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                self._answer(response.status, response.read())
        except urllib.error.HTTPError as error:
            self._answer(error.code, error.read())

    def _refuse(self, message: str) -> None:
        error = {"message": message, "type": "NotFoundError", "code": 404}
        self._answer(404, json.dumps({"error": error}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
