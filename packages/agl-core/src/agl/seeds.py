"""Seeds of the random choices of a training, all derived from `train.seed`."""

import hashlib
import json


def derive(seed: int, purpose: str, *parts: str | int) -> int:
    """A seed of 31 bits for one choice of `purpose`, e.g. `order`; `parts` identify the choice, e.g. the epoch.

    Equal arguments give equal seeds on every machine, different arguments independent ones.
    """
    digest = hashlib.sha256(json.dumps([seed, purpose, *parts]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
