"""`agl canary`: starts a canary, shows what its evidence says, promotes it or rolls it back, and lists its history."""

import argparse
import getpass
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agl.canary.decision import end, running, start
from agl.canary.history import Event, all_events, last_event
from agl.canary.table import ArmDay, Day
from agl.canary.verdict import Verdict, judge
from agl.cli.command import add_command, add_json_option, add_verbs, existing_store, print_json
from agl.cli.terminal import align, printable
from agl.config import Config
from agl.config.section import DEFAULT_PROJECT
from agl.errors import CanaryError
from agl.secret_url import SecretUrl
from agl.store import Store
from agl.store.project import split_project

_HEAD: Final = ("day", "arm", "rollouts", "rewarded", "mean reward", "errors", "p50", "p95", "ratio")
_DUE: Final[Mapping[str, str]] = {
    "promoted": "promote it",
    "rolled_back": "roll it back",
    "stopped": "stop it",
    "wait": "wait",
}


def register(subparsers: Any) -> None:
    verbs = add_verbs(subparsers, "canary", "Give a candidate a share of production, and decide by evidence.")
    begin = add_command(
        verbs,
        "start",
        run_start,
        "Give a share of production to candidate versions: those that --run published last, or the named ones. Again "
        "with a larger --fraction, it raises the share.",
        "agl canary start --run shop --config shop.yaml --current planner@12 --current writer@12",
    )
    begin.add_argument("candidate", metavar="ROLE@N", nargs="*", help="candidate (default: the newest of each role)")
    begin.add_argument(
        "--run", dest="training", required=True, metavar="RUN", help="the training that published the candidates"
    )
    begin.add_argument(
        "--current",
        metavar="ROLE@N",
        action="append",
        default=[],
        help="the version that answers now, if no canary was promoted before; ROLE=MODEL for a model without adapter",
    )
    begin.add_argument("--fraction", type=float, metavar="F", help="share of production (default: canary.fraction)")
    add_json_option(
        add_command(
            verbs,
            "status",
            run_status,
            "Show both arms by day, the evidence, and what should be done.",
            "agl canary status --store sqlite:///agl.db",
        )
    )
    for name, run, text in (
        ("promote", run_promote, "Let the candidate answer all of production, whatever the evidence says."),
        ("rollback", run_rollback, "End the canary; if none runs, undo the last promotion."),
    ):
        verb = add_command(verbs, name, run, text, f"agl canary {name} --reason 'as agreed on Monday'")
        verb.add_argument("--reason", default="", metavar="TEXT", help="for the history")
    add_json_option(
        add_command(verbs, "history", run_history, "List what happened, and who decided it.", "agl canary history")
    )
    for parser in verbs.choices.values():
        parser.add_argument("--config", metavar="FILE", help="YAML file with `store_uri`, `agent_roles` and `canary`")
        parser.add_argument("--store", type=SecretUrl, metavar="URI", help="URI of the store (default: store_uri)")


