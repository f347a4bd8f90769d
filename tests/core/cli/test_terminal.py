"""Text that others chose cannot steer a terminal, or forge a line of a log."""

import json
import logging

from agl.cli.terminal import LineFormatter, escaped, json_text

FORGED = "r\x1b[2J\nERROR forged\r\x9b31m\u202e\u2028\ud800é"


def test_json_has_no_control_characters_and_the_same_value() -> None:
    text = json_text({"id": FORGED, "é": [1]})
    assert json.loads(text) == {"id": FORGED, "é": [1]}
    assert text == r'{"id": "r\u001b[2J\nERROR forged\r\u009b31m\u202e\u2028\ud800é", "é": [1]}'


def test_a_record_is_one_line_and_its_traceback_is_indented() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("agl", logging.ERROR, __file__, 1, "failed: %s", (FORGED,), info)
    first, *others = LineFormatter("%(levelname)s %(name)s: %(message)s").format(record).split("\n")
    assert first == r"ERROR agl: failed: r\u001b[2J\nERROR forged\u000d\u009b31m\u202e\u2028\ud800é"
    assert others[-1] == r"  ERROR forged\u000d\u009b31m\u202e\u2028\ud800é"
    assert not [line for line in others[1:] if not line.startswith("  ")]


def test_escaped_keeps_line_breaks_and_what_is_visible() -> None:
    assert escaped("a: 1\nb: é 日本 👍") == "a: 1\nb: é 日本 👍"
