"""`agl rollouts`: lists the rollouts of a store, newest first, and writes their calls as examples for SFT."""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Final

from agl.cli.command import add_command, add_json_option, add_store_option, existing_store, print_json, seconds
from agl.cli.conversation import read_conversation
from agl.cli.terminal import align, counted, json_text, printable
from agl.errors import CommandError
from agl.span import Span
from agl.store import Store
from agl.trajectory import Trajectory, build_trajectory, collect_trained

_HEAD: Final = ("rollout", "started", "mode", "roles", "calls", "reward", "error")
_LIMIT: Final = 20
_COMPARISONS: Final = {">=": ge, ">": gt, "<=": le, "<": lt, "": ge}

RewardFilter = Callable[[float | None], bool]


@dataclass(frozen=True, slots=True)
class _Listed:
    """A rollout with its spans, and the reward that the options ask for: of the role, else of the rollout."""

    spans: Sequence[Span]
    trajectory: Trajectory
    reward: float | None
    run: str | None
    """The training that queued it."""

    @property
    def start_ns(self) -> int:
        return min(span.start_ns for span in self.spans)

    @property
    def roles(self) -> list[str]:
        return list(dict.fromkeys(call.role for call in self.trajectory.calls))

    def is_of_run(self, run: str) -> bool:
        trained = (each.run for steps in collect_trained(self.spans).values() for each in steps)
        return run == self.run or run in trained


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "rollouts",
        run,
        "List rollouts, newest first, with roles, number of calls, reward and error. The options select some of them; "
        "--as-sft writes their calls as examples for supervised fine-tuning, one JSON object a line.",
        "agl rollouts --run demo --mode train --best 20 --as-sft best.jsonl",
    )
    parser.add_argument(
        "--run", dest="training", metavar="NAME", help="rollouts of this training, its run-id in train.output_dir"
    )
    parser.add_argument("--mode", choices=("train", "eval", "prod"), help="rollouts in this mode")
    parser.add_argument("--role", help="rollouts with a call of this role; --reward and --as-sft use this role only")
    parser.add_argument(
        "--reward", metavar="R", type=_reward_filter, help="rewards of at least R; or '>R', '<R', '<=R', none, any"
    )
    parser.add_argument(
        "--error", metavar="TEXT", nargs="?", const="", help="failed rollouts; with TEXT those whose error contains it"
    )
    parser.add_argument("--since", metavar="TIME", type=seconds, help="started at most this long ago: 7d, 12h, 30m")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--limit", metavar="N", type=_count, help=f"the newest N; 0 for all (default: {_LIMIT})")
    number.add_argument("--best", metavar="N", type=_count, help="the N with the highest rewards, best first")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--as-sft", metavar="FILE", help="write a new file of SFT examples; - for standard output")
    add_json_option(output)
    add_store_option(parser)


def run(arguments: argparse.Namespace) -> int:
    with existing_store(arguments.store) as store:
        found, is_complete = _select(arguments, _read(store, arguments.role))
    if arguments.as_sft:
        return _write_examples(arguments, found)
    if arguments.json:
        print_json([_to_json(listed) for listed in found])
    elif found:
        print("\n".join(align([_HEAD, *map(_cells, found)])))
        print("" if is_complete else f"\nthe newest {len(found)}; --limit 0 lists all")
    else:
        print("no rollout matches")
    return 0


def _read(store: Store, role: str | None) -> Iterator[_Listed]:
    """The rollouts of the store, newest first. A gateway call that was shown with its rollout is not shown again."""
    seen: set[tuple[str, str]] = set()
    for rollout_id in reversed(store.rollout_ids()):
        spans = store.query_spans(rollout_id)
        keys = {(span.trace_id, span.span_id) for span in spans}
        if not keys <= seen:
            seen |= keys
            trajectory = build_trajectory(spans)
            of_role = [
                reward.value for reward in trajectory.rewards if role and (reward.role, reward.target) == (role, None)
            ]
            queued = store.get_rollout(trajectory.rollout_id)
            run = queued.metadata.get("run") if queued else None
            yield _Listed(spans, trajectory, of_role[-1] if of_role else trajectory.reward, run)


