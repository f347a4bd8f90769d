"""A runner and a server that share no file: rollouts, heartbeats and spans all go over the network."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import agl
from agl import semconv
from agl.config.collector import TOKEN_VARIABLE
from agl.runner.runner import Runner
from agl.store import AttemptState, Rollout, RolloutState, open_store

TOKEN = "of-this-test"


@contextmanager
def agl_serve(store_uri: str) -> Iterator[tuple[str, str]]:
    """`agl serve` in a process of its own; URLs of its API and of its OTLP receiver."""
    command = "import sys; from agl.cli import main; sys.exit(main())"
    options = ["serve", "--store", store_uri, "--port", "0", "--otlp-http-port", "0", "--otlp-grpc-port", "0"]
    process = subprocess.Popen([sys.executable, "-c", command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        spans, gateway = (re.search(r"http://[\w.:]+", process.stdout.readline()) for _ in range(2))
        assert spans is not None and gateway is not None
        yield gateway[0], spans[0]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def double(task: int) -> int:
    agl.emit_message(f"doubling {task}")
    if task < 0:
        raise ValueError("too small")
    return 2 * task


def test_a_runner_works_on_the_store_of_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer%20{TOKEN}")
    uri = f"sqlite:///{tmp_path / 'agl.db'}"
    with agl_serve(uri) as (api_url, otlp_url):
        agl.init(endpoint=otlp_url)
        with closing(open_store(api_url)) as store, Runner(store, double, reward=lambda task, answer: 0.5) as runner:
            outcomes = runner.run([Rollout(f"r{task}", task, group_id="g") for task in (1, 2, -3)])
            states = [rollout.state for rollout in store.wait_for_group("g", timeout_s=0)]
        agl.shutdown()
    assert [(outcome.state, outcome.answer) for outcome in outcomes] == [
        (RolloutState.SUCCEEDED, 2),
        (RolloutState.SUCCEEDED, 4),
        (RolloutState.FAILED, None),
    ]
    assert states == [outcome.state for outcome in outcomes]
    with closing(open_store(uri)) as store:
        (attempt,) = store.query_attempts("r-3")
        assert (attempt.state, attempt.error) == (AttemptState.FAILED, "ValueError: too small")
        names = {span.name for span in store.query_spans("r1")}
    assert names == {semconv.SPAN_ROLLOUT, semconv.SPAN_MESSAGE, semconv.SPAN_REWARD}
