"""The page of `gream serve` in Debian's chromium, which Playwright drives.

As a script it takes the picture of the documentation from a running service:
`PYTHONPATH=tests python tests/integration/test_page.py http://127.0.0.1:8080 USER TITLE docs/page.png`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from assets import TITLES, make_index, make_tiny_model
from local_server import free_port, wait_for_health
from serving_run import ITEMS, make_served_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
pytest.importorskip("nicegui", reason="the extra serve is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed").Axe
expect = sync_api.expect
expect.set_options(timeout=20_000)
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("Debian's chromium is not installed", allow_module_level=True)

TOKEN = "a long secret"
HOSTILE = "<script>alert(1)</script> 3"  # the data set drops the rest
PHONE = {"width": 390, "height": 844}
# Notes in the page, where a busy machine does not matter, that a chain begins before its list is there.
WATCH = """() => new MutationObserver(() => {
    const column = document.querySelector('section:has(.chain)');
    window.isEarly ||= !!column?.innerText.includes('the last one is') && !column.querySelector('.ranking');
}).observe(document.body, {subtree: true, childList: true, characterData: true})"""
SERVER = """
import sys
from pathlib import Path
import uvicorn
from gream_verl.core.run_folder import RunFolder
from gream_verl.serving.app import create_app
from gream_verl.serving.service import Service
from gream_verl.serving.settings import Settings

tests, run, port, token, chain = sys.argv[1:]
sys.path.insert(0, tests)
from serving_run import CannedThinker

checkpoints = [Path(run) / "sft"] if token else [Path(run) / "srpo", Path(run) / "sft"]
service = Service(RunFolder.open(Path(run)), checkpoints, Settings(page=True, token=token or None))
if not token:
    service.bundles["srpo"].thinker = CannedThinker(chain, pause=0.15)
uvicorn.run(create_app(service), host="127.0.0.1", port=int(port), log_level="warning", timeout_graceful_shutdown=1)
"""


def start(run: Path, token: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a service of a run, and return its process and its address."""
    port = free_port()
    sid = make_index(ITEMS).text("3")  # the item with the hostile title
    chain = f"<think>Evidence: the last one is {sid} of six. Preference: Drama. Intent: Drama.</think>{sid}<answer>"
    arguments = [str(Path(__file__).parents[1]), str(run), str(port), token, chain]
    with (run / f"log-{'secured' if token else 'open'}").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", SERVER, *arguments], cwd=run, stdout=log, stderr=log)
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield the addresses of a service with two models, of which one thinks, and of one with a token."""
    run = make_served_run(tmp_path_factory.mktemp("page") / "run")
    make_tiny_model(run / "srpo", make_index(ITEMS), seed=1)
    started = {name: start(run, token) for name, token in (("open", ""), ("secured", TOKEN))}
    try:
        for name, (process, url) in started.items():
            wait_for_health(process, url, run / f"log-{name}", 120)
        yield {name: url for name, (_, url) in started.items()}
    finally:
        for process, _ in started.values():
            process.kill()
            process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=60_000)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Yield a page that asks no other host, runs nothing of a title, and has no fault."""
    faults: list[str] = []
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: "//127.0.0.1:" in request.url or faults.append(request.url))
        page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: line.type in ("error", "warning") and faults.append(line.text))
        page.on("dialog", lambda dialog: (faults.append("a dialog"), dialog.dismiss()))
        yield page
        assert faults == []


def column(page: Any, name: str) -> Any:
    return page.get_by_role("region", name=name, exact=True)


def titles(page: Any, name: str) -> list[str]:
    """Return the titles of a list that is complete."""
    rows = column(page, name).locator(".ranking > li")
    expect(column(page, name).locator(".stale")).to_have_count(0)
    expect(rows).to_have_count(10)
    return rows.locator(".title").all_inner_texts()


def visit(page: Any, url: str) -> None:
    """Open a page, and return when it is connected: a busy machine may load it twice."""
    page.goto(url)
    page.wait_for_function("window.did_handshake", timeout=60_000)
    page.wait_for_load_state("networkidle")


def choose(page: Any, user: int) -> None:
    page.get_by_label("Test user", exact=True).fill(str(user))
    page.get_by_role("button", name=f"User {user}, 5 items", exact=True).click()


def test_a_chain_is_shown_as_it_is_written_and_its_items_by_their_titles(services: dict[str, str], page: Any) -> None:
    visit(page, services["open"])
    page.evaluate(WATCH)
    choose(page, 4)
    assert len(titles(page, "Direct · srpo")) == 10
    thinking = column(page, "Reasoning · srpo")
    expect(thinking.get_by_text(f"the last one is [{HOSTILE}] of")).to_be_visible()  # a title, and only as text
    assert len(titles(page, "Reasoning · srpo")) == 10
    assert page.evaluate("window.isEarly")
    expect(thinking.get_by_text("Preference")).to_be_visible()
    expect(thinking.get_by_text(re.compile(r"^[\d,]+ ms \(think [\d,]+ ms, search \d+ ms\)$"))).to_be_visible()
    expect(thinking.locator("dd").last).to_have_text(HOSTILE)  # what the chain keeps of the history
    assert len(titles(page, "Co-occurrence")) == len(titles(page, "Popularity")) == 10


