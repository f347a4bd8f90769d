"""Training runs: curves of their metrics, where a step's time goes, and what is wrong in words."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self
from urllib.parse import urlencode

from agl.errors import UnknownIdError
from agl.page.comparison import evaluations, name_of
from agl.page.rollouts import Filters, list_page
from agl.store import Store
from agl.trajectory import ADVICE, DropReason

RUN: Final = "run "
"""Beginning of the name of the resource by which a run claims its name."""
RunState = Literal["loading", "training", "ended"]
"""How far a training is, in the metadata of that resource. It has not ended if an error or a kill stopped it."""
_WINDOW: Final = 10
"""Steps that the findings are about."""
_SPIKE: Final = 5.0
_Z: Final = 1.96
"""Standard errors of a 95 % interval."""
_OF_ROLES: Final = {
    "Entropy": "entropy",
    "KL to the reference": "kl",
    "Clipped tokens, share": "clip_fraction",
    "Gradient norm": "grad_norm",
    "Tokens of an answer, mean": "response_tokens_mean",
    "Staleness, versions": "staleness_mean",
}
_SPEED: Final = {"sampled": "tokens/sampled_per_s", "trained": "tokens/trained_per_s"}

Series = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, in words, and the query of the rollouts that show it."""

    text: str
    advice: str = ""
    query: str = ""


@dataclass(frozen=True, slots=True)
class RunView:
    run: str
    folder: str
    state: RunState | None
    """None: an earlier version began it."""
    metrics: Series
    evaluations: list[str]

    @classmethod
    def of(cls, store: Store, run: str) -> Self:
        """Raises UnknownIdError for a run that the store does not know."""
        claim, metrics = store.get_resource(RUN + run), store.query_metrics(run)
        if claim is None and not metrics:
            raise UnknownIdError(f"{store.uri} has no run {run!r}")
        folder, state = (claim.uri, claim.metadata.get("state")) if claim else ("", None)
        return cls(run, folder, state, metrics, [name_of(each) for each in evaluations(store, run)])

    @property
    def last_step(self) -> int | None:
        return max((values[-1][0] for values in self.metrics.values()), default=None)

    @property
    def recent(self) -> Series:
        """The finite points of the last steps. A count that is 0 may have no point, so steps count, and not points."""
        first = (self.last_step or 0) - _WINDOW + 1
        recent = {
            name: [(step, value) for step, value in points if step >= first and math.isfinite(value)]
            for name, points in self.metrics.items()
        }
        return {name: points for name, points in recent.items() if points}

    @property
    def reward(self) -> float | None:
        return _last(self.metrics, "reward/mean")

    def times(self) -> dict[str, float]:
        """Mean seconds of each part of the last steps, the longest first."""
        parts = {
            name.removeprefix("time/").removesuffix("_s"): statistics.fmean(value for _, value in points)
            for name, points in self.recent.items()
            if name.startswith("time/")
        }
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    def charts(self) -> list[dict[str, Any]]:
        """What the script draws: each chart has a title, and series of points with an interval if one is known."""
        rewards = [*_reward_series(self.metrics), *_evaluated(self.metrics)]
        charts = [("Reward", rewards)]
        charts += [(title, list(_by_role(self.metrics, name))) for title, name in _OF_ROLES.items()]
        speeds = [_plain(label, self.metrics[name]) for label, name in _SPEED.items() if name in self.metrics]
        charts.append(("Tokens per second", speeds))
        return [{"title": title, "series": series} for title, series in charts if series]

    def findings(self, store: Store) -> list[Finding]:
        """What is wrong in the last steps; empty if nothing is."""
        found = list(_findings(self.recent, self.run))
        if any("error=any" in finding.query for finding in found):
            found.append(_commonest_error(store, self.run))
        return found


def list_runs(store: Store) -> list[RunView]:
    """The runs that claimed a name, the newest first."""
    return [RunView.of(store, run) for run in run_names(store)]


def run_names(store: Store) -> list[str]:
    """The runs that claimed a name, the newest first."""
    claims = sorted(store.query_resources(RUN), key=lambda claim: claim.metadata.get("made_ns", 0), reverse=True)
    return [claim.name.removeprefix(RUN) for claim in claims]


