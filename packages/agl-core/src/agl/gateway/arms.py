"""Which versions answer production: those of the store's last canary event, and for a running rollout its first one's.

A rollout keeps its versions in any gateway and after a restart, because its first call's span has the event and the
arm.
"""

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Final

from agl import semconv
from agl.canary.assignment import hash_key, is_candidate
from agl.canary.decision import end
from agl.canary.history import Event, event_at, last_event
from agl.canary.observation import CANDIDATE, CURRENT, Unproved, unproved_call
from agl.config.section import DEFAULT_PROJECT
from agl.errors import AglError
from agl.gateway.record import version_under
from agl.gateway.request import Caller
from agl.span import AttributeValue, Span, now_ns
from agl.store import Store
from agl.tokens.capture import Json

logger = logging.getLogger(__name__)

_POLL_S: Final = 1.0
_ROLLOUTS_REMEMBERED: Final = 65_536
_BY: Final = "a gateway"


@dataclass(frozen=True, slots=True)
class Arm:
    """The arm of a rollout, and the event whose versions answer it."""

    event: Event
    key: str
    """Hash of what the arm was chosen by."""
    is_candidate: bool

    @property
    def versions(self) -> Mapping[str, str]:
        return self.event.arm_versions(self.is_candidate)

    def attributes(self, policy: str, engine_model: str) -> dict[str, AttributeValue]:
        """Attributes of the spans of a call to `policy`, for which the engine is asked for `engine_model`."""
        found: dict[str, AttributeValue] = {semconv.CANARY_EVENT: self.event.number}
        if self.event.is_running:
            found[semconv.CANARY_ID] = self.event.canary.id
            found[semconv.CANARY_ARM] = CANDIDATE if self.is_candidate else CURRENT
            found[semconv.CANARY_KEY] = self.key
            if policy in self.event.canary.candidate:
                found[semconv.CANARY_VERSION] = version_under(policy, engine_model)
        return found


class Arms:
    """The arms of the rollouts in production of the default project, whose store is `store`.

    It follows the events of the store a second behind.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: Event | None = None
        self._known: OrderedDict[str, Arm | None] = OrderedDict()
        """By rollout; None for one that began before the first canary."""

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions that answer production outside of a candidate's share."""
        return self._last.versions if self._last else {}

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Read the last event now, and again every second."""
        await self._read()
        poll = asyncio.create_task(self._poll())
        try:
            yield
        finally:
            poll.cancel()
            with suppress(asyncio.CancelledError):
                await poll

    async def arm(self, caller: Caller, body: Json) -> Arm | None:
        """The arm of a call; None outside of production, for another project, without canaries, or if its rollout began
        before the first.
        """
        last, rollout_id = self._last, caller.rollout_id or caller.trace_id
        if last is None or caller.mode != "prod" or caller.project != DEFAULT_PROJECT:
            return None
        chosen = _choose(last, caller, body, rollout_id or uuid.uuid4().hex)
        if rollout_id is None:
            return chosen
        if rollout_id not in self._known:
            self._known.setdefault(rollout_id, await asyncio.to_thread(self._first_arm, rollout_id, chosen))
            if len(self._known) > _ROLLOUTS_REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(rollout_id)
        return self._known[rollout_id]

    async def prove(self, spans: Sequence[Span]) -> None:
        """Stop the canary if a version other than that of its arm answered the call of `spans`."""
        for span in spans:
            found, last = unproved_call(span.rollout_id or span.trace_id, span), self._last
            if found is None or last is None or not last.is_running:
                continue
            if span.text(semconv.CANARY_ID) == last.canary.id:  # not a call of a rollout that an earlier canary began
                await asyncio.to_thread(self._stop, last, found)
                await self._read()

    def _stop(self, event: Event, call: Unproved) -> None:
        reason = (
            f"{call.answered} answered in place of {call.expected}: see that every engine has loaded it "
            f"(call {call.span_id} of rollout {call.rollout_id})"
        )
        try:
            end(self._store, event, "stopped", _BY, reason, now_ns(), {"unproved": [asdict(call)]})
            logger.error("the canary is stopped: %s", reason)
        except AglError as error:
            logger.error("%s; %s", reason, error)

    def _first_arm(self, rollout_id: str, chosen: Arm) -> Arm | None:
        """The arm that the spans of a rollout have; `chosen` if it has none yet."""
        try:
            spans = self._store.query_spans(rollout_id)
            call = next((span for span in spans if span.name == semconv.SPAN_GATEWAY_CALL), None)
            number = call and call.number(semconv.CANARY_EVENT)
            event = None if number is None else event_at(self._store, int(number))
        except AglError as error:
            logger.error("the arm of rollout %s is chosen as if it began now: %s", rollout_id, error)
            return chosen
        if call is None or event is None:
            return None if call else chosen
        return Arm(event, call.text(semconv.CANARY_KEY) or chosen.key, call.text(semconv.CANARY_ARM) == CANDIDATE)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            await self._read()

    async def _read(self) -> None:
        try:
            self._last = await asyncio.to_thread(last_event, self._store)
        except AglError as error:
            logger.error("the gateway goes on with the versions that it knows: %s", error)


def _choose(event: Event, caller: Caller, body: Json, rollout_id: str) -> Arm:
    canary = event.canary
    user = user_of(caller, body) if canary.settings.key == "user" else None
    key = hash_key(canary.id, f"user {user}" if user else f"rollout {rollout_id}")
    return Arm(event, key, event.is_running and is_candidate(key, canary.shares[-1].fraction))


def user_of(caller: Caller, body: Json) -> str | None:
    """Whom a call serves, by its headers, else by the field that the client's API has for it."""
    metadata = body.get("metadata")
    named = (
        caller.user,
        body.get("user"),
        body.get("safety_identifier"),  # OpenAI's new name for it.
        metadata.get("user_id") if isinstance(metadata, dict) else None,  # Anthropic's.
    )
    return next((user for user in named if isinstance(user, str) and user), None)
