"""`agl runner`: runs the queued rollouts of a training, on any machine."""

import argparse
import os
import resource
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import agl
from agl.cli.command import add_command, add_waits
from agl.cli.interrupt import on_signals
from agl.cli.terminal import counted
from agl.config import Config, TrainConfig
from agl.config.collector import TOKEN_VARIABLE
from agl.errors import CommandError
from agl.runner.agent import Agent
from agl.runner.command import Addresses
from agl.runner.configured import configured_agent, configured_reward
from agl.runner.execution import worker_id
from agl.runner.instrumentors import instrumented
from agl.runner.processes import RunnerProcesses
from agl.runner.queue_worker import QueueWorker
from agl.runner.run_id import run_of
from agl.secret_url import SecretUrl
from agl.store import open_store

_OTLP_PORT = 4318


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "runner",
        run,
        "Run the queued rollouts of a training or of `agl serve`, on any machine: train.agent or train.command, and "
        "train.reward, of a configuration. SIGTERM or Ctrl-C drains: running rollouts end or are given back.",
        "agl runner examples/sql_agent/config.yaml --store http://trainer:8400",
    )
    parser.add_argument("config", type=Path, help="YAML configuration file, that of the training")
    parser.add_argument("--store", type=SecretUrl, metavar="URI", help="URI of the store (default: store_uri)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--run", dest="training", metavar="NAME", help="the training (default: that of train.output_dir)"
    )
    chosen.add_argument("--any-run", action="store_true", help="run every queued rollout of the store")
    parser.add_argument(
        "--gateway",
        type=SecretUrl,
        metavar="URL",
        help="for model calls (default: the address of an http store, else train.port, else $OPENAI_BASE_URL)",
    )
    parser.add_argument(
        "--collector",
        type=SecretUrl,
        metavar="URL",
        help="for spans (default: train.otlp_http_port beside the gateway, else $OTEL_EXPORTER_OTLP_ENDPOINT, else "
        f"port {_OTLP_PORT} beside the gateway)",
    )
    parser.add_argument("--processes", type=_count, default=1, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument(
        "--concurrency", type=_count, metavar="N", help="rollouts of a process at a time (default: train.concurrency)"
    )
    add_waits(parser, drain_s=25, running="rollouts", missing="store or collector")


def run(arguments: argparse.Namespace) -> int:
    config = Config.load(arguments.config)
    train = config.require_train()
    store_uri = arguments.store or config.store_uri
    training = None if arguments.any_run else arguments.training or run_of(Path(train.output_dir))
    addresses = _addresses(arguments, train, store_uri)
    _set_environment(addresses)
    agent = configured_agent(train, addresses)
    reward = configured_reward(train)
    if arguments.processes > 1:
        return _run_processes(arguments)
    if train.command is None and train.max_memory_mb is not None:
        resource.setrlimit(resource.RLIMIT_AS, (train.max_memory_mb * 2**20, train.max_memory_mb * 2**20))
    agl.init("agl-runner", endpoint=addresses.collector, reward_weights=config.rewards)
    with (
        closing(open_store(store_uri)) as store,
        instrumented(train.instrument),
        closing(Agent(agent, reward, config.rewards)) as executed,
    ):
        worker = QueueWorker(
            store,
            executed,
            run=training,
            concurrency=arguments.concurrency or train.concurrency,
            timeout_s=train.timeout_s,
            drain_s=arguments.drain,
            patience_s=arguments.patience,
        )
        wanted = f"rollouts of run {training}" if training else "all rollouts"
        print(
            f"runner {worker_id()}: {wanted} in {store.uri}, calls to {addresses.gateway}, spans to "
            f"{addresses.collector}; Ctrl-C or SIGTERM drains",
            flush=True,
        )
        on_signals(worker.stop)
        worker.work()
    ended = ", ".join(f"{number} {state}" for state, number in sorted(worker.ended.items()))
    print(f"runner {worker_id()}: {counted(worker.ended.total(), 'rollout')} ({ended or 'none'})")
    return 0


def _run_processes(arguments: argparse.Namespace) -> int:
    named = {
        "--run": arguments.training,
        "--store": arguments.store and arguments.store.secret,
        "--gateway": arguments.gateway and arguments.gateway.secret,
        "--collector": arguments.collector and arguments.collector.secret,
        "--concurrency": arguments.concurrency,
        "--drain": f"{arguments.drain}s",
        "--patience": f"{arguments.patience}s",
    }
    options = [part for name, value in named.items() if value is not None for part in (name, str(value))]
    flags = ["--any-run"] if arguments.any_run else []
    command = [str(arguments.config), *options, *flags]
    with RunnerProcesses(command, arguments.processes, drain_s=arguments.drain) as processes:
        on_signals(processes.stop)
        processes.wait()
    return 0


def _addresses(arguments: argparse.Namespace, train: TrainConfig, store_uri: SecretUrl) -> Addresses:
    """Raises CommandError if nothing names the gateway."""
    is_http = store_uri.startswith(("http://", "https://"))
    configured = (is_http and store_uri) or (train.port and f"http://{train.host}:{train.port}")
    gateway = arguments.gateway or configured or os.environ.get("OPENAI_BASE_URL")
    if not gateway:
        raise CommandError(
            f"nothing names the gateway for the agent's model calls: pass --gateway URL, or --store http://HOST:PORT "
            f"of `agl serve` or of the training (the store is {store_uri})"
        )
    gateway = SecretUrl(gateway).without_login.rstrip("/").removesuffix("/v1")
    beside = f"http://{urlsplit(gateway).hostname}"
    configured = train.otlp_http_port and f"{beside}:{train.otlp_http_port}"
    collector = arguments.collector or configured or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    collector = SecretUrl(collector or f"{beside}:{_OTLP_PORT}")
    user, password = (store_uri.login if is_http else None) or ("", "")
    token = password or user or os.environ.get(TOKEN_VARIABLE, "").strip()
    return Addresses(gateway, collector.secret, token)


def _set_environment(addresses: Addresses) -> None:
    """What an agent function, the exporter and the store of this process read."""
    os.environ |= addresses.variables()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)
