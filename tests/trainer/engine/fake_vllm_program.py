"""Stands for the program `vllm`: answers `/health`, `/sleep` and `/wake_up`, or ends as one that cannot load.

It writes its arguments, its environment and the requests to the file FAKE_VLLM_RECORD, as lines of JSON.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def record(line: object) -> None:
    with Path(os.environ["FAKE_VLLM_RECORD"]).open("a") as file:
        file.write(f"{json.dumps(line)}\n")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        record(self.path)
        self._answer()

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()


record({"arguments": sys.argv[1:], "environment": dict(os.environ), "process": os.getpid()})
if "--cannot-load" in sys.argv:
    sys.stdout.write("".join(f"line {number}\n" for number in range(30)))
    sys.exit(3)
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
