"""The page in Chromium."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.made import ANSI, EVIL, LONG, REORDERED, SCRIPT

PATHS = {
    "rollouts": "/rollouts",
    "filtered": "/rollouts?reward=%3E0.5&role=writer",
    "trained": "/rollouts/view?id=trained",
    "drifted": "/rollouts/view?id=drifted",
    "missing": "/rollouts/view?id=nobody",
}


def ids(page: Page) -> list[str]:
    return page.locator("table.list a.id").all_inner_texts()


def test_the_list_shows_the_newest_first_and_loads_older_ones_when_they_come_into_view(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("h1")).to_have_text("Rollouts")
    assert ids(page)[1:5] == ["drifted", "equal", "trained", "failed"]
    for last in ("plain-40", "plain-15", "plain-0"):
        expect(page.get_by_text(last, exact=True)).to_be_attached()
        page.keyboard.press("End")
    expect(page.locator("table.list a.id").last).to_have_text("plain-0")
    assert ids(page)[5:] == [f"plain-{number}" for number in reversed(range(60))]


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
        ("role=nobody", []),
    ],
)
def test_filters(url: str, query: str, found: list[str]) -> None:
    text = httpx.get(f"{url}/rollouts", params=httpx.QueryParams(query)).text
    listed = [part.split("<")[0] for part in text.split('<a class="id"')[1:] for part in [part.split(">", 1)[1]]]
    assert {name.startswith("evil") for name in listed} <= {EVIL in found, False}
    assert sorted(name for name in listed if not name.startswith("evil")) == sorted(set(found) - {EVIL})


def test_a_rollout_shows_its_messages_and_its_tokens(page: Page, url: str) -> None:
    page.goto(f"{url}/rollouts/view?id=trained")
    assert page.locator(".facts").inner_text().replace("\n", " ").startswith("Reward 1 goal 1 Mode train Run toy")
    call = page.locator("article", has_text="SELECT 1")
    expect(call.locator(".said.answer .text")).to_have_text("SELECT 1")
    expect(call.locator(".notes")).to_contain_text("trained in step 3, advantage +0.75, weight 0.5")
    call.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(call.locator(".stream .up")).to_have_count(2)
    assert call.locator(".stream .u").all_inner_texts() == ["count", " the", " orders"]
    expect(call.locator(".stream .up").first).to_have_attribute("title", "id 3, logprob \u22120.5")
    page.goto(f"{url}/rollouts/view?id=equal")
    expect(page.locator("article .tag.warn")).to_have_text("zero_advantage")
    page.locator("summary").click()
    expect(page.locator(".legend")).to_contain_text("answer, zero_advantage")


def test_drift_and_dropped_calls_are_named(page: Page, url: str) -> None:
    page.goto(f"{url}/rollouts/view?id=drifted")
    expect(page.locator(".box.warn")).to_contain_text("no_ids")
    page.locator("summary").nth(1).click()
    expect(page.locator(".stream .drift")).to_have_attribute("title", "id 5")


def test_what_a_model_wrote_stays_text(page: Page, url: str) -> None:
    """No dialog and no error in the log (see the fixture), whatever the ids, names, messages and errors are."""
    page.goto(url)
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
        ("/rollouts?reward=high", 400, "is not a reward"),
        ("/rollouts?cursor=x", 400, "no cursor"),
    ):
        response = httpx.get(url + path)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_every_page_fits_its_window_and_can_be_used_by_everyone(
    page: Page, url: str, axe: Path, scheme: Any, width: int
) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 900})
    for name, path in PATHS.items():
        is_missing = page.request.get(url + path).status == 404
        page.goto(url + path if not is_missing else f"{url}/rollouts?role=nobody")
        for summary in page.locator("summary").all():
            summary.click()
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        page.evaluate(axe.read_text())
        found = page.evaluate("axe.run()")["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert not serious, (name, [(each["id"], each["nodes"][0]["html"]) for each in serious])
