"""Whether a Redis keeps what it acknowledges, by its settings."""

import logging
from collections.abc import Mapping
from typing import Final

from redis import Redis
from redis.exceptions import ResponseError

from agl.config import Appendfsync
from agl.errors import QueueError

logger = logging.getLogger(__name__)

_STRENGTH: Final = {"no": 0, "everysec": 1, "always": 2}


def check_durability(redis: Redis, weakest: Appendfsync) -> None:
    """Warn of what `redis` may lose after it has acknowledged it. Raises QueueError where that is too much.

    Too much: no append-only file, one that is flushed less than `weakest` asks for, keys evicted for want of memory.
    """
    try:
        told = redis.config_get("append*") | redis.config_get("maxmemory*")
    except ResponseError as error:
        logger.warning("this Redis does not tell whether its append-only file is on (%s): make sure that it is", error)
        return
    settings = {str(name): str(value) for name, value in told.items()}
    refusal = _refusal(settings, weakest)
    if refusal:
        raise QueueError(f"this Redis may lose spans that were acknowledged: {refusal}")
    if settings["appendfsync"] == "everysec":
        logger.warning(
            "appendfsync is everysec: up to two seconds of acknowledged spans are lost when the machine stops, "
            "or Redis is killed while its disk is slow; with `always` none are"
        )


def _refusal(settings: Mapping[str, str], weakest: Appendfsync) -> str | None:
    if settings["appendonly"] != "yes":
        return "it keeps no append-only file; start it with `--appendonly yes`"
    fsync = settings["appendfsync"]
    if _STRENGTH[fsync] < _STRENGTH[weakest]:
        return f"its appendfsync is {fsync}; set it to {weakest}, or queue.appendfsync to less"
    policy = settings["maxmemory-policy"]
    if settings["maxmemory"] != "0" and policy.startswith("allkeys"):
        return f"out of memory, it evicts keys (maxmemory-policy {policy}); set it to noeviction"
    return None
