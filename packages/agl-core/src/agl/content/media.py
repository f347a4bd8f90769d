"""Large content: media become references to bytes that are stored once, and text beyond a limit is cut."""

import base64
import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from agl import semconv
from agl.content.redaction import map_texts

Value = TypeVar("Value")

MIN_CHARACTERS = 4096
"""Shorter media (icons) stay in the text."""
MAX_BYTES = 1 << 20
"""Default limit of a text in a message, an argument or a result."""
MAX_TEXTS = 16
"""An attribute holds at most this many times the limit of a text."""
MAX_KEPT = 100_000

_DATA = rf"([\w+/=\\-]{{{MIN_CHARACTERS},}})"
# No colon before the data: else the time would grow with the square of the number of `data:` in a text.
_DATA_URL = re.compile(rf'data:([^:;,"\s]*)(?:;[^:;,"\s]+)*;base64,{_DATA}', re.ASCII)
_FIELD = re.compile(rf'("(?:data|base64|b64_json|file_data|bytes|blob)"\s*:\s*"){_DATA}(?=")', re.ASCII)
_PART = re.compile(r"[\w+/=\\-]{64}", re.ASCII)
_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"%PDF": "application/pdf",
    b"OggS": "audio/ogg",
    b"ID3": "audio/mpeg",
}
"""First bytes of media whose field states no type."""


class _StoredMedia:
    """Which media need not be sent again, of the latest rollouts. The store keeps those that are sent twice once."""

    def __init__(self) -> None:
        self._stored: OrderedDict[tuple[object, str], None] = OrderedDict()
        self._lock = threading.Lock()

    def has(self, rollout: object, name: str) -> bool:
        with self._lock:
            return (rollout, name) in self._stored

    def add(self, rollout: object, name: str) -> None:
        with self._lock:
            self._stored[rollout, name] = None
            if len(self._stored) > MAX_KEPT:
                self._stored.popitem(last=False)


_STORED = _StoredMedia()


def referenced(
    attributes: Mapping[str, Value], rollout: Callable[[], object], max_bytes: int
) -> tuple[Mapping[str, Value | str], dict[str, bytes]]:
    """`attributes` with their texts `shortened`, and attributes for the bytes that `note_stored` does not know."""
    media: dict[str, bytes] = {}
    short: dict[str, str] = {}
    for key, text in attributes.items():
        if isinstance(text, str) and len(text) >= MIN_CHARACTERS:
            short[key], found = shortened(text, max_bytes)
            media |= found
    if not media:
        return {**attributes, **short}, {}
    within = rollout()
    named = {semconv.MEDIA + digest: data for digest, data in media.items()}
    return {**attributes, **short}, {name: data for name, data in named.items() if not _STORED.has(within, name)}


def note_stored(rollout: object, media: Iterable[str]) -> None:
    """The attributes `media` need not be sent again for `rollout`; None: it is not known."""
    for name in media if rollout is not None else ():
        _STORED.add(rollout, name)


def shortened(text: str, max_bytes: int = MAX_BYTES) -> tuple[str, dict[str, bytes]]:
    """`text`, JSON or not, with references in place of media, and the bytes of these by their SHA-256.

    A reference is `media:<type>;bytes=<number>;sha256=<digest>`. Texts beyond `max_bytes` are cut.
    """
    if len(text) < MIN_CHARACTERS:
        return text, {}
    media: dict[str, bytes] = {}
    if _may_hold_media(text):
        text = _DATA_URL.sub(lambda found: _reference(found[2], found[1].replace("\\", ""), media) or found[0], text)
        text = _FIELD.sub(lambda found: found[1] + (_reference(found[2], "", media) or found[2]), text)
    return (text if len(text) <= max_bytes // 4 else _cut_texts(text, max_bytes)), media


def _may_hold_media(text: str) -> bool:
    """Whether a part of `text` looks like base64. Looks at a few places, one of which is in any media: it is called for
    each model call, and the expressions above would take as long as the rest of its span."""
    for place in range(0, len(text), MIN_CHARACTERS // 2):  # noqa: SIM110 - `any` takes twice as long
        if _PART.match(text, place):
            return True
    return False


def _reference(encoded: str, kind: str, media: dict[str, bytes]) -> str | None:
    """The reference in place of base64 data, whose bytes are added to `media`; None if it is not base64."""
    encoded = encoded.replace("\\n", "").replace("\\/", "/").rstrip("=")
    try:
        data = base64.b64decode(encoded.translate(_URL_SAFE) + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        return None
    digest = hashlib.sha256(data).hexdigest()
    media[digest] = data
    kind = kind or next((kind for start, kind in _TYPES.items() if data.startswith(start)), "application/octet-stream")
    return f"media:{kind};bytes={len(data)};sha256={digest}"


_URL_SAFE = str.maketrans("-_", "+/")


def _cut_texts(text: str, max_bytes: int) -> str:
    """`text` with each string in it cut, if it is JSON; else itself cut."""
    if not text.startswith(("{", "[", '"')):
        return _cut(text, max_bytes)
    try:
        cut = map_texts(json.loads(text), lambda part: _cut(part, max_bytes))
        text = json.dumps(cut, ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        return _cut(text, max_bytes)
    return text if len(text) <= MAX_TEXTS * max_bytes else json.dumps(_cut(text, max_bytes))


def _cut(text: str, max_bytes: int) -> str:
    encoded = text.encode(errors="backslashreplace") if len(text) > max_bytes // 4 else b""
    if len(encoded) <= max_bytes:
        return text
    return f"{encoded[:max_bytes].decode(errors='ignore')}... (cut: {len(encoded)} bytes)"
