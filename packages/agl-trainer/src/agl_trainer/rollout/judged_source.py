"""A source whose groups are ranked by the judge; each rollout's rank becomes the dimension `judge` of its reward.

For each rollout (and role, if roles are ranked separately) it appends two spans: `agl.judge` with the cost and the
disagreement of the judgement, and below it `agl.reward`, which replaces the earlier reward of that rollout or role.
"""

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from agl import semconv
from agl.emit.reward import weighted_sum
from agl.errors import RewardError
from agl.rewards.judge import CONCURRENCY, Judge, Judgement
from agl.span import AttributeValue, Span, now_ns
from agl.store import Store
from agl.trajectory import Reward, Trajectory, build_trajectory
from agl_trainer.rollout.sources import RolloutBatch, RolloutSource

logger = logging.getLogger(__name__)

DIMENSION = "judge"
"""Reward dimension that holds the rank."""


@dataclass(frozen=True, slots=True)
class JudgedSource:
    """The groups of `source`, ranked by `judge`: separately for each of `roles`, or as a whole if `roles` is empty.

    A group that cannot be judged keeps its rewards, and a warning gives the reason.
    """

    source: RolloutSource
    judge: Judge
    store: Store
    roles: Sequence[str] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the reward dimensions."""

    def draw(self, step: int, position: int, groups: range) -> RolloutBatch:
        batch = self.source.draw(step, position, groups)
        by_group: dict[str, list[Trajectory]] = {}
        for trajectory in batch.trajectories:
            if trajectory.error is None:
                by_group.setdefault(trajectory.group_id or trajectory.rollout_id, []).append(trajectory)
        tasks = [(group, role) for group in by_group.values() if len(group) > 1 for role in self.roles or (None,)]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            judgements = list(pool.map(lambda task: self._judge_group(*task), tasks))
        judged = dict.fromkeys(trajectory.rollout_id for group, _ in tasks for trajectory in group)
        read = {name: build_trajectory(spans) for name, spans in self.store.read_spans([*judged])}
        trajectories = [read.get(old.rollout_id, old) for old in batch.trajectories]
        return RolloutBatch(batch.outcomes, trajectories, {**batch.metrics, **_metrics(judgements)})

    def prefetch(self, step: int) -> list[int]:
        return self.source.prefetch(step)

    def _judge_group(self, group: Sequence[Trajectory], role: str | None) -> Judgement | None:
        spans_of = self.store.query_spans_by_rollout([trajectory.rollout_id for trajectory in group])
        members = [(trajectory, spans_of[trajectory.rollout_id]) for trajectory in group]
        transcripts = [(trajectory, transcript(trajectory, spans, role)) for trajectory, spans in members]
        transcripts = [(trajectory, text) for trajectory, text in transcripts if text]
        if len(transcripts) < 2:
            return None
        name = f"group {group[0].group_id}" + (f", role {role}" if role else "")
        try:
            judgement = self.judge.rank(name, task_of(*members[0]), [text for _, text in transcripts])
        except RewardError as error:
            logger.warning("%s is not judged: %s", name, error)
            return None
        for (trajectory, _), score in zip(transcripts, judgement.scores, strict=True):
            self.store.append_spans(self._spans(trajectory, role, score, judgement))
        return judgement

    def _spans(self, trajectory: Trajectory, role: str | None, score: float, judgement: Judgement) -> list[Span]:
        earlier = [reward for reward in trajectory.rewards if reward.target is None and reward.role == role]
        dimensions = _dimensions(earlier[-1] if earlier else None) | {DIMENSION: score}
        shared: dict[str, AttributeValue] = {semconv.ROLLOUT_ID: trajectory.rollout_id, semconv.MODE: trajectory.mode}
        extra = {semconv.ATTEMPT_ID: trajectory.attempt_id, semconv.GROUP_ID: trajectory.group_id, semconv.ROLE: role}
        shared |= {name: value for name, value in extra.items() if value is not None}
        members = len(judgement.scores)
        cost: dict[str, AttributeValue] = {
            semconv.JUDGE_DISAGREEMENT: judgement.disagreement,
            semconv.GEN_AI_USAGE_INPUT_TOKENS: judgement.input_tokens / members,
            semconv.GEN_AI_USAGE_OUTPUT_TOKENS: judgement.output_tokens / members,
        }
        reward: dict[str, AttributeValue] = {semconv.REWARD_VALUE: weighted_sum(dimensions, self.weights)}
        reward |= {semconv.REWARD_PREFIX + name: value for name, value in dimensions.items()}
        trace_id, judge_id, now = trajectory.calls[-1].trace_id, secrets.token_hex(8), now_ns()
        return [
            Span(trace_id, judge_id, None, semconv.SPAN_JUDGE, now, now, shared | cost),
            Span(trace_id, secrets.token_hex(8), judge_id, semconv.SPAN_REWARD, now, now, shared | reward),
        ]


def transcript(trajectory: Trajectory, spans: Sequence[Span], role: str | None) -> str:
    """Output messages of the last attempt's calls, in order, one `[role] text` each; of one role or of all (None)."""
    by_id = {span.span_id: span for span in spans}
    lines = []
    for call in trajectory.calls:
        if call.attempt_id in (None, trajectory.attempt_id) and role in (None, call.role):
            messages = _messages(by_id.get(call.span_id), semconv.GEN_AI_OUTPUT_MESSAGES)
            lines += [f"[{call.role}] {text}" for message in messages if (text := _text(message))]
    return "\n".join(lines)


