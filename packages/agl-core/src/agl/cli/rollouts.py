"""`agl rollouts`: lists the rollouts of a store, newest first, and writes their calls as examples for SFT."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from agl.cli.command import add_command, add_json_option, add_store_option, existing_store, print_json, seconds
from agl.cli.terminal import align, counted, json_text, printable
from agl.errors import CommandError, InputError
from agl.inspection.conversation import read_conversation
from agl.inspection.listing import ListedRollout, RewardFilter, Selection, read_listed, reward_filter
from agl.store import Store

_HEAD: Final = ("rollout", "started", "mode", "roles", "calls", "reward", "error")
_LIMIT: Final = 20


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


def _read(store: Store, role: str | None) -> Iterator[ListedRollout]:
    """The rollouts of the store, newest first."""
    cursor: str | None = None
    while True:
        page = store.list_rollouts(_LIMIT, cursor)
        yield from read_listed(store, page.rollout_ids, role).values()
        cursor = page.cursor
        if cursor is None:
            return


def _select(arguments: argparse.Namespace, rollouts: Iterator[ListedRollout]) -> tuple[list[ListedRollout], bool]:
    """The rollouts that the options select, and whether these are all that match."""
    matching = filter(_selection(arguments).admits, rollouts)
    if arguments.best is not None:
        scored = [(listed.reward, listed) for listed in matching if listed.reward is not None]
        return [listed for _, listed in sorted(scored, key=lambda item: -item[0])[: arguments.best or None]], True
    limit = _LIMIT if arguments.limit is None and not arguments.as_sft else arguments.limit
    found: list[ListedRollout] = []
    for listed in matching:
        if limit and len(found) == limit:
            return found, False
        found.append(listed)
    return found, True


def _selection(arguments: argparse.Namespace) -> Selection:
    since_ns = None if arguments.since is None else time.time_ns() - arguments.since * 1e9
    return Selection(
        run=arguments.training,
        mode=arguments.mode,
        role=arguments.role,
        reward=arguments.reward,
        error=arguments.error,
        since_ns=since_ns,
    )


def _write_examples(arguments: argparse.Namespace, found: Sequence[ListedRollout]) -> int:
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


def _examples(listed: ListedRollout, role: str | None, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
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


def _to_json(listed: ListedRollout) -> dict[str, Any]:
    trajectory = listed.trajectory
    return {
        "rollout_id": trajectory.rollout_id,
        "group_id": trajectory.group_id,
        "mode": trajectory.mode,
        "start_ns": listed.start_ns,
        "roles": listed.roles,
        "calls": len(trajectory.calls),
        "left_out": listed.is_left_out,
        "reward": listed.reward,
        "error": trajectory.error,
    }


def _cells(listed: ListedRollout) -> tuple[str, ...]:
    trajectory = listed.trajectory
    return (
        printable(trajectory.rollout_id),
        f"{datetime.fromtimestamp(listed.start_ns / 1e9):%m-%d %H:%M:%S}",
        trajectory.mode,
        printable(",".join(listed.roles), 24),
        "left out" if listed.is_left_out else str(len(trajectory.calls)),
        "none" if listed.reward is None else f"{listed.reward:.3g}",
        printable(trajectory.error or "", 30),
    )


def _reward_filter(text: str) -> RewardFilter:
    try:
        return reward_filter(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rollouts")
    return int(text)
