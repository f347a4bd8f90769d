"""Agents that only know the OpenAI client, with tasks so simple that a random model learns them in seconds."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai

import agl

Task = dict[str, Any]

WORDS = ["apple", "bread", "cloud", "dance", "eagle", "flame", "grape", "house"]


def tasks() -> list[Task]:
    return [{"id": word, "question": f"Say {word}."} for word in WORDS]


def few_tasks() -> list[Task]:
    return tasks()[:3]


def moody_tasks() -> list[Task]:
    moods = ["", "raise", "hang at once", "hang later"] * 2
    return [task | {"mood": mood} for task, mood in zip(tasks(), moods, strict=True)]


def examples() -> list[dict[str, Any]]:
    return [
        {"role": "solver", "messages": messages(task), "completion": f"{task['id']} {task['id']}"} for task in tasks()
    ]


def few_examples() -> list[dict[str, Any]]:
    return examples()[:3]


def messages(task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task["question"]}]


def answer(task: Task, role: str = "solver") -> str:
    """One call. The headers say to which rollout it belongs; a framework's instrumentor would send them too."""
    plain = openai.DefaultHttpxClient(verify=False)  # reading certificates takes as long as the call
    with openai.OpenAI(default_headers=agl.headers(), max_retries=0, http_client=plain) as client:
        reply = client.chat.completions.create(model=role, messages=messages(task))
    return reply.choices[0].message.content or ""


async def async_answer(task: Task) -> str:
    async with openai.AsyncOpenAI(default_headers=agl.headers(), max_retries=0) as client:
        reply = await client.chat.completions.create(model="solver", messages=messages(task))  # type: ignore[arg-type]
    return reply.choices[0].message.content or ""


def answer_with_seed(task: Task) -> str:
    """As `answer`, but the agent has its own idea of a seed."""
    with openai.OpenAI(default_headers=agl.headers(), max_retries=0) as client:
        reply = client.chat.completions.create(model="solver", messages=messages(task), seed=42)  # type: ignore[arg-type]
    return reply.choices[0].message.content or ""


def best_of_three(task: Task) -> str:
    """The longest of three choices, each of which ends at the first vowel."""
    with openai.OpenAI(default_headers=agl.headers(), max_retries=0) as client:
        asked: dict[str, Any] = {"n": 3, "stop": ["a", "e", "i", "o"], "temperature": 0.1, "top_p": 0.5}
        reply = client.chat.completions.create(model="solver", messages=messages(task), **asked)  # type: ignore[arg-type]
    return max((choice.message.content or "" for choice in reply.choices), key=len)


def no_answer(task: Task) -> str:
    raise RuntimeError("no database")


def answer_of_nobody(task: Task) -> str:
    """It asks for a model that nobody serves, and hides the error."""
    try:
        return answer(task, "nobody")
    except openai.NotFoundError:
        return "sorry"


def answer_with_a_reward_but_for_the_first(task: Task) -> str:
    text = answer(task)
    if task["id"] != WORDS[0]:
        agl.emit_reward(letters(task, text))
    return text


def answer_from_elsewhere(task: Task) -> str:
    os.chdir("/")
    return answer(task)


release = threading.Event()
"""Set at the end of a test, so that what hangs ends with it."""


def moody_answer(task: Task) -> str:
    if task["mood"] == "hang at once":
        release.wait()
    text = answer(task)
    if task["mood"] == "hang later":
        release.wait()
    if task["mood"] == "raise":
        raise RuntimeError(f"no {task['id']} today")
    return text


def answer_or_kill_the_runner_once(task: Task) -> str:
    """The first runner that comes here is killed."""
    with suppress(FileExistsError):
        with (Path(os.environ["AGL_TEST_FOLDER"]) / "killed").open("x") as file:
            file.write(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(task)


def answer_or_kill_the_actor_once(task: Task) -> str:
    """The first runner that comes here kills the actor of Ray that has started it, and dies with it."""
    with suppress(FileExistsError):
        with (Path(os.environ["AGL_TEST_FOLDER"]) / "killed").open("x") as file:
            file.write(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
    return answer(task)


def judge_answer(task: Task) -> str:
    return answer(task, "judge")


def held_answer(task: Task) -> str:
    """The first task's is held until its release."""
    if task["id"] == WORDS[0]:
        release.wait(30)
    return answer(task)


interrupt_after: list[int] = []
"""How many more answers until the agent presses Ctrl-C; empty: never."""


def interrupted_answer(task: Task) -> str:
    text = answer(task)
    if interrupt_after:
        interrupt_after[0] -= 1
        if interrupt_after[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
    return text


def flat(task: Task, text: str) -> float:
    """The same for every answer."""
    return 1.0


def infinite(task: Task, text: str) -> float:
    return float("inf")


held_out_rewards: list[float] = []
"""What the evaluations to come shall say, one after the other."""


def held_out_tasks() -> list[Task]:
    return [tasks()[0] | {"held_out": True}]


def letters_or_as_planned(task: Task, text: str) -> float:
    return held_out_rewards.pop(0) if "held_out" in task else letters(task, text)


def letters(task: Task, text: str) -> float:
    """The share of the answer that is plain letters: about a third by chance."""
    return sum(character.isascii() and character.isalpha() for character in text) / max(len(text), 1)


def answer_of_two(task: Task) -> str:
    """One call of each of two roles; the second reads what the first has said."""
    plan = answer(task, "planner")
    return plan + answer({"question": f"{task['question']} Plan: {plan}"}, "executor")


def examples_of_two() -> list[dict[str, Any]]:
    return [example | {"role": role} for example in few_examples() for role in ("planner", "executor")]
