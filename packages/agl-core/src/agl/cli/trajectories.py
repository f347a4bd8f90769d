"""`agl trajectories`: training rows of rollouts, and the dropped calls with their reasons."""

import argparse
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from agl.cli.command import (
    add_command,
    add_json_option,
    add_rollout_options,
    add_store_option,
    existing_store,
    print_json,
    spans_of_rollouts,
)
from agl.cli.terminal import align, counted, printable
from agl.trajectory import Drop, Row, Trajectory, build_trajectory, collect_trained

_HEAD = ("rollout", "role", "policy", "tokens", "sampled", "trained", "calls", "reward")


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "trajectories",
        run,
        "Print the training rows of rollouts, with the number of tokens that a training step trained, and a reason for "
        "each call that cannot train. --json adds token ids, loss mask and logprobs of each row.",
        "agl trajectories --group task-17 --json > rows.json",
    )
    add_rollout_options(parser)
    add_store_option(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    with existing_store(arguments.store) as store:
        spans_of_each = spans_of_rollouts(arguments, store)
    trajectories = [build_trajectory(spans) for spans in spans_of_each]
    records = [record for spans in spans_of_each for record in collect_trained(spans).items()]
    trained = {call for call, steps in records if any(step.reason is None for step in steps)}
    if arguments.json:
        print_json(_to_json(trajectories, trained))
    else:
        untrained = Counter(steps[-1].reason for call, steps in records if call not in trained)
        print("\n".join(_lines(trajectories, trained, untrained)))
    return 0


def _to_json(trajectories: Sequence[Trajectory], trained: Container[str]) -> dict[str, Any]:
    return {
        "rollouts": [_rollout_to_json(trajectory) for trajectory in trajectories],
        "rows": [_row_to_json(row, trained) for trajectory in trajectories for row in trajectory.rows],
        "drops": [_drop_to_json(drop) for trajectory in trajectories for drop in trajectory.drops],
    }


def _rollout_to_json(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "rollout_id": trajectory.rollout_id,
        "attempt_id": trajectory.attempt_id,
        "group_id": trajectory.group_id,
        "mode": trajectory.mode,
        "reward": trajectory.reward,
        "error": trajectory.error,
        "calls": len(trajectory.calls),
    }


def _row_to_json(row: Row, trained: Container[str]) -> dict[str, Any]:
    return {
        "rollout_id": row.rollout_id,
        "role": row.role,
        "version": row.version,
        "reward": row.reward,
        "call_ids": row.call_ids,
        "trained": [call_id in trained for call_id in row.call_ids],
        "drift": [turn.drift for turn in row.turns],
        "difference": [turn.difference and asdict(turn.difference) for turn in row.turns],
        "token_ids": row.token_ids,
        "loss_mask": row.loss_mask,
        "logprobs": row.logprobs,
    }


def _drop_to_json(drop: Drop) -> dict[str, Any]:
    return {
        "rollout_id": drop.call.rollout_id,
        "role": drop.call.role,
        "call_id": drop.call.span_id,
        "reason": drop.reason,
        "detail": drop.detail,
    }


def _lines(
    trajectories: Sequence[Trajectory], trained: Container[str], untrained: Mapping[str | None, int]
) -> list[str]:
    rows = [row for trajectory in trajectories for row in trajectory.rows]
    drops = [drop for trajectory in trajectories for drop in trajectory.drops]
    # Why a row does not continue an earlier one: tokens of its history that differ from those sampled.
    drifted = [(turn.call, turn.drift, turn.difference) for row in rows for turn in row.turns if turn.difference]
    reasons = [*drifted, *((drop.call, drop.reason, drop.detail) for drop in drops)]
    counts = ((len(trajectories), "rollout"), (len(rows), "row"), (len(drops), "dropped call"))
    return [
        *align([_HEAD, *(_cells(row, trained) for row in rows)]),
        "",
        *(printable(f"{call.rollout_id} {call.role} {call.span_id}: {why}: {detail}") for call, why, detail in reasons),
        ", ".join(counted(number, noun) for number, noun in counts)
        + "".join(f"; not trained: {counted(number, 'call')} {reason}" for reason, number in untrained.items()),
    ]


def _cells(row: Row, trained: Container[str]) -> tuple[str, ...]:
    return (
        printable(row.rollout_id),
        printable(row.role),
        printable(row.version or "?"),
        str(len(row.ids)),
        str(sum(row.loss_mask)),
        str(sum(turn.end - turn.start for turn in row.turns if turn.call.span_id in trained)),
        str(len(row.turns)),
        "none" if row.reward is None else f"{row.reward:.3g}",
    )