def test_the_keyboard_changes_the_history_and_the_lists_move(services: dict[str, str], page: Any) -> None:
    visit(page, services["open"])
    page.get_by_label("Test user", exact=True).focus()
    page.keyboard.type("2")
    page.keyboard.press("Enter")
    history = page.get_by_role("list", name="Items, the latest first").get_by_role("listitem")
    expect(history).to_have_count(5)
    before = titles(page, "Direct · srpo")
    page.get_by_label("Add a title", exact=True).focus()
    page.keyboard.type("<script>", delay=10)
    page.keyboard.press("Enter")
    expect(history).to_have_count(6)
    expect(history.first).to_contain_text(HOSTILE)
    moved = column(page, "Direct · srpo").locator(".line > :is(.up, .down, .new)")
    expect(moved.first).to_be_visible()
    assert titles(page, "Direct · srpo") != before
    expect(page.get_by_label("Add a title", exact=True)).to_be_focused()
    expect(page.get_by_label("Add a title", exact=True)).to_have_value("")
    expect(page.locator(".found > li")).to_have_count(0)
    page.get_by_role("button", name=f"Remove {HOSTILE}").focus()
    page.keyboard.press("Enter")
    expect(history).to_have_count(5)
    expect(page.get_by_role("button", name=re.compile("^Remove")).first).to_be_focused()  # and goes on from there
    expect(page.get_by_text("Removed <script>")).to_be_visible()
    assert titles(page, "Direct · srpo") == before
    for left in range(4, -1, -1):
        expect(page.get_by_role("button", name=re.compile("^Remove")).first).to_be_focused()
        page.keyboard.press("Enter")
        expect(history).to_have_count(left)
    expect(page.locator("main section").nth(1).locator(".ranking > li")).to_have_count(0)


def test_an_item_shows_its_path_and_the_held_out_one_is_revealed(services: dict[str, str], page: Any) -> None:
    visit(page, services["open"])
    choose(page, 2)
    titles(page, "Direct · srpo")
    first = column(page, "Direct · srpo").locator(".ranking > li").first
    path = first.locator("summary")
    expect(path).to_have_text(re.compile(r"^a_\d › b_\d › c_\d"))
    expect(first.locator(".branch").first).to_be_hidden()
    path.focus()
    page.keyboard.press("Enter")
    expect(first.locator(".branch").first).to_have_text(re.compile(r"^a_\d: \d+ items, also .+; .+"))
    held_out = f"Held out: {TITLES[(2 * 5 + 35) % ITEMS % len(TITLES)]}"
    expect(page.get_by_text(held_out)).to_have_count(0)
    page.get_by_role("button", name="Reveal the held-out item").click()
    expect(page.get_by_text(held_out)).to_be_visible()


def test_two_models_are_compared(services: dict[str, str], page: Any) -> None:
    visit(page, services["open"])
    choose(page, 4)
    srpo = titles(page, "Direct · srpo")
    column(page, "Reasoning · srpo").get_by_label("Mode and model").click()
    page.get_by_role("option", name="Direct · sft").click()
    assert titles(page, "Direct · sft") != srpo
    assert titles(page, "Direct · srpo") == srpo


def test_a_newer_history_ends_the_thinking_about_an_older_one(services: dict[str, str], page: Any) -> None:
    visit(page, services["open"])
    choose(page, 4)
    expect(column(page, "Reasoning · srpo").locator(".chain")).to_have_count(1)
    choose(page, 5)
    expect(page.get_by_text("User 5: 5 items")).to_be_visible()
    titles(page, "Reasoning · srpo")
    expect(column(page, "Reasoning · srpo").locator(".chain")).to_have_count(1)


def test_it_is_named_and_fits_a_phone(services: dict[str, str], page: Any) -> None:
    page.set_viewport_size(PHONE)
    visit(page, services["open"])
    choose(page, 4)
    titles(page, "Reasoning · srpo")
    for details in page.locator("summary").all()[:3]:
        details.click()
    assert page.title() == "gream"
    assert page.evaluate("document.documentElement.lang") == "en-US"
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.get_by_role("heading", level=1).all_inner_texts() == ["gream"]
    nameless = re.compile(r"- (button|textbox|combobox|region|link)( \[.*\])?:?$", re.MULTILINE)
    assert nameless.findall(page.locator("body").aria_snapshot()) == []
    found = Axe().run(page).response["violations"]
    faults = [(one["id"], node["html"]) for one in found for node in one["nodes"]]
    assert not faults, faults


def test_nothing_is_shown_before_the_token(services: dict[str, str], page: Any) -> None:
    visit(page, services["secured"])
    field = page.get_by_label("Token", exact=True)
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("This is not the token.")).to_be_visible()
    for shown in ("Test user", "History", "24 items", "sft", "Toy Story"):
        assert shown not in page.content()
    field.fill(TOKEN)
    page.keyboard.press("Enter")
    choose(page, 4)
    assert len(titles(page, "Direct · sft")) == 10
    expect(page.get_by_text("Reasoning is off.")).to_be_visible()
    page.reload()
    expect(page.get_by_label("Test user", exact=True)).to_be_visible()  # the tab is known
    other = page.context.new_page()
    visit(other, services["secured"])
    expect(other.get_by_label("Token", exact=True)).to_be_visible()


def take_picture(url: str, user: str, title: str, file: str) -> None:
    """Save the page of a user who adds an item and reveals the held-out one, with a path open."""
    with sync_api.sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.set_viewport_size({"width": 1280, "height": 900})
        visit(page, url)
        for field, typed in (("Test user", user), ("Add a title", title)):
            page.get_by_label(field, exact=True).fill(typed)
            page.keyboard.press("Enter")
            expect(page.locator(".history > li").first).to_contain_text(typed if typed == title else "")
            expect(page.get_by_text(re.compile(r"^[\d,]+ ms \("))).to_have_count(2)
        page.get_by_role("button", name="Reveal the held-out item").click()
        page.locator("summary").first.click()
        expect(page.locator(".held").first).to_be_visible()
        page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
        page.screenshot(path=file)


if __name__ == "__main__":
    take_picture(*sys.argv[1:])
