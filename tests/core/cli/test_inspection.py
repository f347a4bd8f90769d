"""The content of `agl inspect`: the tree of a rollout, and the outcome of each call."""

import json
from dataclasses import replace

from agl import semconv
from agl.cli.inspection import Inspection
from agl.cli.terminal import align, duration, printable
from agl.span import Span
from agl.trajectory import DropReason, build_trajectory, trained_span
from tests.core.span_maker import OTHER_TRACE, chat, gateway_call, reward, span


def team() -> list[Span]:
    """A planner through the gateway, a tool that fails, an executor joined across traces, and a call without ids."""
    root = span(
        semconv.SPAN_ROLLOUT, {semconv.GROUP_ID: "task-17", semconv.MODE: "train", semconv.ATTEMPT_ID: "r-1-a1"}
    )
    agent = span("invoke_agent planner", {semconv.GEN_AI_AGENT_NAME: "planner"}, parent=root)
    asked = chat(agent, {semconv.ROLE: "planner"})
    planned = gateway_call(range(412), range(37), parent=asked, version="planner@3")
    tool = span("execute_tool run_sql", parent=root, status="error", message="OperationalError: no such column")
    executor = chat(root, {semconv.ROLE: "executor", semconv.GEN_AI_RESPONSE_ID: "chatcmpl-7"})
    answered = gateway_call(
        range(300),
        range(7),
        trace_id=OTHER_TRACE,
        version="executor@2",
        attributes={semconv.GEN_AI_RESPONSE_ID: "chatcmpl-7"},
    )
    hosted = chat(root, {semconv.ROLE: "critic"})
    outcome = reward(0.8, {"agl.reward.goal": 1.0, "agl.reward.syntax": 0.5}, parent=root)
    return [root, agent, asked, planned, tool, executor, answered, hosted, outcome]


def lines_of(spans: list[Span]) -> list[str]:
    return Inspection(spans).text().splitlines()


def test_the_tree_shows_roles_tokens_versions_errors_and_the_outcome_of_each_call() -> None:
    assert lines_of(team()) == [
        "rollout r-1  attempt r-1-a1  group task-17  mode train",
        "reward 0.8 (goal 1, syntax 0.5)",
        "9 spans in 2 traces; 3 model calls: 2 in 2 rows, 1 dropped (1 no_ids)",
        "",
        "span                       role      tokens  policy      time",
        "agl.rollout                                              250 ms",
        "├─ invoke_agent planner    planner                       250 ms",
        "│  └─ chat writer          planner                       250 ms",
        "│     └─ agl.gateway.call  planner   412+37  planner@3   250 ms  row 1, not trained yet",
        "├─ execute_tool run_sql                                  250 ms  error: OperationalError: no such column",
        "├─ chat writer             executor                      250 ms",
        "│  └─ agl.gateway.call     executor  300+7   executor@2  250 ms  row 2, not trained yet",
        "├─ chat writer             critic    ?                   250 ms  dropped: no_ids",
        "└─ agl.reward                                            250 ms  reward 0.8 (goal 1, syntax 0.5)",
        "",
        "no_ids (1 call): set return_token_ids: point the model's base URL at the gateway; "
        "if it is the gateway's already, its",
        "  span of this call is in another trace: switch on the instrumentor, or that of the HTTP client, or send "
        "agl.headers(),",
        "  which join the two",
    ]


def test_a_call_shows_in_which_step_it_trained_or_why_not() -> None:
    spans = team()
    planner, executor, _ = build_trajectory(spans).calls
    spans += [
        trained_span(planner, 12, 0.8, weight=1 / 64, ratios=(0.75, 1.25)),
        trained_span(executor, 12, None, DropReason.ZERO_ADVANTAGE),
        trained_span(executor, 13, -1.25),
    ]
    notes = [line.split("  ")[-1] for line in lines_of(spans) if "agl.gateway.call" in line]
    assert notes == [
        "row 1, trained in step 12, advantage +0.80, weight 0.016, ratio 0.75 to 1.25",
        "row 2, not trained in step 12: zero_advantage, trained in step 13, advantage -1.25",
    ]
    assert lines_of(spans)[2] == (
        "9 spans in 2 traces; 3 model calls: 2 in 2 rows, 1 dropped (1 no_ids); 2 trained, 1 not (1 no_ids)"
    )
    inspection = Inspection(spans[:-1])
    assert inspection.outcomes == {"trained": 1, "zero_advantage": 1, "no_ids": 1}
    assert inspection.to_json()["ends"] == dict(inspection.outcomes)
    assert inspection.to_json()["calls"][0]["trained"] == [
        {"step": 12, "advantage": 0.8, "reason": None, "weight": 1 / 64, "run": None, "ratios": (0.75, 1.25)}
    ]
    assert Inspection(team()).outcomes == {"pending": 2, "no_ids": 1}


def test_a_call_that_was_not_sampled_freely_shows_what_to_do_once_a_step_left_it_out() -> None:
    call = gateway_call(attributes={semconv.MODE: "train", semconv.GATEWAY_CONSTRAINTS: ["response_format"]})
    (made,) = build_trajectory([call]).calls
    assert lines_of([call])[-1].endswith("row 1, not trained yet")
    lines = lines_of([call, trained_span(made, 1, None, DropReason.CONSTRAINED)])
    assert lines[-5].endswith("row 1, not trained in step 1: constrained")
    assert lines[-3].startswith("constrained (1 call): response_format kept the engine from sampling")


