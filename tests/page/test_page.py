"""The page in Chromium."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from agl import semconv
from agl.inspection.evaluation import evaluation_record
from agl.page.comparison import Comparison
from agl.page.groups import Group, list_groups
from agl.page.runs import RunView, run_names
from agl.page.shown import number
from agl.server_thread import ServerThread
from agl.store import Resource, Rollout, Store
from agl.trajectory.sampled import SPACE, Decision, SamplingReason
from tests.core.span_maker import span
from tests.page.made import ANSI, EVIL, LONG, REORDERED, SCRIPT, rollout

PATHS = {
    "runs": "/runs",
    "run": "/runs/view?id=toy",
    "groups": "/groups",
    "group": "/groups/view?id=task-1",
    "compare": "/compare",
    "adapters": "/adapters",
    "health": "/health",
    "rollouts": "/rollouts",
    "filtered": "/rollouts?reward=%3E0.5&role=writer",
    "trained": "/rollouts/view?id=trained",
    "drifted": "/rollouts/view?id=drifted",
    "none": "/rollouts?role=nobody",
}


def ids(page: Page) -> list[str]:
    return page.locator("table.list a.id").all_inner_texts()


def test_the_list_shows_the_newest_first_and_loads_older_ones_when_they_come_into_view(page: Page, url: str) -> None:
    page.goto(f"{url}/rollouts")
    expect(page.locator("h1")).to_have_text("Rollouts")
    assert ids(page)[1:5] == ["drifted", "equal", "trained", "failed"]
    for last in ("plain-40", "plain-15", "plain-0"):
        expect(page.get_by_text(last, exact=True)).to_be_attached()
        page.keyboard.press("End")
    expect(page.locator("table.list a.id").last).to_have_text("arm-0")
    assert ids(page)[5:65] == [f"plain-{number}" for number in reversed(range(60))]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("reward=>=0.98", ["trained", "plain-59", "drifted"]),
        ("reward=<0.02&role=writer", ["plain-1"]),
        ("reward=none", ["failed", EVIL]),
        ("error=no such", ["failed"]),
        ("mode=prod&error=any", ["failed", EVIL]),
        ("run=toy&mode=train", ["equal", "trained"]),
        ("version=writer@3&mode=train", ["drifted", "equal", "trained"]),
        ("text=SELECT 2", ["drifted"]),
        ("outcome=zero_advantage", ["equal"]),
        ("role=nobody", []),
    ],
)
def test_filters(url: str, query: str, found: list[str]) -> None:
    """On all pages of the search together: one ends after half a second."""
    listed: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        text = httpx.get(f"{url}/rollouts", params=httpx.QueryParams(query).set("cursor", cursor)).text
        listed += [
            html.unescape(name) for name in re.findall(r'<a class="id" dir="auto" href="[^"]*">([^<]*)</a>', text)
        ]
        more = re.search(r"cursor=([\d.]+)", text)
        cursor = more and more[1]
    assert sorted(listed) == sorted(found)


def test_a_rollout_shows_its_messages_and_its_tokens(page: Page, url: str) -> None:
    page.goto(f"{url}/rollouts/view?id=trained")
    assert page.locator(".facts").inner_text().replace("\n", " ").startswith("Reward 1 goal 1 Mode train Run toy")
    call = page.locator("article", has_text="SELECT 1")
    expect(call.locator(".said.answer .text")).to_have_text("SELECT 1")
    expect(call.locator(".notes")).to_contain_text("trained in step 3, advantage +0.75, weight 0.5, ratio 0.75 to 1.25")
    call.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(call.locator(".stream .up")).to_have_count(2)
    assert call.locator(".stream .u").all_inner_texts() == ["count", " the", " orders"]
    expect(call.locator(".stream .up").first).to_have_attribute("title", "id 3, logprob \u22120.5, ratio 0.75")
    assert [call.locator(f".stream .{name}").all_inner_texts() for name in ("less", "more")] == [[" SELECT"], [" 1"]]
    expect(call.locator(".legend")).to_contain_text("ratio of the new to the old policy: over 1.2 under 0.8")
    call.get_by_text("The answer's tokens as a table").click()
    rows = call.locator("tbody tr")
    expect(rows).to_have_count(2)
    assert rows.nth(1).inner_text().split("\t") == ["2", '" 1"', "4", "0.607", "\u22120.5", "1.25", "+0.75"]
    page.goto(f"{url}/rollouts/view?id=equal")
    expect(page.locator("article .tag.warn")).to_have_text("zero_advantage")
    expect(page.locator(".notes").first).to_contain_text("zero_advantage: all rollouts of its group earned the same")
    page.locator("summary").click()
    expect(page.locator(".legend")).to_contain_text("answer, zero_advantage")


def test_a_list_can_be_used_by_keyboard(page: Page, url: str) -> None:
    page.goto(f"{url}/rollouts")
    page.keyboard.press("/")
    page.keyboard.type("select 2j")
    expect(page.get_by_label("Text")).to_have_value("select 2j")
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    page.wait_for_url("**text=select+2**")
    for key in "jk":
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("drifted")


def test_drift_and_dropped_calls_are_named(page: Page, url: str) -> None:
    page.goto(f"{url}/rollouts/view?id=drifted")
    expect(page.locator(".box.warn")).to_contain_text("no_ids")
    page.locator("summary").nth(1).click()
    expect(page.locator(".stream .drift")).to_have_attribute("title", "id 5")


def test_what_a_model_wrote_stays_text(page: Page, url: str) -> None:
    """No dialog and no error in the log (see the fixture), whatever the ids, names, messages and errors are."""
    page.goto(f"{url}/rollouts")
    page.locator("table.list a.id").first.click()
    expect(page.locator("h1")).to_have_text(EVIL)
    assert not page.locator("main script, main img").count()
    answer = page.locator(".said.answer .text").inner_text()
    assert SCRIPT in answer and "␛[31mred␛[0m␇" in answer and "abc⟨U+202E⟩def⟨U+2066⟩ghi⟨U+FEFF⟩" in answer
    for invisible in (*ANSI[:1], *REORDERED[3:4]):
        assert invisible not in page.content()
    expect(page.locator(".said.user .text")).to_have_text("⟨U+D800⟩ half a pair")
    assert len(page.content()) < 100_000
    page.get_by_text("988,000 more characters").click()
    assert page.locator("pre").inner_text() == LONG
    page.goto(f"{url}/rollouts?text=half+a+pair")
    expect(page.locator("table.list .role")).to_have_text(SCRIPT)


def test_a_rejected_address_says_what_is_wrong(url: str) -> None:
    for path, status, message in (
        ("/rollouts/view?id=nobody", 404, "holds no span of rollout"),
        ("/rollouts/view", 400, "lacks id=..."),
        ("/rollouts/tokens?id=trained&call=x", 404, "no model call"),
        ("/rollouts/text?id=trained&span=x&number=9", 404, "no text 9"),
        ("/rollouts/text?id=trained&span=x&number=" + "9" * 5000, 400, "no number of a text"),
        ("/rollouts/text?id=trained&span=x&number=-1", 400, "no number of a text"),
        ("/rollouts?reward=" + "9" * 30_000 + "x", 400, "is not a reward"),  # At once, not after minutes.
        ("/rollouts?cursor=" + "9" * 5000, 400, "no cursor"),
        ("/rollouts?reward=high", 400, "is not a reward"),
        ("/rollouts?cursor=x", 400, "no cursor"),
        ("/runs/view?id=x", 404, "no run"),
        ("/groups/view?id=x", 404, "no rollout of group"),
        ("/compare?run=toy&left=x", 404, "no evaluation"),
        ("/nothing/here", 404, "there is no page /nothing/here"),
    ):
        response = httpx.get(url + path, headers={"accept": "text/html"})
        assert response.status_code == status and message in response.text, path
        assert response.headers["content-security-policy"].startswith("default-src 'none'")


def test_a_server_with_tokens_asks_for_one_that_may_read(page: Page, guarded_url: str) -> None:
    page.goto(f"{guarded_url}/rollouts/view?id=trained")
    assert page.url.startswith(f"{guarded_url}/login?next=")
    page.get_by_label("Token").fill("reader-token")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("trained")
    (cookie,) = map(dict, page.context.cookies())
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict") and "reader" not in str(cookie)
    session = {"agl_session": str(cookie["value"])}
    assert httpx.get(f"{guarded_url}/rollouts", cookies=session).status_code == 200
    assert httpx.post(f"{guarded_url}/api/store/gc", json={}, cookies=session).status_code == 401
    page.get_by_text("Log out").click()
    expect(page.locator("h1")).to_have_text("Log in")
    assert not page.context.cookies()


def test_other_tokens_and_other_sites_get_nothing(guarded_url: str) -> None:
    def log_in(token: str, target: str = "/", **headers: str) -> httpx.Response:
        return httpx.post(f"{guarded_url}/login", params={"next": target}, data={"token": token}, headers=headers)

    assert [log_in(token).status_code for token in ("agent-token", "wrong", "", "x" * 9000)] == [401] * 4
    assert log_in("reader-token", Origin="https://elsewhere.example").status_code == 403
    for target in ("https://elsewhere.example", "//elsewhere.example", "/\\elsewhere.example"):
        assert log_in("reader-token", target).headers["location"] == "/"
    html = {"accept": "text/html"}
    assert httpx.get(f"{guarded_url}/rollouts", headers=html).headers["location"] == "/login?next=%2Frollouts"
    assert httpx.get(f"{guarded_url}/rollouts", cookies={"agl_session": "0" * 64}).status_code == 401
    assert httpx.get(f"{guarded_url}/rollouts").json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{guarded_url}/static/page.css").status_code == 200
    assert "sqlite:" not in httpx.get(f"{guarded_url}/login").text


def test_a_run_shows_curves_and_says_what_is_wrong(page: Page, url: str) -> None:
    page.goto(url)
    page.get_by_role("link", name="toy").first.click()
    found = page.locator(".findings .box")
    expect(found.nth(0)).to_contain_text("In 75% of the groups all rollouts earned the same")
    for place, text in enumerate(("20% of the rollouts failed", "50% of the calls did not train: stale"), 1):
        expect(found.nth(place)).to_contain_text(text)
    expect(page.locator(".findings")).to_contain_text("The gradient norm of writer is 9 times its median")
    expect(page.locator(".findings")).to_contain_text("95% of the answers of writer are the same")
    assert page.locator(".times span").all_inner_texts() == ["rollouts 75%", "update 25%"]
    expect(page.locator(".charts canvas")).to_have_count(3)
    found.nth(0).get_by_role("link").click()
    expect(page.locator("table.list a.id")).to_have_text("equal")


def test_the_interval_of_a_reward_is_that_of_its_mean(store: Store) -> None:
    """1.96 * 0.2 / sqrt(4) = 0.196."""
    chart = next(chart for chart in RunView.of(store, "toy").charts() if chart["title"] == "Reward")
    series = {each["label"]: each for each in chart["series"]}
    assert series.keys() == {"reward", "goal"}
    reward = series["reward"]
    assert reward["x"] == [*range(1, 11)] and reward["y"][-1] == pytest.approx(1.0)
    assert (reward["low"][-1], reward["high"][-1]) == (pytest.approx(0.804), pytest.approx(1.196))


def test_findings_are_about_the_last_ten_steps_also_where_points_are_missing_or_are_no_numbers(
    empty: Store,
) -> None:
    """Steps 11 to 20: no call was dropped for being stale, so these steps have no point of `calls/dropped/stale`."""
    for step in range(1, 21):
        stale = {"calls/dropped/stale": 4.0} if step <= 10 else {}
        reward = {"reward/mean": math.nan if step == 20 else 0.5, "reward/std": 0.1}
        norm = {"writer/grad_norm": 0.1 if step == 20 else 0.0, "time/update_s": math.nan}
        empty.append_metrics("toy", step, {"calls": 4.0, "rollouts": 4.0, **stale, **reward, **norm})
    run = RunView.of(empty, "toy")
    assert (run.findings(empty), run.times()) == ([], {})
    (series,) = json.loads(json.dumps(run.charts(), allow_nan=False))[0]["series"]
    assert [series[name][-2:] for name in ("y", "low", "high")] == [[0.5, None], [0.402, None], [0.598, None]]


def test_lists_have_the_newest_run_first_and_groups_whose_first_rollout_has_no_spans(empty: Store) -> None:
    for made_ns, run in enumerate("bac"):
        empty.put_resource(Resource(f"run {run}", 0, "/run", {"made_ns": made_ns}))
    assert run_names(empty) == ["c", "a", "b"]
    empty.enqueue_rollouts([Rollout(name, name, "task") for name in ("waits", "first", "second")])
    for name, value in (("second", 0.5), ("first", 1.0)):
        empty.append_spans(rollout(name, "train", value))
    assert [(len(group.members), group.queued) for group in list_groups(empty, "", None).groups] == [(2, 3)]


def test_a_rollout_that_sampling_left_out_says_so(empty: Store) -> None:
    decision = Decision("gone", False, SamplingReason.BASE_RATE, SPACE // 4 * 3)
    named = {semconv.ROLLOUT_ID: "gone", semconv.MODE: "prod", **decision.attributes()}
    empty.append_spans([span(semconv.SPAN_SAMPLED, named)])
    with ServerThread(empty, port=0, otlp_http_port=0) as server:
        listed = httpx.get(f"{server.base_url}/rollouts").text
        shown = httpx.get(f"{server.base_url}/rollouts/view?id=gone")
    assert "left out</td>" in listed and shown.status_code == 200
    assert "Sampling: left out with probability 0.75: by chance (sampling.base_rate). It had 0 spans" in shown.text


def test_a_task_without_both_rewards_is_not_counted_as_equal(empty: Store) -> None:
    for name, value in (("one", 0.5), ("other", None)):
        empty.append_spans(rollout(name, "eval", value))
    for label, name in (("base", "one"), ("grpo", "other")):
        empty.put_resource(evaluation_record("toy", label, "/eval", {"same": "one", "lost": name}))
    counts = Comparison.of(empty, "toy", "base", "grpo").counts
    assert counts == {"worse": 0, "equal": 1, "better": 0, "without both rewards": 1}


def test_a_group_shows_its_rollouts_from_the_best_and_why_it_won(page: Page, url: str) -> None:
    page.goto(f"{url}/groups?run=toy")
    page.locator("table.list a.id").click()
    expect(page.locator("main > .box")).to_have_text(
        "The best rollout earned 1, the others 0.5: goal +0.5 against the mean of the others."
    )
    assert page.locator("article header a.id").all_inner_texts() == ["trained", "equal"]
    expect(page.locator("article").first).to_contain_text("+0.75")
    expect(page.locator("main")).to_contain_text("All 2 rollouts gave the same answers.")
    expect(page.locator("article").nth(1)).to_contain_text("The same answers as trained")
    assert page.locator(".common").all_inner_texts() == ["", "SELECT 1"]


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (["SELECT 1", "SELECT 22", "SELECT 22"], "after “SELECT ”: the best goes on with “1”, the other with “22”."),
        (["", "SELECT 1"], "at its beginning: the best goes on with nothing, the other with “SELECT 1”."),
        (["x" * 90 + "1", "x" * 90], f"after “{'x' * 40}”: the best goes on with “1”, the other with nothing."),
        (["SELECT 1", None], "in how many calls they make: 1, and 0."),
    ],
)
def test_a_group_says_where_the_answers_first_differ(empty: Store, answers: list[str | None], told: str) -> None:
    empty.enqueue_rollouts([Rollout(f"r{place}", "task", "g") for place in range(len(answers))])
    for place, text in enumerate(answers):
        spans = rollout(f"r{place}", "train", 1 - place / 4, answer=text or "")
        empty.append_spans(spans if text is not None else [spans[0], spans[2]])
    said = Group.of(empty, "g").difference()
    assert said.startswith(
        f"2 of the {len(answers)} rollouts gave answers of their own. The best rollout and r1 first"
    ) and said.endswith(told)
    assert [member.same_as for member in Group.of(empty, "g").members[2:]] == ["r1"] * (len(answers) - 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (-4.789e-5, "\u22124.79e\u22125"),
        (999.7, "1,000"),
        (-1234567.8, "\u22121,234,568"),
        (0.12345, "0.123"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_evaluations_are_compared_task_by_task_from_the_largest_regression(page: Page, url: str) -> None:
    page.goto(f"{url}/compare")
    changes = page.locator("td[data-name=Change]").all_inner_texts()
    assert changes == ["\u22120.0833", "+0", "+0.333"]
    assert page.locator(".facts").inner_text().replace("\n", " ").endswith("worse 1 equal 1 better 1")
    expect(page.locator(".facts")).to_contain_text("100% of the tasks")
    page.goto(f"{url}/compare?run=toy&left=grpo&right=base")
    assert page.locator("td[data-name=Change]").first.inner_text() == "\u22120.333"


def test_adapters_and_health(page: Page, url: str) -> None:
    page.goto(f"{url}/adapters")
    row = page.locator("tbody tr").first.inner_text().split()
    assert (row[:5], row[-1]) == (["writer", "toy", "writer@4", "4,", "2"], "/adapters/writer@4")
    expect(page.locator(".history li")).to_contain_text("by Ada: writer@4 for writer@2; a share of 0.25")
    page.get_by_role("button", name="Read the evidence now").click()
    rows = page.locator("#evidence tbody tr")
    expect(rows).to_have_count(2)
    assert rows.nth(1).inner_text().split()[1:6] == ["candidate", "2", "0.9", "\u00b1", "0"]
    assert rows.nth(1).inner_text().split()[-1] == "+50.0%"
    page.goto(f"{url}/health")
    expect(page.locator(".facts")).to_contain_text("Spans")
    assert "Rollouts queued 62" in page.locator(".facts").inner_text().replace("\n", " ")
    expect(page.locator(".empty")).to_contain_text("model calls are refused")


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1600, "light")])
def test_every_page_fits_its_window_and_can_be_used_by_everyone(
    page: Page, url: str, axe: Path, scheme: Any, width: int
) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 900})
    for name, path in PATHS.items():
        page.goto(url + path)
        for summary in page.locator("details:not(.as-table) > summary").all():
            summary.click()
        expect(page.locator(".tokenbox")).to_have_count(page.locator("details.tokens").count())
        for summary in page.locator("details.as-table summary").all():
            summary.click()
        expect(page.locator("details.as-table table")).to_have_count(page.locator("details.as-table").count())
        if name == "run":
            expect(page.locator(".charts canvas").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        page.evaluate(axe.read_text())
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert not serious, (name, [(each["id"], each["nodes"][0]["html"]) for each in serious])
