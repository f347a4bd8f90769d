"""HTTP client of a vLLM server: lists, loads and unloads adapters, and reads logprobs."""

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urljoin

import urllib3

from agl.config import LogprobsMode
from agl.errors import TrainingError
from agl_trainer.model.adapter_files import amplified_adapter

_TIMEOUT_S = 300.0
"""Long, because on a CPU prompts and the first loading of an adapter are slow."""
_POLL_INTERVAL_S = 2.0
_LIKELIEST = 20
"""vLLM's default limit."""
_NEUTRAL: Final = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_NOT_FOUND_BY_VLLM = "NotFoundError"
"""In the body of a 404 if the server has the path, and an adapter is missing: its folder, or one of its name."""
_SAME_LOGPROB = 0.1
"""Relative difference below which two logprobs of a token are the same but for rounding; bfloat16 has 1 %."""


class EngineGoneError(TrainingError):
    """The engine does not answer."""


class VllmServer:
    """The server at `url`, which ends in `/v1`. Every method raises TrainingError if the server fails or rejects it.

    The server must run with `--enable-lora`, `--max-lora-rank` of at least the largest `lora_r`, `--max-loras` of at
    least `train.max_staleness` + 2 for each adapter and 1 for its proof, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in
    its environment.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._pool = urllib3.PoolManager(headers=headers, timeout=_TIMEOUT_S, retries=False)
        self._amplified: dict[str, Path] = {}
        """Folders of amplified adapters by their names."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.clear()

    def models(self) -> list[str]:
        """Names of the base model and of every loaded adapter."""
        return [str(model["id"]) for model in self._request("GET", "models").json()["data"]]

    def wait(self, timeout_s: float, on_failure: Callable[[], None] = lambda: None) -> list[str]:
        """`models`, retried for up to `timeout_s` while the server does not answer, unless `on_failure` raises."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.models()
            except TrainingError:
                on_failure()
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_INTERVAL_S)

    def load(self, name: str, folder: Path, factor: int = 1) -> None:
        """Serve the PEFT adapter in `folder`, which the server must be able to read, as `name`; `factor` amplifies it.

        Amplified are the same weights with a larger `lora_alpha`, in a folder beside `folder` until `unload`.
        """
        if factor != 1:
            folder = self._amplified[name] = amplified_adapter(
                folder, folder.with_name(f"{folder.name}-{name}"), factor
            )
        self._request("POST", "load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})

    def unload(self, name: str) -> None:
        try:
            self._request("POST", "unload_lora_adapter", {"lora_name": name})
        finally:
            if folder := self._amplified.pop(name, None):
                shutil.rmtree(folder)

    def running_calls(self) -> int | None:
        """How many calls it computes or has in its queue; None if it does not tell."""
        try:
            text = self._request("GET", "/metrics").data.decode(errors="replace")
        except TrainingError:
            return None
        counts = re.findall(r"^vllm:num_requests_(?:running|waiting)(?:{.*})? (\S+)$", text, re.MULTILINE)
        return int(sum(map(float, counts))) if counts else None

    def sleep(self) -> None:
        """Move the weights to the CPU's memory and drop the KV cache, until `wake_up`."""
        self._request("POST", "/sleep?level=1")

    def wake_up(self) -> None:
        self._request("POST", "/wake_up")

    def next_logprobs(
        self, model: str, prompts: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[dict[int, float]]:
        """For each prompt the likeliest next tokens under `model`, with their logprobs.

        Not `prompt_logprobs`: vLLM 0.32 fails on those of an adapter while it computes other requests.
        """
        body = {"model": model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": 1, "logprobs": _LIKELIEST}
        body |= {"temperature": temperature, "return_tokens_as_token_ids": True, **_NEUTRAL}
        choices = sorted(self._request("POST", "completions", body).json()["choices"], key=lambda one: one["index"])
        found = [top[0] for choice in choices if (top := (choice.get("logprobs") or {}).get("top_logprobs"))]
        if len(found) != len(prompts):
            raise TrainingError(f"{self.url} answered without logprobs, which verify adapters; is it vLLM?")
        return [{int(name.partition(":")[2]): value for name, value in top.items()} for top in found]

    def logprobs_mode(self, model: str, token_id: int) -> LogprobsMode:
        """Which logprobs of sampled tokens it reports: those of processed mode change with the temperature.

        `token_id` is a prompt after which `model` is unsure.
        """
        answers = (self.next_logprobs(model, [[token_id]], temperature) for temperature in (1.0, 2.0))
        cold, hot = (max(logprobs.values()) for (logprobs,) in answers)
        if max(cold, hot) > 0:
            raise TrainingError(
                f"{self.url} reports logits instead of logprobs; start vLLM with --logprobs-mode processed_logprobs"
            )
        return "raw_logprobs" if abs(cold - hot) < _SAME_LOGPROB * abs(cold) else "processed_logprobs"

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> urllib3.BaseHTTPResponse:
        try:
            response = self._pool.request(method, urljoin(f"{self.url}/", path), json=body)
        except urllib3.exceptions.HTTPError as error:
            raise EngineGoneError(
                f"vLLM at {self.url} does not answer ({error}); start it, or correct the URL"
            ) from error
        body_text = response.data[:500].decode(errors="replace")
        has_no_path = response.status == HTTPStatus.NOT_FOUND and _NOT_FOUND_BY_VLLM not in body_text
        if has_no_path and path.endswith("lora_adapter"):
            raise TrainingError(
                f"{self.url} has no /{path}: start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True "
                f"(it answered {body_text})"
            )
        # A redirect is an error too: the key must not go to another server.
        if response.status != HTTPStatus.OK:
            raise TrainingError(f"vLLM at {self.url} rejected {path}: {response.status} {body_text}")
        return response
