"""Which arm of a canary a user or a rollout is in: decided by a hash, so that all gateways decide alike."""

import hashlib
from typing import Final

_BYTES: Final = 7


def hash_key(canary_id: str, key: str) -> str:
    """56 bits of a hash of `key`, as 14 hexadecimal digits. The id is the salt: each canary has other users."""
    return hashlib.sha256(f"{canary_id}\0{key}".encode("utf-8", "surrogatepass")).digest()[:_BYTES].hex()


def is_candidate(hashed: str, fraction: float) -> bool:
    """Whether the key with this hash gets the candidate. A larger fraction takes it from nobody who has it."""
    return int(hashed, 16) < fraction * 2 ** (8 * _BYTES)
