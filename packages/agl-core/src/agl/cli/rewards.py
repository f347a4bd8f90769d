"""`agl rewards test`: what another scorer, or other weights, would make of stored rollouts."""

import argparse
import asyncio
import inspect
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agl import semconv
from agl.cli.command import add_command, add_json_option, add_verbs, existing_store, parse_amount, print_json
from agl.cli.terminal import align, counted, printable
from agl.config import Config
from agl.errors import CommandError
from agl.inspection.conversation import read_conversation, text_of
from agl.rewards import Score, read_score
from agl.rewards.comparison import Comparison, Rescored
from agl.rewards.score import Scorer, call_scorer, describe_error
from agl.runner.agent_loop import AgentLoop
from agl.runner.import_function import load_function
from agl.span import Span
from agl.store import Rollout, Store
from agl.trajectory import Trajectory, build_trajectory

_CONCURRENCY: Final = 32
_MANY_MISSING: Final = 0.05
_SHOWN: Final = 10
"""Number of changed groups that the text lists."""
_RECORDED, _LAST_RESPONSE = "recorded", "last response"


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored rollout as a scorer needs it."""

    trajectory: Trajectory
    task: Any
    answer: Any
    source: str
    """Where the answer is from."""

    @property
    def old(self) -> Score:
        whole = [one for one in self.trajectory.rewards if one.target is None and one.role is None]
        return Score(whole[-1].value, whole[-1].dimensions) if whole else Score(None, missing="no reward was recorded")


def register(subparsers: Any) -> None:
    verbs = add_verbs(subparsers, "rewards", "Test a reward on stored rollouts.")
    parser = add_command(
        verbs,
        "test",
        run,
        "Score stored rollouts with the scorer and the weights of a configuration, and compare with the rewards that "
        "they have, without running an agent. Without train.reward the stored parts are weighed anew. Exits with 1 if "
        "more than 5 % of the new rewards are missing.",
        "agl rewards test --config new.yaml --on last-100",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="C", help="YAML configuration file")
    parser.add_argument(
        "--on", type=_last, default=100, metavar="last-N", help="the N newest rollouts (default: last-100)"
    )
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    config = Config.load(arguments.config)
    reference = config.train.reward if config.train else None
    scorer = load_function(reference, "train.reward") if reference else None
    with existing_store(config.store_uri) as store:
        stored = _read(store, arguments.on)
    if not stored:
        raise CommandError(f"{config.store_uri} has no rollout to score; name another store_uri in {arguments.config}")
    timeout = config.train.timeout_s if config.train else 120.0
    scores = (
        [_reweighed(one, config) for one in stored] if scorer is None else _score_all(scorer, stored, config, timeout)
    )
    made = [one.trajectory for one in stored]
    comparison = Comparison(
        [
            Rescored(trajectory.rollout_id, trajectory.group_id, one.old, score)
            for trajectory, one, score in zip(made, stored, scores, strict=True)
        ]
    )
    answers = Counter(one.source for one in stored)
    if arguments.json:
        print_json(comparison.to_json() | {"answers": answers if scorer else {}, "reasons": _reasons(scores)})
    else:
        print("\n".join(_text(comparison, scores, answers if scorer else Counter())))
    return int(comparison.missing()[1] > _MANY_MISSING * len(stored))


def _read(store: Store, number: int) -> list[_Stored]:
    """The newest rollouts that have a call or a reward, and did not fail. A call is read with one rollout only."""
    found: list[tuple[Trajectory, list[Span]]] = []
    seen: set[tuple[str, str]] = set()
    for _, spans in store.read_spans(store.rollout_ids()[::-1]):
        keys = {(span.trace_id, span.span_id) for span in spans}
        if not spans or keys <= seen:
            continue
        seen |= keys
        trajectory = build_trajectory(spans)
        if trajectory.error is None and (trajectory.calls or trajectory.rewards):
            found.append((trajectory, spans))
        if len(found) == number:
            break
    queued = store.get_rollouts([trajectory.rollout_id for trajectory, _ in found])
    return [_stored(trajectory, spans, queued.get(trajectory.rollout_id)) for trajectory, spans in found]


def _stored(trajectory: Trajectory, spans: Sequence[Span], queued: Rollout | None) -> _Stored:
    task = queued.input if queued else _first_request(trajectory, spans)
    return _Stored(trajectory, task, *_answer(trajectory, spans))


def _first_request(trajectory: Trajectory, spans: Sequence[Span]) -> str | None:
    """The last message of the first request, as the task of a rollout that no training queued."""
    by_id = {span.span_id: span for span in spans}
    messages = read_conversation(trajectory.calls[0], by_id).messages if trajectory.calls else []
    return text_of(messages[-1]) if messages else None


def _answer(trajectory: Trajectory, spans: Sequence[Span]) -> tuple[Any, str]:
    """What the agent returned, as recorded, else the text of its last response."""
    of_attempt = [span for span in spans if span.attempt_id in (None, trajectory.attempt_id)]
    for text in filter(None, (span.text(semconv.ROLLOUT_ANSWER) for span in reversed(of_attempt))):
        try:
            return json.loads(text), _RECORDED
        except ValueError:
            break
    by_id = {span.span_id: span for span in spans}
    calls = [call for call in trajectory.calls if call.attempt_id in (None, trajectory.attempt_id)]
    message = read_conversation(calls[-1], by_id).answer if calls else None
    return (text_of(message) if message else None), _LAST_RESPONSE


def _reweighed(stored: _Stored, config: Config) -> Score:
    old = stored.old
    if old.value is None:
        return old
    try:
        return read_score(dict(old.parts) or old.value, config.rewards)
    except Exception as error:  # noqa: BLE001 - a part without a weight
        return Score(None, missing=describe_error(error))


def _score_all(scorer: Scorer, stored: Sequence[_Stored], config: Config, timeout_s: float) -> list[Score]:
    """The score of each rollout; async scorers share one event loop, and sync ones have a thread each."""
    turns = asyncio.Semaphore(_CONCURRENCY)

    async def score(one: _Stored) -> Score:
        async with turns:
            try:
                return await asyncio.wait_for(resolve(one), timeout_s)
            except TimeoutError:
                return Score(None, missing=f"no reward within {timeout_s:g} s")
            except Exception as error:  # noqa: BLE001 - any error of the scorer means that there is no reward
                return Score(None, missing=describe_error(error))

    async def resolve(one: _Stored) -> Score:
        result = await asyncio.to_thread(call_scorer, scorer, one.task, one.answer, one.trajectory)
        return read_score(await result if inspect.isawaitable(result) else result, config.rewards)

    async def score_all() -> list[Score]:
        return await asyncio.gather(*map(score, stored))

    loop = AgentLoop()
    try:
        return loop.submit(score_all()).result()
    finally:
        loop.close()


def _text(comparison: Comparison, scores: Sequence[Score], answers: Counter[str]) -> list[str]:
    rows = [("", "old", "new", "change")]
    for name, (old, new) in comparison.means().items():
        change = "" if old is None or new is None else f"{new - old:+.3f}"
        rows.append((printable(name), _number(old), _number(new), change))
    old_missing, new_missing = comparison.missing()
    rows.append(("missing", str(old_missing), str(new_missing), ""))
    groups, changed, correlation = comparison.groups(), comparison.changed_groups(), comparison.rank_correlation()
    lines = [*align(rows), "", f"{counted(len(comparison.rollouts), 'rollout')}, {counted(len(groups), 'group')}"]
    lines.append(f"rank correlation within groups: {'none varies' if correlation is None else f'{correlation:.3f}'}")
    lines.append(f"groups whose order changes: {len(changed)}")
    lines += [f"  {printable(group)}" for group in changed[:_SHOWN]]
    lines += ["  ..., --json lists all"] if len(changed) > _SHOWN else []
    if answers[_LAST_RESPONSE]:
        lines.append(
            f"{counted(answers[_LAST_RESPONSE], 'rollout')} without a recorded answer: the text of the last response "
            "was scored"
        )
    return lines + [
        f"{counted(number, 'new reward')} missing: {printable(why)}" for why, number in _reasons(scores).items()
    ]


def _reasons(scores: Sequence[Score]) -> dict[str, int]:
    """Why new rewards are missing, the commonest first."""
    return dict(Counter(score.missing for score in scores if score.missing is not None).most_common())


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _last(text: str) -> int:
    """Argument type of `last-N`. Raises ArgumentTypeError."""
    number = int(parse_amount(text, r"last-(\d+)()", {"": 1}, "last-N, e.g. last-100"))
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no rollout, expected last-1 or more")
    return number