def run_start(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    settings = config.canary
    if arguments.fraction is not None:
        settings = Config.parse(
            {"canary": settings.model_dump() | {"fraction": arguments.fraction}}, "--fraction"
        ).canary
    uri = _uri(arguments)
    if (project := split_project(uri.secret)[1]) != DEFAULT_PROJECT:
        raise CanaryError(
            f"{uri} is the store of project {project}: gateways send rollouts of project {DEFAULT_PROJECT} only to a "
            "candidate, so the canary would see none; leave ?project= out"
        )
    with existing_store(uri) as store:
        candidate = _candidates(arguments, config, store)
        current = dict(_versions(arguments.current, "--current"))
        event = start(store, candidate, current, settings, _person(), time.time_ns())
    print(f"canary {event.canary.id} {event.summary()}")
    print("`agl canary status` shows its evidence" + (", and `agl serve` acts on it" if settings.auto else ""))
    return 0


def run_status(arguments: argparse.Namespace) -> int:
    with existing_store(_uri(arguments)) as store:
        last = last_event(store)
        if last is None:
            raise CanaryError("the store has no canary: begin one with `agl canary start`")
        verdict = judge(store, last, time.time_ns())
    if arguments.json:
        print_json({**last.model_dump(mode="json", exclude={"evidence"}), **verdict.evidence(), "notes": verdict.notes})
    else:
        print("\n".join(_status(last, verdict)))
    return 1 if verdict.notes or verdict.action == "stopped" else 0


def run_promote(arguments: argparse.Namespace) -> int:
    with existing_store(_uri(arguments)) as store:
        last = running(store)
        return _decide(store, last, "promoted", arguments)


def run_rollback(arguments: argparse.Namespace) -> int:
    with existing_store(_uri(arguments)) as store:
        last = last_event(store)
        if last is None or not (last.is_running or last.kind == "promoted"):
            raise CanaryError("no canary runs, and none was promoted last; `agl canary history` shows what happened")
        return _decide(store, last, "rolled_back", arguments)


def run_history(arguments: argparse.Namespace) -> int:
    with existing_store(_uri(arguments)) as store:
        events = all_events(store)
    if arguments.json:
        print_json([event.model_dump(mode="json") for event in events])
    else:
        print("\n".join(f"canary {event.canary.id} {printable(event.summary())}" for event in events) or "no canaries")
    return 0


def _decide(store: Store, last: Event, kind: str, arguments: argparse.Namespace) -> int:
    """What a person decides happens, also without evidence, of which the history has what there is."""
    now_ns = time.time_ns()
    try:
        evidence = judge(store, last, now_ns).evidence()
    except CanaryError as error:
        evidence = {"because": str(error)}
    reason = arguments.reason or f"decided by hand; the verdict then: {evidence['because']}"
    event = end(store, last, kind, _person(), reason, now_ns, evidence)  # pyright: ignore[reportArgumentType]
    print(f"canary {event.canary.id} {event.summary()}")
    print("gateways of this store follow within a second; running rollouts stay on their versions")
    return 0


def _candidates(arguments: argparse.Namespace, config: Config, store: Store) -> dict[str, str]:
    """Candidate of each role. Raises CanaryError for one that the run did not publish, or if a role has none."""
    roles = config.agent_roles.roles
    owners = {role: settings.adapter or role for role, settings in roles.items() if not settings.frozen}
    named = dict(_versions(arguments.candidate, "a candidate"))
    if not named and not owners:
        raise CanaryError("no candidate: name one, such as planner@13, or --config FILE with the run's agent_roles")
    if missing := [role for role in owners if named and role not in named and owners[role] not in named]:
        raise CanaryError(
            f"{', '.join(named.values())} leaves out {', '.join(missing)}: the roles of a run were trained together, "
            "so name a version of each"
        )
    found = {}
    for role in owners or named:
        owner = owners.get(role, role)
        name = named.get(role) or named.get(owner) or owner
        found[role] = _published(store, arguments.training, owner, name)
    return found


def _published(store: Store, run: str, owner: str, name: str) -> str:
    """The engines' name of a version that `run` published; the newest if `name` has no number."""
    newest = store.get_resource(f"{run}/{owner}")
    if newest is None:
        raise CanaryError(f"run {run!r} published no adapter of {owner!r} in {store.uri}; see --run, --store, the role")
    number = name.partition("@")[2]
    if number and (not number.isdecimal() or store.get_resource(f"{run}/{owner}", int(number)) is None):
        raise CanaryError(f"run {run!r} published no {name}: its newest version is {owner}@{newest.version}")
    return f"{owner}@{number or newest.version}"


def _versions(texts: Sequence[str], what: str) -> list[tuple[str, str]]:
    """`ROLE@N` or `ROLE=MODEL` as role and the engines' name. Raises CanaryError."""
    found = []
    for text in texts:
        role, _, model = text.partition("=") if "=" in text else (text.partition("@")[0], "", text)
        if not role or not model or ("@" not in text and "=" not in text):
            raise CanaryError(f"{what} is {text!r}, expected ROLE@N, such as planner@12, or ROLE=MODEL")
        found.append((role, model))
    return found


def _status(last: Event, verdict: Verdict) -> list[str]:
    canary, wealth = last.canary, verdict.wealth
    lines = [f"canary {canary.id} {printable(last.summary())}", ""]
    rows = [_HEAD, *(row for day in verdict.days for row in _rows(day))]
    lines += [*align(rows), ""] if verdict.days else []
    promote, guard = canary.settings.promote, canary.settings.guard
    lines += [
        f"rule      days running with a ratio above {promote.policy_improvement_ratio:g}: {verdict.days_running} "
        f"(needed: {promote.days})",
        f"evidence  K reached (needed: {verdict.needed:g}): earns more {wealth.better:.3g}, "
        f"earns less {wealth.worse:.3g}, fails more (by {guard.errors:.0%}) {wealth.errors:.3g}, "
        f"slower (p95 x {guard.p95_latency:g}) {wealth.slow:.3g}",
    ]
    if verdict.observed.in_both_arms:
        lines.append(f"left out  {verdict.observed.in_both_arms} rollouts of users who were in both arms")
    lines += [f"note      {printable(note)}" for note in verdict.notes]
    if last.is_running:
        does = "does" if canary.settings.auto or verdict.action == "stopped" else "would"
        lines.append(f"verdict   {does} {_DUE[verdict.action]}: {printable(verdict.reason)}")
    return lines


def _rows(day: Day) -> list[tuple[str, ...]]:
    ratio = "" if day.ratio is None else f"{day.ratio:+.3f}"
    return [(day.date, *_cells("current", day.current), ""), ("", *_cells("candidate", day.candidate), ratio)]


def _cells(name: str, arm: ArmDay) -> tuple[str, ...]:
    mean = "none" if arm.mean is None else f"{arm.mean:.3f}"
    mean += "" if arm.interval is None else f" ± {arm.interval:.3f}"
    times = ["" if seconds is None else f"{seconds:.2f} s" for seconds in (arm.p50_s, arm.p95_s)]
    return (name, str(arm.rollouts), str(arm.rewards), mean, str(arm.errors), *times)


def _config(arguments: argparse.Namespace) -> Config:
    return Config.load(arguments.config) if arguments.config else Config()


def _uri(arguments: argparse.Namespace) -> SecretUrl:
    return arguments.store or _config(arguments).store_uri


def _person() -> str:
    return f"{getpass.getuser()} on {socket.gethostname()}"
