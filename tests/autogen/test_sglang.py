"""Token ids in the form of SGLang, without a gateway."""

import pytest

from agl.server.app_thread import AppThread
from agl.tokens.packing import pack_ids, pack_logprobs
from tests.autogen.span_tree import attributes, only
from tests.autogen.test_token_ids import ask
from tests.core.fake_engine import PROMPT_IDS, WORDS, logprob, token_id
from tests.gateway.sglang_engine import SglangEngine


@pytest.mark.parametrize("stream", [False, True])
async def test_ids_in_the_form_of_sglang_are_on_the_span(spans, client, stream):
    """SGLang returns ids in `sglext` on request; of a stream, in a chunk after the last choice."""
    asked = {"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True}
    thread = AppThread()
    url = thread.add(SglangEngine().app)
    with thread:
        planner = client("planner", base_url=f"{url}/v1", extra_body=asked, logprobs=True)
        result = await ask(planner, stream=stream)

    span = attributes(only(spans.get_finished_spans(), "chat planner"))
    assert span["agl.prompt.token_ids"] == pack_ids(PROMPT_IDS)
    assert span["agl.response.token_ids"] == pack_ids([token_id(0, place) for place in range(3)])
    assert span["agl.response.logprobs"] == pack_logprobs([logprob(0, place) for place in range(3)])
    assert result.content == "".join(WORDS)
