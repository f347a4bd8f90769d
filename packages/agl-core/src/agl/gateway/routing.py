"""Which engine gets a call, and by which model name."""

import hashlib
from collections.abc import Collection, Mapping, Sequence

from agl.gateway.engine import Engine
from agl.gateway.engine_kind import SHAPES, Shape
from agl.server.api_error import ApiError


class Routes:
    """The engines, and the names that stand for others: `names` maps what clients ask for to what engines know.

    A name is a role, a policy, or what an agent has had in its code all along; it stands for one of the others or for
    a pinned version (`planner` for `planner@12`). The calls of a rollout go to one engine, where the prefix that they
    share is cached.
    """

    def __init__(self, engines: Sequence[Engine], names: Mapping[str, str]) -> None:
        self.engines = tuple(engines)
        self.names = dict(names)

    def resolve(self, model: str) -> str:
        """The name that engines know; a name that stands for another is followed once."""
        return self.names.get(model, model)

    def shape(self, model: str) -> Shape:
        """That of the engines that serve `model`, which the configuration has all of one kind."""
        return next((engine.shape for engine in self.engines if engine.serves(model)), SHAPES["vllm"])

    def choose(self, model: str, rollout: str | None, tried: Collection[Engine] = ()) -> Engine:
        """The engine for a call: of those that serve `model` one that answers, sooner one that was not `tried`.

        Calls of a `rollout` get the same engine as long as it answers (rendezvous hashing); others the one with
        most room. Raises ApiError where no engine serves the model.
        """
        serving = [engine for engine in self.engines if engine.serves(model)]
        if not serving:
            raise self._refuse(model)
        best = min((engine in tried, not engine.answers) for engine in serving)
        equal = [engine for engine in serving if (engine in tried, not engine.answers) == best]
        if len(equal) == 1:
            return equal[0]
        if rollout is None:
            return min(equal, key=lambda engine: (engine.slots.in_use + engine.slots.waiting) / engine.slots.limit)
        return max(equal, key=lambda engine: _weight(engine, rollout))

    def _refuse(self, model: str) -> ApiError:
        if not self.engines:
            return ApiError(
                503, "no_engine", "the gateway has no engine; start it with --upstream URL or train with it"
            )
        return ApiError(404, "model_not_found", f"no engine of the gateway is configured to serve {model!r}")


def _weight(engine: Engine, rollout: str) -> bytes:
    return hashlib.blake2b(f"{engine.url}\0{rollout}".encode(), digest_size=8).digest()
