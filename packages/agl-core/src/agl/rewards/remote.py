"""A scorer that another server runs."""

import json
import os
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import urllib3

from agl.errors import ConfigError, RewardError
from agl.rewards.retry import retry_policy
from agl.rewards.score import ScoredRollout
from agl.secret_url import SecretUrl


class Remote:
    """Posts `{"task", "answer", "rollout": {"id", "group", "mode"}}` to `url`, whose response is the result as JSON:
    a number, an object of parts, or null.

    A connection error, 429 or 5xx is tried again `retries` times, after 0, 0.5, 1, 2, ... seconds; each try has
    `timeout_s`. `key_env`: environment variable whose value is sent as bearer token. Thread-safe.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        key_env: str | None = None,
    ) -> None:
        """Raises ConfigError if the environment variable `key_env` is not set."""
        key = os.environ.get(key_env, "").strip() if key_env else ""
        if key_env and not key:
            raise ConfigError(f"the environment has no {key_env}, which the scorer at {SecretUrl.shown(url)} needs")
        self.url = SecretUrl(url)
        authorization = {"authorization": f"Bearer {key}"} if key else {}
        self._pool = urllib3.PoolManager(
            maxsize=32, headers={**(headers or {}), **authorization}, timeout=timeout_s, retries=retry_policy(retries)
        )

    def __call__(self, task: Any, answer: Any, rollout: ScoredRollout | None = None) -> Any:
        """Raises RewardError, which makes the reward missing, if the server does not answer with a result."""
        about = rollout and {"id": rollout.rollout_id, "group": rollout.group_id, "mode": rollout.mode}
        try:
            body = json.dumps({"task": task, "answer": answer, "rollout": about}).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"task or answer cannot be sent to the scorer at {self.url}: {error}") from error
        try:
            response = self._pool.request(
                "POST", self.url.secret, body=body, headers={**self._pool.headers, "content-type": "application/json"}
            )
        except urllib3.exceptions.HTTPError as error:
            raise RewardError(f"the scorer at {self.url} does not answer: {error}") from error
        if response.status != HTTPStatus.OK:
            text = response.data[:300].decode(errors="replace")
            raise RewardError(f"the scorer at {self.url} answered {response.status}: {text}")
        try:
            return json.loads(response.data)
        except ValueError as error:
            text = response.data[:80].decode(errors="replace")
            raise RewardError(f"the scorer at {self.url} answered {text!r}, expected JSON") from error