def _select(arguments: argparse.Namespace, rollouts: Iterator[_Listed]) -> tuple[list[_Listed], bool]:
    """The rollouts that the options select, and whether these are all that match."""
    matching = (listed for listed in rollouts if _matches(arguments, listed))
    if arguments.best is not None:
        scored = [(listed.reward, listed) for listed in matching if listed.reward is not None]
        return [listed for _, listed in sorted(scored, key=lambda item: -item[0])[: arguments.best or None]], True
    limit = _LIMIT if arguments.limit is None and not arguments.as_sft else arguments.limit
    found: list[_Listed] = []
    for listed in matching:
        if limit and len(found) == limit:
            return found, False
        found.append(listed)
    return found, True


def _matches(arguments: argparse.Namespace, listed: _Listed) -> bool:
    error = listed.trajectory.error
    return (
        (arguments.training is None or listed.is_of_run(arguments.training))
        and arguments.mode in (None, listed.trajectory.mode)
        and (arguments.role is None or arguments.role in listed.roles)
        and (arguments.reward is None or arguments.reward(listed.reward))
        and (arguments.error is None or (error is not None and arguments.error in error))
        and (arguments.since is None or listed.start_ns >= time.time_ns() - arguments.since * 1e9)
    )


def _write_examples(arguments: argparse.Namespace, found: Sequence[_Listed]) -> int:
    left_out: Counter[str] = Counter()
    lines = [json_text(example) for listed in found for example in _examples(listed, arguments.role, left_out)]
    reasons = "".join(f"; left out: {counted(number, 'call')} {reason}" for reason, number in left_out.items())
    if not lines:
        raise CommandError(f"{counted(len(found), 'rollout')} selected, none with a call to learn from{reasons}")
    text = "\n".join(lines) + "\n"
    if arguments.as_sft == "-":
        print(text, end="")
    else:
        try:
            with Path(arguments.as_sft).open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise CommandError(f"cannot write {arguments.as_sft}: {error.strerror}; name a new file") from error
    summary = f"{counted(len(lines), 'example')} of {counted(len(found), 'rollout')}{reasons}"
    print(summary, file=sys.stderr)
    return 0


def _examples(listed: _Listed, role: str | None, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """The calls of the last attempt as SFT examples. Counts why the others are none."""
    trajectory = listed.trajectory
    by_id = {span.span_id: span for span in listed.spans}
    for call in trajectory.calls:
        if role not in (None, call.role) or call.attempt_id not in (None, trajectory.attempt_id):
            continue
        said = read_conversation(call, by_id)
        if call.error is not None:
            left_out["that failed"] += 1
        elif not said.messages or not said.completion:
            left_out["without recorded text"] += 1
        else:
            tools = {"tools": said.tools} if said.tools else {}
            yield {"role": call.role, "messages": said.messages, **tools, "completion": said.completion}


def _to_json(listed: _Listed) -> dict[str, Any]:
    trajectory = listed.trajectory
    return {
        "rollout_id": trajectory.rollout_id,
        "group_id": trajectory.group_id,
        "mode": trajectory.mode,
        "start_ns": listed.start_ns,
        "roles": listed.roles,
        "calls": len(trajectory.calls),
        "reward": listed.reward,
        "error": trajectory.error,
    }


def _cells(listed: _Listed) -> tuple[str, ...]:
    trajectory = listed.trajectory
    return (
        printable(trajectory.rollout_id),
        f"{datetime.fromtimestamp(listed.start_ns / 1e9):%m-%d %H:%M:%S}",
        trajectory.mode,
        printable(",".join(listed.roles), 24),
        str(len(trajectory.calls)),
        "none" if listed.reward is None else f"{listed.reward:.3g}",
        printable(trajectory.error or "", 30),
    )


def _reward_filter(text: str) -> RewardFilter:
    """Argument type: `0.5`, `>=0.5`, `>0.5`, `<=0.5`, `<0.5`, `none` or `any`."""
    if text in ("none", "any"):
        return lambda reward: (reward is None) == (text == "none")
    match = re.fullmatch(r"([<>]=?|)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a reward such as 0.5, '>0.5', '<=0.5', none or any")
    compare, bound = _COMPARISONS[match[1]], float(match[2])
    return lambda reward: reward is not None and compare(reward, bound)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rollouts")
    return int(text)
