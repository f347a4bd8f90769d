"""Media and texts that are too large for each span."""

import base64
import hashlib
import json
import random
import time
from typing import Any

import pytest

from agl import semconv
from agl.content.filter import ContentFilter
from agl.content.media import MAX_BYTES, MIN_CHARACTERS, note_stored, referenced, shortened

PICTURE = b"\x89PNG" + random.Random(0).randbytes(20_000)
DIGEST = hashlib.sha256(PICTURE).hexdigest()
DATA = base64.b64encode(PICTURE).decode()
REFERENCE = f"media:image/png;bytes=20004;sha256={DIGEST}"
URL = f"data:image/png;base64,{DATA}"


@pytest.mark.parametrize(
    ("value", "short"),
    [
        ({"type": "uri", "uri": URL}, {"type": "uri", "uri": REFERENCE}),
        ({"image_url": {"url": URL.replace(";", ";charset=utf-8;", 1)}}, {"image_url": {"url": REFERENCE}}),
        ({"type": "image", "base64": DATA}, {"type": "image", "base64": REFERENCE}),
        ({"source": {"type": "base64", "data": DATA}}, {"source": {"type": "base64", "data": REFERENCE}}),
        ({"data": base64.urlsafe_b64encode(PICTURE).decode()}, {"data": REFERENCE}),
        ({"data": base64.encodebytes(PICTURE).decode()}, {"data": REFERENCE}),
        ({"text": f"![plan]({URL}) and {URL}"}, {"text": f"![plan]({REFERENCE}) and {REFERENCE}"}),
        ([{"content": "x" * 5000}, URL], [{"content": "x" * 5000}, REFERENCE]),
    ],
)
@pytest.mark.parametrize("write", [json.dumps, lambda value: json.dumps(value).replace("/", "\\/")])
def test_media_become_a_reference_and_their_bytes(value: Any, short: Any, write: Any) -> None:
    text, media = shortened(write(value))

    assert json.loads(text) == short
    assert media == {DIGEST: PICTURE}


@pytest.mark.parametrize("value", ["data:text/plain;base64,", DATA[: MIN_CHARACTERS - 1], "word " * 5000, "a" * 5000])
def test_other_texts_stay(value: str) -> None:
    text = json.dumps([{"data": f"{value}!", "uri": value}])

    assert shortened(text) == (text, {})


def test_the_bytes_are_sent_until_they_are_stored_for_the_rollout() -> None:
    found = []
    for rollout in ("once-1", "once-1", "once-2", None, None):
        attributes, media = referenced({"a": URL, "b": URL}, lambda rollout=rollout: rollout, MAX_BYTES)
        assert attributes == {"a": REFERENCE, "b": REFERENCE}
        found.append(media)
        note_stored(rollout, media)

    sent = {semconv.MEDIA + DIGEST: PICTURE}
    assert found == [sent, {}, sent, sent, sent]


def test_the_bytes_are_not_stored_if_content_is_redacted() -> None:
    content = ContentFilter(redact=lambda text: text)

    assert content.filtered(lambda: {semconv.GEN_AI_RETRIEVAL_QUERY_TEXT: URL}) == {
        semconv.GEN_AI_RETRIEVAL_QUERY_TEXT: REFERENCE
    }


def test_text_beyond_the_limit_is_cut_and_its_length_stated() -> None:
    text, _ = shortened(json.dumps([{"content": "für " * 5000, "n": 1}, "short"], ensure_ascii=False), 10_000)
    plain, _ = shortened("y" * 20_000, 10_000)
    many, _ = shortened(json.dumps(list(range(100_000))), 10_000)

    long, short = json.loads(text)
    assert long["content"].endswith("... (cut: 25000 bytes)") and len(long["content"].encode()) < 10_100
    assert (long["n"], short) == (1, "short")
    assert plain == "y" * 10_000 + "... (cut: 20000 bytes)"
    assert json.loads(many).endswith("... (cut: 588891 bytes)")


@pytest.mark.parametrize("unit", ["data:;", "data:a;b", "data:", "data:;base64,", '"data":"', '"data": '])
def test_the_time_grows_with_the_length_of_a_text_and_not_with_its_square(unit: str) -> None:
    text = "A" * 64 + unit * 40_000
    before = time.process_time()
    assert shortened(text)[1] == {}
    assert time.process_time() - before < 5, "it took a minute"
