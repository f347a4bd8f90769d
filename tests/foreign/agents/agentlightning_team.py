"""The team on the plain OpenAI client, traced by agentlightning 0.3, which uses our collector as its store.

Two rewards: 0.5 for the run, and 0.25 for the plan, linked by response id as its users do.
"""

import asyncio
import os
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# The root of the package would import its servers and trainers and their dependencies.
package = ModuleType("agentlightning")
package.__path__ = list(find_spec("agentlightning").submodule_search_locations)
sys.modules["agentlightning"] = package

from agentlightning.emitter import emit_reward  # noqa: E402
from agentlightning.store.base import LightningStore, LightningStoreCapabilities  # noqa: E402
from agentlightning.tracer import AgentOpsTracer  # noqa: E402
from agentlightning.utils.otel import make_link_attributes  # noqa: E402
from agentops.sdk.decorators import agent  # noqa: E402
from openai import OpenAI  # noqa: E402
from openai.types.chat import ChatCompletion  # noqa: E402

QUESTION = "How many mugs?"
CAPTURE: dict[str, Any] = {"logprobs": True, "extra_body": {"return_token_ids": True}}
PARAMETERS = {"type": "object", "properties": {"item": {"type": "string"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "count_stock", "parameters": PARAMETERS}}]


class Collector(LightningStore):
    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return LightningStoreCapabilities(thread_safe=True, async_safe=True, zero_copy=True, otlp_traces=True)

    def otlp_traces_endpoint(self) -> str:
        return f"{os.environ['OTEL_EXPORTER_OTLP_ENDPOINT']}/v1/traces"


@agent(name="planner")
def plan(client: OpenAI, question: str) -> ChatCompletion:
    messages: Any = [{"role": "system", "content": "You plan."}, {"role": "user", "content": question}]
    return client.chat.completions.create(model="team@3", messages=messages, **CAPTURE)


@agent(name="executor")
def execute(client: OpenAI, plan: str) -> None:
    messages: Any = [{"role": "system", "content": "You do."}, {"role": "user", "content": plan}]
    answer = client.chat.completions.create(model="team@3", messages=messages, tools=TOOLS, **CAPTURE)
    message = answer.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "7"} for call in message.tool_calls or ()]
    client.chat.completions.create(model="team@3", messages=messages, tools=TOOLS, **CAPTURE)


async def run(rollout_id: str) -> None:
    tracer = AgentOpsTracer()
    tracer.init_worker(0, Collector())
    with OpenAI() as client:
        async with tracer.trace_context(rollout_id=rollout_id, attempt_id=f"{rollout_id}-a1"):
            answer = plan(client, QUESTION)
            execute(client, answer.choices[0].message.content or "")
            emit_reward(0.25, attributes=make_link_attributes({"gen_ai.response.id": answer.id}))
            emit_reward({"goal": 0.5, "brevity": 1}, primary_key="goal")


asyncio.run(run(sys.argv[1]))
