"""The judge's word as a reward: the groups of a step are ranked, and each rollout gets its rank as a dimension.

Span by span: `agl.judge` says what a judgement cost and how sure it was, `agl.reward` below it is the reward, which
takes the place of the one that the rollout, or the role in it, had before.
"""

import json
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from agl import semconv
from agl.emit.reward import weighted_sum
from agl.errors import TrainingError
from agl.span import AttributeValue, Span
from agl.store import Store
from agl.trajectory import Reward, Trajectory, build_trajectory
from agl_trainer.rollout.judge import Judge, Judgement
from agl_trainer.rollout.sources import RolloutBatch, RolloutSource

logger = logging.getLogger(__name__)

DIMENSION = "judge"
"""Of the reward."""
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class JudgedSource:
    """The groups of `source`, ranked by `judge`: for each of `roles` by its part alone, or, with none, as a whole.

    A group that cannot be judged keeps the rewards that it has, and a warning says why.
    """

    source: RolloutSource
    judge: Judge
    store: Store
    roles: Sequence[str] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the dimensions of a reward."""

    def draw(self, step: int, position: int, groups: range) -> RolloutBatch:
        drawn = self.source.draw(step, position, groups)
        by_group: dict[str, list[Trajectory]] = {}
        for trajectory in drawn.trajectories:
            if trajectory.error is None:
                by_group.setdefault(trajectory.group_id or trajectory.rollout_id, []).append(trajectory)
        asked = [(made, role) for made in by_group.values() if len(made) > 1 for role in self.roles or (None,)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            judgements = list(pool.map(lambda one: self._judge_group(*one), asked))
        judged = {trajectory.rollout_id for made, _ in asked for trajectory in made}
        again = [
            build_trajectory(self.store.query_spans(one.rollout_id)) if one.rollout_id in judged else one
            for one in drawn.trajectories
        ]
        return RolloutBatch(drawn.outcomes, again, {**drawn.metrics, **_metrics(judgements)})

    def prefetch(self, step: int) -> None:
        self.source.prefetch(step)

    def _judge_group(self, members: Sequence[Trajectory], role: str | None) -> Judgement | None:
        told = [(made, self.store.query_spans(made.rollout_id)) for made in members]
        parts = [(made, transcript(made, spans, role)) for made, spans in told]
        parts = [(made, text) for made, text in parts if text]
        if len(parts) < 2:
            return None
        name = f"group {members[0].group_id}" + (f", role {role}" if role else "")
        try:
            judgement = self.judge.rank(name, task_of(*told[0]), [text for _, text in parts])
        except TrainingError as error:
            logger.warning("%s is not judged: %s", name, error)
            return None
        for (made, _), score in zip(parts, judgement.scores, strict=True):
            self.store.append_spans(self._spans(made, role, score, judgement, len(parts)))
        return judgement

    def _spans(
        self, made: Trajectory, role: str | None, score: float, judgement: Judgement, members: int
    ) -> list[Span]:
        own = [reward for reward in made.rewards if reward.target is None and reward.role == role]
        dimensions = _dimensions(own[-1] if own else None) | {DIMENSION: score}
        shared: dict[str, AttributeValue] = {semconv.ROLLOUT_ID: made.rollout_id, semconv.MODE: made.mode}
        named = {semconv.ATTEMPT_ID: made.attempt_id, semconv.GROUP_ID: made.group_id, semconv.ROLE: role}
        shared |= {name: value for name, value in named.items() if value is not None}
        cost: dict[str, AttributeValue] = {
            semconv.JUDGE_DISAGREEMENT: judgement.disagreement,
            semconv.GEN_AI_USAGE_INPUT_TOKENS: judgement.input_tokens / members,
            semconv.GEN_AI_USAGE_OUTPUT_TOKENS: judgement.output_tokens / members,
        }
        reward: dict[str, AttributeValue] = {semconv.REWARD_VALUE: weighted_sum(dimensions, self.weights)}
        reward |= {semconv.REWARD_PREFIX + name: value for name, value in dimensions.items()}
        trace_id, judge_id, now = made.calls[-1].trace_id, secrets.token_hex(8), time.time_ns()
        return [
            Span(trace_id, judge_id, None, semconv.SPAN_JUDGE, now, now, shared | cost),
            Span(trace_id, secrets.token_hex(8), judge_id, semconv.SPAN_REWARD, now, now, shared | reward),
        ]


def transcript(trajectory: Trajectory, spans: Sequence[Span], role: str | None) -> str:
    """What the calls of the last attempt answered, of one role or of all, in order."""
    by_id = {span.span_id: span for span in spans}
    lines = []
    for call in trajectory.calls:
        if call.attempt_id in (None, trajectory.attempt_id) and role in (None, call.role):
            messages = _messages(by_id.get(call.span_id), semconv.GEN_AI_OUTPUT_MESSAGES)
            lines += [f"[{call.role}] {text}" for message in messages if (text := _text(message))]
    return "\n".join(lines)


def task_of(trajectory: Trajectory, spans: Sequence[Span]) -> str:
    """What the first call of a rollout was asked, as its request says it."""
    by_id = {span.span_id: span for span in spans}
    for call in trajectory.calls:
        span = by_id.get(call.span_id)
        body = _json(span.text(semconv.GATEWAY_REQUEST)) if span else None
        asked = body.get("messages") if isinstance(body, dict) else None
        messages = asked if isinstance(asked, list) else _messages(span, semconv.GEN_AI_INPUT_MESSAGES)
        if text := "\n".join(f"[{message.get('role')}] {_text(message)}" for message in messages):
            return text
    return "(not recorded)"


def _messages(span: Span | None, name: str) -> list[dict[str, object]]:
    found = _json(span.text(name)) if span else None
    return [message for message in found if isinstance(message, dict)] if isinstance(found, list) else []


def _json(text: str | None) -> object:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


def _text(message: Mapping[str, object]) -> str:
    """The text of a message; whatever else it has, e.g. a tool call, as JSON."""
    parts = message.get("parts", message.get("content"))
    if isinstance(parts, str):
        return parts
    found = []
    for part in parts if isinstance(parts, list) else []:
        content = part.get("content", part.get("text")) if isinstance(part, dict) else None
        found.append(content if isinstance(content, str) else json.dumps(part))
    return "\n".join(found)


def _dimensions(reward: Reward | None) -> dict[str, float]:
    """Those of the reward that was there; a plain number is dimension `reward`."""
    if reward is None:
        return {}
    before = {name: value for name, value in reward.dimensions.items() if name != DIMENSION}
    return before or ({} if DIMENSION in reward.dimensions else {"reward": reward.value})


def _metrics(judgements: Sequence[Judgement | None]) -> dict[str, float]:
    made = [judgement for judgement in judgements if judgement is not None]
    metrics = {"judge/groups": float(len(made)), "judge/failed": float(len(judgements) - len(made))}
    metrics["judge/input_tokens"] = float(sum(judgement.input_tokens for judgement in made))
    metrics["judge/output_tokens"] = float(sum(judgement.output_tokens for judgement in made))
    if made:
        metrics["judge/disagreement"] = sum(judgement.disagreement for judgement in made) / len(made)
    return metrics
