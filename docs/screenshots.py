"""Takes the pictures of the page in docs/images from the store of a training: `make screenshots`."""

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright

from agl.server_thread import ServerThread
from agl.store import Store, open_store

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path, help="the file of the store")
    path = parser.parse_args().store
    store = open_store(f"sqlite:///{path}")
    run = store.query_resources("run ")[0].name.removeprefix("run ")
    pages = {"page-run": f"/runs/view?id={run}", "page-rollout": f"/rollouts/view?id={trained_rollout(store)}"}
    with ServerThread(store, port=0, otlp_http_port=0) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="light")
        for name, address in pages.items():
            page.goto(server.base_url + address)
            page.wait_for_load_state("networkidle")
            if name == "page-rollout":
                page.locator("details.tokens summary").first.click()
                page.locator(".stream").first.wait_for()
                page.locator("article.card").first.scroll_into_view_if_needed()
            page.screenshot(path=IMAGES / f"{name}.png")
            page.emulate_media(color_scheme="dark")
        browser.close()
    store.close()


def trained_rollout(store: Store) -> str:
    """The newest rollout whose calls trained in a step, with more than one role."""
    cursor: str | None = ""
    while cursor is not None:
        page = store.list_rollouts(50, cursor or None)
        for rollout_id in page.rollout_ids:
            spans = store.query_spans(rollout_id)
            if len({span.role for span in spans if "agl.trained.advantage" in span.attributes}) > 1:
                return rollout_id
        cursor = page.cursor
    raise SystemExit("no rollout of the store trained two roles; run `agl demo` first")


if __name__ == "__main__":
    main()
