"""Checks the settings of a Redis server for whether it may lose acknowledged spans."""

import logging
from collections.abc import Mapping
from typing import Final

from redis import Redis
from redis.exceptions import ResponseError

from agl.config.queue import Appendfsync
from agl.errors import QueueError

logger = logging.getLogger(__name__)

_STRENGTH: Final = {"no": 0, "everysec": 1, "always": 2}


def check_durability(redis: Redis, weakest: Appendfsync) -> None:
    """Raise QueueError if `redis` may lose more than `weakest` allows; log a warning if it may lose anything.

    Too much is no append-only file, one flushed less often than `weakest`, or eviction of keys when memory is full.
    """
    try:
        found = redis.config_get("append*") | redis.config_get("maxmemory*")
    except ResponseError as error:
        logger.warning("this Redis does not report its settings (%s): make sure that `appendonly` is yes", error)
        return
    settings = {str(name): str(value) for name, value in found.items()}
    risk = _unacceptable_risk(settings, weakest)
    if risk:
        raise QueueError(f"this Redis may lose spans that were acknowledged: {risk}")
    if settings["appendfsync"] == "everysec":
        logger.warning(
            "appendfsync is everysec: up to two seconds of acknowledged spans are lost if the machine stops, "
            "or if Redis is killed while its disk is slow; set it to always to lose none"
        )


def _unacceptable_risk(settings: Mapping[str, str], weakest: Appendfsync) -> str | None:
    if settings["appendonly"] != "yes":
        return "it keeps no append-only file; start it with `--appendonly yes`"
    fsync = settings["appendfsync"]
    if _STRENGTH[fsync] < _STRENGTH[weakest]:
        return f"its appendfsync is {fsync}; set it to {weakest}, or queue.appendfsync to less"
    policy = settings["maxmemory-policy"]
    if settings["maxmemory"] != "0" and policy.startswith("allkeys"):
        return f"out of memory, it evicts keys (maxmemory-policy {policy}); set it to noeviction"
    return None