def _findings(metrics: Series, run: str) -> Iterator[Finding]:
    groups, equal = (_total(metrics, name) for name in ("groups", "groups/zero_variance"))
    if groups and equal / groups >= 0.5:
        yield Finding(
            f"In {equal / groups:.0%} of the groups all rollouts earned the same, so they taught nothing.",
            ADVICE[DropReason.ZERO_ADVANTAGE],
            urlencode({"run": run, "outcome": DropReason.ZERO_ADVANTAGE}),
        )
    rollouts, failed = (_total(metrics, name) for name in ("rollouts", "rollouts/failed"))
    if rollouts and failed / rollouts >= 0.1:
        query = urlencode({"run": run, "mode": "train", "error": "any"})
        yield Finding(f"{failed / rollouts:.0%} of the rollouts failed.", "", query)
    if missing := _total(metrics, "rollouts/without_reward"):
        query = urlencode({"run": run, "mode": "train", "reward": "none"})
        yield Finding(f"{missing:.0f} rollouts have no reward.", ADVICE[DropReason.NO_REWARD], query)
    yield from _dropped(metrics, run)
    for name in metrics:
        yield from _of_role(metrics, *name.rpartition("/")[::2])


def _dropped(metrics: Series, run: str) -> Iterator[Finding]:
    """Reasons why many calls did not train."""
    calls = _total(metrics, "calls")
    for reason in DropReason:
        dropped = _total(metrics, f"calls/dropped/{reason}")
        if reason is not DropReason.ZERO_ADVANTAGE and calls and dropped / calls >= 0.1:
            query = urlencode({"run": run, "outcome": reason})
            yield Finding(f"{dropped / calls:.0%} of the calls did not train: {reason}.", ADVICE.get(reason, ""), query)


def _of_role(metrics: Series, role: str, name: str) -> Iterator[Finding]:
    values = [value for _, value in metrics[f"{role}/{name}"]] if role else []
    if name == "grad_norm" and len(values) > 3:
        usual = statistics.median(values[:-1])
        if 0 < _SPIKE * usual < values[-1]:  # It is 0 while nothing trains.
            text = f"The gradient norm of {role} is {values[-1] / usual:.0f} times its median."
            yield Finding(text, "lower train.learning_rate")
    if name == "staleness_mean" and values[-1:] and values[-1] > 2:
        text = f"The calls of {role} were sampled {values[-1]:.1f} versions ago on average."
        yield Finding(text, "lower train.max_staleness, or sample faster")
    if name == "same_answer" and values[-1:] and values[-1] >= 0.9 and not role.startswith("eval"):
        text = f"{values[-1]:.0%} of the answers of {role} are the same, whatever the task: it may have collapsed."
        yield Finding(text, "lower train.learning_rate, or raise train.beta")


def _commonest_error(store: Store, run: str) -> Finding:
    page = list_page(store, Filters.of({"run": run, "error": "any"}), None)
    errors = Counter(listed.trajectory.error for listed in page.rollouts)
    if not errors:
        return Finding("The errors of the rollouts that failed are not in the store any more.")
    (error, count) = errors.most_common(1)[0]
    query = urlencode({"run": run, "error": (error or "")[:80]})
    return Finding(f"{count} of the newest {errors.total()} that failed have the error: {error}", "", query)


def _reward_series(metrics: Series) -> Iterator[dict[str, Any]]:
    """Mean reward of the rollouts and of each role with its interval, and the means of the parts."""
    counts = dict(metrics.get("rollouts", ()))
    for name, points in sorted(metrics.items(), key=lambda item: item[0] != "reward/mean"):
        prefix, _, part = name.rpartition("/")
        if prefix.startswith("eval") or part.endswith(("std", "_std")) or not (prefix + "/").endswith("reward/"):
            continue
        role = prefix.removesuffix("reward").rstrip("/")
        deviations = dict(metrics.get(f"{prefix}/std" if part == "mean" else f"{name}_std", ()))
        label = " ".join(filter(None, (role, "reward" if part == "mean" else part)))
        series = _plain(label, points)
        if part == "mean":
            errors = [_Z * deviations.get(step, 0.0) / math.sqrt(max(counts.get(step, 1.0), 1.0)) for step, _ in points]
            low = [(step, value - error) for (step, value), error in zip(points, errors, strict=True)]
            high = [(step, value + error) for (step, value), error in zip(points, errors, strict=True)]
            series |= {"low": _plain(label, low)["y"], "high": _plain(label, high)["y"]}
        yield series


def _evaluated(metrics: Series) -> Iterator[dict[str, Any]]:
    if "eval/reward/mean" in metrics:
        yield _plain("evaluation", metrics["eval/reward/mean"]) | {"points": True}


def _by_role(metrics: Series, name: str) -> Iterator[dict[str, Any]]:
    for full, points in metrics.items():
        role, _, last = full.rpartition("/")
        if last == name and role and "/" not in role:
            yield _plain(role, points)


def _plain(label: str, points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    finite = [(step, value if math.isfinite(value) else None) for step, value in points]
    return {"label": label, "x": [step for step, _ in finite], "y": [value for _, value in finite]}


def _total(metrics: Series, name: str) -> float:
    return sum(value for _, value in metrics.get(name, ()))


def _last(metrics: Series, name: str) -> float | None:
    values = metrics.get(name)
    return values[-1][1] if values else None
