"""Numbers for Prometheus that are read when it asks: the queue, the store, and the trainings in the store."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agl.page.runs import RUN, run_names
from agl.store import Store

_RUNS = 20
_DROPPED = "calls/dropped/"
TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Numbers(Collector):
    """`known` has the server's numbers by name; None is written as NaN."""

    def __init__(self, known: Mapping[str, tuple[str, float | None]], store_metrics: list[Metric]) -> None:
        self._known = known
        self._store_metrics = store_metrics

    def collect(self) -> Iterator[Metric]:
        for name, (text, value) in self._known.items():
            yield GaugeMetricFamily(name, text, value=float("nan") if value is None else value)
        yield from self._store_metrics


def training_metrics(store: Store) -> list[Metric]:
    """Last step, reward, state and dropped calls of the runs in the store that claimed a name last."""
    step = GaugeMetricFamily("agl_training_step", "Last step of a run.", labels=["run"])
    reward = GaugeMetricFamily("agl_training_reward", "Mean reward of the last step of a run.", labels=["run"])
    dropped = CounterMetricFamily(
        "agl_training_calls_dropped", "Calls that did not train, by reason.", labels=["run", "reason"]
    )
    running = GaugeMetricFamily(
        "agl_training_running", "0 once a run has ended without an error, or was interrupted; else 1.", labels=["run"]
    )
    for run in run_names(store)[:_RUNS]:
        metrics = store.query_metrics(run)
        claim = store.get_resource(RUN + run)
        running.add_metric([run], claim is not None and claim.metadata.get("state") in ("loading", "training"))
        if metrics:
            step.add_metric([run], max(points[-1][0] for points in metrics.values()))
        if "reward/mean" in metrics:
            reward.add_metric([run], metrics["reward/mean"][-1][1])
        for name, points in metrics.items():
            if name.startswith(_DROPPED):
                dropped.add_metric([run, name.removeprefix(_DROPPED)], sum(value for _, value in points))
    return [step, reward, running, dropped]


def render(collector: Collector, *registries: CollectorRegistry) -> bytes:
    """The text format of `collector` and of `registries`, which have no name in common."""
    own = CollectorRegistry()
    own.register(collector)
    return b"".join(generate_latest(registry) for registry in (own, *registries))
