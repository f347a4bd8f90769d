"""The team on LangGraph with our own plug-in, the reference for the others."""

import os

from exporting import QUESTION
from langgraph_team import run

import agl
from agl_langchain import LangChainInstrumentor

agl.init()
LangChainInstrumentor().instrument()
with agl.rollout(os.environ["ROLLOUT"]):
    run(QUESTION)
    agl.emit_reward(0.5)
