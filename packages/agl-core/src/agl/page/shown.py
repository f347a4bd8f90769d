"""How values are written on the page. Everything here is text; the templates escape it."""

import hashlib
import json
import shlex
import time
from typing import Any, Final

from markupsafe import Markup

_PICTURES: Final = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
_INVISIBLE: Final = (
    range(0x80, 0xA0),
    (0x061C, 0x200B, 0x200E, 0x200F, 0xFEFF),
    range(0x2028, 0x202F),
    range(0x2060, 0x2070),
    range(0xD800, 0xE000),
)
_VISIBLE: Final = _PICTURES | {code: f"⟨U+{code:04X}⟩" for codes in _INVISIBLE for code in codes}
"""Characters that a browser does not show, that reorder the text around them, or that UTF-8 cannot encode."""
_COLOURS: Final = 8
_MAX_CHARS: Final = 2000
_MAX_BRIEF: Final = 120
_QUESTIONS: Final = ("question", "prompt", "task", "input", "text")
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def visible(value: Any) -> Any:
    """`value` with a visible sign for each invisible character. The templates apply it to everything they print."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value.translate(_VISIBLE)


def colour(name: str) -> str:
    """CSS class of a role's colour, the same on every page."""
    return f"c{hashlib.sha256(name.encode(errors='replace')).digest()[0] % _COLOURS}"


def number(value: float | None, signed: bool = False) -> str:
    """Three significant digits, of 1,000 and more all before the point; a dash for no value."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    text = f"{value:{sign},.0f}" if abs(value) >= 999.5 else f"{value:{sign}.3g}"
    return text.replace("e-0", "e-").replace("-", "\u2212")


def ago(time_ns: int) -> str:
    """`3 min ago`; `now` for less than a second."""
    seconds = time.time() - time_ns / 1e9
    return next((f"{seconds / size:.0f} {unit} ago" for size, unit in _UNITS if seconds >= size), "now")


def moment(time_ns: int) -> str:
    """ISO 8601 in UTC, which the script writes in the reader's time zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(min(max(time_ns / 1e9, 0), 253_402_300_799)))


def duration(ns: float) -> str:
    """`340 ms`, `1.24 s`, `2 min 5 s`."""
    if ns < 1e9:
        return f"{ns / 1e6:.0f} ms" if ns >= 1e6 else "<1 ms"
    minutes, seconds = divmod(ns / 1e9, 60)
    return f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.2f} s"


def quoted(text: str) -> str:
    """`text` as a word of a shell's command."""
    return shlex.quote(text)


def cut(text: str) -> str:
    """At most the first 2,000 characters."""
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}… ({len(text) - _MAX_CHARS:,} more characters)"


def pretty(value: Any) -> str:
    """A JSON value in lines; a text as it is."""
    return cut(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False))


def brief(value: Any) -> str:
    """A JSON value on one line; of an object that has a question or the like, that."""
    if isinstance(value, dict):
        value = next((value[name] for name in _QUESTIONS if isinstance(value.get(name), str)), value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_BRIEF else f"{text[:_MAX_BRIEF]}…"


def literal(text: str) -> str:
    """`text` in quotes, with an escape for each line break and the like."""
    return json.dumps(text, ensure_ascii=False)


FILTERS: Final = {
    "literal": literal,
    "cut": cut,
    "pretty": pretty,
    "brief": brief,
    "quoted": quoted,
    "colour": colour,
    "number": number,
    "ago": ago,
    "moment": moment,
    "duration": duration,
}