def test_steps_of_several_runs_show_the_name_of_the_run() -> None:
    call = gateway_call(attributes={semconv.MODE: "train"})
    (made,) = build_trajectory([call]).calls
    words = [trained_span(made, 1, 0.5, run=run) for run in ("shop", "again")]
    assert lines_of([call, *words])[-1].endswith(
        "row 1, trained in step 1 of shop, advantage +0.50, trained in step 1 of again, advantage +0.50"
    )
    assert len({word.span_id for word in [*words, trained_span(made, 1, 0.5, run="shop")]}) == 2


def test_a_rollout_that_is_not_for_training_shows_its_mode() -> None:
    call = gateway_call(attributes={semconv.MODE: "eval"})
    assert lines_of([call])[-1].endswith("row 1, not trained on (mode eval)")


def test_forks_and_retokenized_histories_are_shown() -> None:
    first = gateway_call([1], [2, 3])
    assert lines_of([first, gateway_call([1, 9, 4], [5])])[-1].endswith(
        "row 2 (retokenized: token 1: 2 was sampled, the prompt has 9), not trained on (mode prod)"
    )
    assert lines_of([first, gateway_call([1], [8])])[-1].endswith("row 2 (fork), not trained on (mode prod)")


def test_a_reward_whose_target_is_no_call_is_named() -> None:
    made = gateway_call(attributes={semconv.GEN_AI_RESPONSE_ID: "chatcmpl-7"})
    stray = [reward(1.0, {semconv.REWARD_TARGET: target}) for target in ("chatcmpl-7", "chatcmpl-8", "chatcmpl-8")]
    assert " ".join(" ".join(lines_of([made, *stray])[-2:]).split()) == (
        "without_call (2 rewards): no call of the rollout has the response id or span id chatcmpl-8; "
        "pass the id of a call as the target of the reward"
    )
    found = Inspection([made, *stray]).to_json()["rewards_without_call"]
    assert [one["target"] for one in found] == ["chatcmpl-8"] * 2


def test_orphans_and_cycles_are_shown_once() -> None:
    orphan = replace(span("orphan"), parent_id="f" * 16)
    left, right = span("left"), span("right")
    ring = [replace(left, parent_id=right.span_id), replace(right, parent_id=left.span_id)]
    shown = [line.split("  ")[0] for line in lines_of([orphan, *ring])[-3:]]
    assert shown == ["orphan", "left", "└─ right"]


def test_a_deep_tree_is_shown() -> None:
    spans = [span("step")]
    for _ in range(1500):
        spans.append(span("step", parent=spans[-1]))
    inspection = Inspection(spans)
    assert inspection.text().count("step") == 1501
    assert json.loads(json.dumps(inspection.to_json()))["spans"][-1]["depth"] == 1500


def test_text_from_spans_cannot_control_the_terminal() -> None:
    text = Inspection([span("evil\x1b[2J\nname\u202e", status="error", message="a\rb")]).text()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\r" not in text
    assert "evil" in text.splitlines()[-1]


def test_json_has_the_same_content_without_token_ids() -> None:
    data = json.loads(json.dumps(Inspection(team()).to_json()))
    assert (data["rollout_id"], data["group_id"], data["mode"], data["reward"]) == ("r-1", "task-17", "train", 0.8)
    planner, executor, critic = data["calls"]
    assert (planner["role"], planner["prompt_tokens"], planner["response_tokens"]) == ("planner", 412, 37)
    assert (planner["row"], planner["drop"], planner["policy_version"]) == (1, None, "planner@3")
    assert (executor["row"], executor["response_id"]) == (2, "chatcmpl-7")
    assert (critic["row"], critic["drop"]["reason"]) == (None, "no_ids")
    assert "gateway" in critic["drop"]["detail"]
    assert [one["depth"] for one in data["spans"]] == [0, 1, 2, 3, 1, 1, 2, 1, 1]
    assert data["spans"][4]["error"] == "OperationalError: no such column"


def test_columns_are_aligned_by_display_width() -> None:
    assert align([("ab", "x"), ("漢字", "y"), ("e\u0301", "z")]) == ["ab    x", "漢字  y", "e\u0301     z"]


def test_durations_have_a_fitting_unit() -> None:
    said = [duration(ns) for ns in (-5, 0, 400, 1_000_000, 999_499_999, 999_500_000, 1_240_000_000, 125 * 10**9)]
    assert said == ["", "", "<1 ms", "1 ms", "999 ms", "1.00 s", "1.24 s", "2 min 05 s"]


def test_long_names_are_truncated() -> None:
    assert printable("abcdef", 4) == "abc…"
    assert printable("abcd", 4) == "abcd"


def test_a_reward_that_arrived_after_its_rollout_was_counted_is_late() -> None:
    root, call = span(semconv.SPAN_ROLLOUT, {semconv.MODE: "train"}), gateway_call()
    (made,) = build_trajectory([root, call]).calls
    untrained = trained_span(made, 1, None, DropReason.NO_REWARD)
    late = replace(reward(0.5, parent=root), start_ns=untrained.start_ns + 1)
    text = Inspection([root, call, untrained, late]).text()
    assert "reward 0.5; late" in text
    assert "late (1 reward): the training had already counted the rollout, so no call trained on it; emit" in text
    # It is in time for a later step.
    assert (
        "late"
        not in Inspection(
            [root, call, untrained, late, replace(trained_span(made, 2, 0.5), start_ns=late.start_ns + 1)]
        ).text()
    )