def task_of(trajectory: Trajectory, spans: Sequence[Span]) -> str:
    """Messages of the first recorded request of a rollout, as the description of its task."""
    by_id = {span.span_id: span for span in spans}
    for call in trajectory.calls:
        span = by_id.get(call.span_id)
        body = _json(span.text(semconv.GATEWAY_REQUEST)) if span else None
        requested = body.get("messages") if isinstance(body, dict) else None
        messages = requested if isinstance(requested, list) else _messages(span, semconv.GEN_AI_INPUT_MESSAGES)
        if text := "\n".join(f"[{message.get('role')}] {_text(message)}" for message in messages):
            return text
    return "(not recorded)"


def _messages(span: Span | None, name: str) -> list[dict[str, object]]:
    found = _json(span.text(name)) if span else None
    return [message for message in found if isinstance(message, dict)] if isinstance(found, list) else []


def _json(text: str | None) -> object:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _text(message: Mapping[str, object]) -> str:
    """Text of a message; parts that are not text, e.g. tool calls, as JSON."""
    parts = message.get("parts", message.get("content"))
    if isinstance(parts, str):
        return parts
    texts = []
    for part in parts if isinstance(parts, list) else []:
        content = part.get("content", part.get("text")) if isinstance(part, dict) else None
        texts.append(content if isinstance(content, str) else json.dumps(part))
    return "\n".join(texts)


def _dimensions(reward: Reward | None) -> dict[str, float]:
    """Dimensions of an earlier reward without the judge's; a reward that is a plain number is dimension `reward`."""
    if reward is None:
        return {}
    others = {name: value for name, value in reward.dimensions.items() if name != DIMENSION}
    return others or ({} if DIMENSION in reward.dimensions else {"reward": reward.value})


def _metrics(judgements: Sequence[Judgement | None]) -> dict[str, float]:
    done = [judgement for judgement in judgements if judgement is not None]
    metrics = {"judge/groups": float(len(done)), "judge/failed": float(len(judgements) - len(done))}
    metrics["judge/input_tokens"] = float(sum(judgement.input_tokens for judgement in done))
    metrics["judge/output_tokens"] = float(sum(judgement.output_tokens for judgement in done))
    if done:
        metrics["judge/disagreement"] = sum(judgement.disagreement for judgement in done) / len(done)
    return metrics
