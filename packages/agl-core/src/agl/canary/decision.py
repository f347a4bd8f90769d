"""Start, promotion and rollback of a canary: each appends one event to the history in the store."""

import secrets
from collections.abc import Mapping
from typing import Any

from agl.canary.history import Canary, Event, EventKind, Share, append_event, last_event
from agl.canary.verdict import Verdict, judge
from agl.config import CanaryConfig
from agl.errors import CanaryError
from agl.store import Store


def start(
    store: Store,
    candidate: Mapping[str, str],
    current: Mapping[str, str],
    settings: CanaryConfig,
    by: str,
    now_ns: int,
) -> Event:
    """Give the versions of `candidate`, by role, their share of production. `current` has those that the store does
    not know yet. The same canary with a larger fraction raises it. Raises CanaryError.
    """
    last = last_event(store)
    if last is not None and last.is_running:
        return _raise_fraction(store, last, candidate, settings, by, now_ns)
    known = last.versions if last else {}
    if wrong := [role for role in current if role in known and known[role] != current[role]]:
        raise CanaryError(
            f"--current says that {current[wrong[0]]} answers {wrong[0]}, but by the history of the store "
            f"{known[wrong[0]]} does, and starting a canary changes no other production: leave --current out for it"
        )
    versions = {**known, **current}
    _check_versions(candidate, versions)
    canary = Canary(
        id=secrets.token_hex(6),
        candidate=dict(candidate),
        current={role: versions[role] for role in candidate},
        shares=[Share(since_ns=now_ns, fraction=settings.fraction)],
        settings=settings,
    )
    reason = f"a share of {settings.fraction:g} by {settings.key}"
    return _append(store, last, "started", canary, versions, by, now_ns, reason)


def end(
    store: Store, last: Event, kind: EventKind, by: str, reason: str, now_ns: int, evidence: Mapping[str, Any]
) -> Event:
    """`promoted`: the candidate of `last` answers all of production; `rolled_back` or `stopped`: the versions before
    it do. Raises CanaryError if `last` is not the last event any more.
    """
    canary = last.canary
    versions = {**last.versions, **(canary.candidate if kind == "promoted" else canary.current)}
    return _append(store, last, kind, canary, versions, by, now_ns, reason, evidence)


def running(store: Store) -> Event:
    """The last event of the canary that runs. Raises CanaryError if none does."""
    last = last_event(store)
    if last is None or not last.is_running:
        before = f"; the last one was {last.summary()}" if last else ""
        raise CanaryError(f"no canary runs: begin one with `agl canary start`{before}")
    return last


def check(store: Store, by: str, now_ns: int) -> tuple[Verdict, Event | None]:
    """Judge the running canary, and do what the verdict says where that needs nobody: with `auto`, and a stop always.

    Raises CanaryError if no canary runs, or for a reward out of range.
    """
    event = running(store)
    verdict = judge(store, event, now_ns)
    if verdict.action == "wait" or not (event.canary.settings.auto or verdict.action == "stopped"):
        return verdict, None
    return verdict, end(store, event, verdict.action, by, verdict.reason, now_ns, verdict.evidence())


def _raise_fraction(
    store: Store, last: Event, candidate: Mapping[str, str], settings: CanaryConfig, by: str, now_ns: int
) -> Event:
    canary, old = last.canary, last.canary.shares[-1].fraction
    if dict(candidate) != dict(canary.candidate):
        raise CanaryError(
            f"another canary runs, {last.summary()}; two at a time would mix their effects: `agl canary promote` or "
            "`agl canary rollback` first"
        )
    if settings.fraction <= old:
        raise CanaryError(
            f"this canary runs with the fraction {old:g}, and {settings.fraction:g} would take the candidate from "
            "users who have it: give a larger fraction, or `agl canary rollback`"
        )
    shares = [*canary.shares, Share(since_ns=now_ns, fraction=settings.fraction)]
    raised = canary.model_copy(update={"shares": shares})
    reason = f"the fraction was {old:g} and is {settings.fraction:g}"
    return _append(store, last, "raised", raised, last.versions, by, now_ns, reason)


def _check_versions(candidate: Mapping[str, str], versions: Mapping[str, str]) -> None:
    if not candidate:
        raise CanaryError("the canary has no candidate: name one, such as planner@13, or the run that trained it")
    for role, name in candidate.items():
        if role not in versions:
            raise CanaryError(
                f"the store does not know which version answers {role} now: add --current {role}@N, or "
                f"--current {role}=MODEL if a model without adapter does"
            )
        if versions[role] == name:
            raise CanaryError(
                f"the candidate {name} is the version that answers {role} now: name a newer one, or train one"
            )


def _append(
    store: Store,
    last: Event | None,
    kind: EventKind,
    canary: Canary,
    versions: Mapping[str, str],
    by: str,
    now_ns: int,
    reason: str,
    evidence: Mapping[str, Any] | None = None,
) -> Event:
    number = last.number + 1 if last else 0
    event = Event(
        number=number,
        kind=kind,
        at_ns=now_ns,
        by=by,
        reason=reason,
        versions=dict(versions),
        canary=canary,
        evidence=evidence or {},
    )
    append_event(store, event)
    return event
