"""The board in a real browser: every page, both themes, desk and phone; a filter, a deep link, screenshots."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from made_results import asked, demo

from decodathlon.harness.locks import file_lock
from decodathlon.harness.results import shards

ROOT = Path(__file__).parents[2]
#: Where the screenshots are kept; DECODATHLON_SCREENSHOTS names another folder.
VARIABLE = "DECODATHLON_SCREENSHOTS"
PAGES = {"overview": "", "trade-off": "trade-off", "tasks": "tasks", "exactness": "exactness", "arena": "arena",
         "profile": "profile", "decoder": "decoder?decoder=top-p", "run": "run", "about": "about"}  # fmt: skip
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(chromium is None, reason="there is no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e '.[dev]'")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@contextlib.contextmanager
def _served(results):
    """The board on a port of its own, by the user's command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "decodathlon",
        "board",
        "--results",
        str(results),
        "--port",
        str(port),
        "--no-browser",
    ]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(150):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=1)
                break
            time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    with _served(demo(tmp_path_factory.mktemp("board") / "results.duckdb")) as address:
        yield address


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = Path(os.environ.get(VARIABLE) or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _page(browser, size, theme="light"):
    context = browser.new_context(viewport=size, color_scheme=theme)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def _shot(page, path):
    """The whole page: Streamlit scrolls inside a frame of the window's height, so the window is made as high."""
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": page.viewport_size["width"], "height": min(height, 6000)})
    page.wait_for_timeout(300)
    page.screenshot(path=path)


def _ready(page):
    """Waits until Streamlit has drawn the page, and nothing went wrong in it."""
    page.get_by_test_id("stMainBlockContainer").get_by_role("heading").first.wait_for(timeout=30_000)
    # A page may be drawn again at once, for its address; what is clicked meanwhile is lost. So nothing must have run
    # for a while, which is also the time that charts take after the page.
    page.evaluate("window.lastRun = performance.now()")
    quiet = """() => {
        const app = document.querySelector('[data-testid=stApp]');
        const busy = app.dataset.testScriptState !== 'notRunning' || document.querySelector('[data-stale=true]');
        if (busy) window.lastRun = performance.now();
        return performance.now() - window.lastRun > 700;
    }"""
    page.wait_for_function(quiet, timeout=60_000)
    assert page.get_by_test_id("stException").count() == 0


def _choose(page, name, option):
    """Opens a list and takes one of its entries. A page that is drawn again meanwhile shuts its open lists."""
    from playwright.sync_api import Error

    for _ in range(10):
        page.get_by_role("combobox", name=name).click()
        entry = page.get_by_role("option", name=option)
        with contextlib.suppress(Error):
            entry.click(timeout=3_000)
            return
        page.keyboard.press("Escape")
    pytest.fail(f"the list {name} never offered {option}")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_in_both_themes(browser, board, shots, name, theme):
    with _page(browser, DESK, theme) as page:
        page.goto(f"{board}/{PAGES[name]}")
        _ready(page)
        _shot(page, shots / f"{name}-{theme}.png")
        colour = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
        levels = [int(x) for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        assert (sum(levels) > 3 * 128) == (theme == "light")


@pytest.mark.parametrize("name", PAGES)
def test_every_page_fits_a_phone(browser, board, shots, name):
    with _page(browser, PHONE) as page:
        page.goto(f"{board}/{PAGES[name]}")
        _ready(page)
        _shot(page, shots / f"{name}-phone.png")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], "nothing but tables in their own frames may scroll sideways"


def test_a_filter_is_clicked_and_stands_in_the_address(browser, board):
    with _page(browser, DESK) as page:
        page.goto(board)
        _ready(page)
        assert page.get_by_role("rowheader", name="turbo").count() > 0
        for _ in range(10):  # what is clicked while the page is drawn again is lost
            _choose(page, "Family", "top-p")
            page.keyboard.press("Escape")  # an open list hides the rest from the roles
            _ready(page)
            if "family=top-p" in page.url:
                break
        table = page.get_by_role("region", name="Decoders by suite")
        assert table.get_by_role("rowheader", name="top-p[p=0.5]").count() == 1
        assert table.get_by_role("rowheader", name="turbo").count() == 0


def test_a_link_in_the_table_leads_to_the_decoder_and_can_be_reached_by_keyboard(browser, board):
    with _page(browser, DESK) as page:
        page.goto(board)
        _ready(page)
        link = page.get_by_role("region", name="Decoders by suite").get_by_role("link", name="turbo")
        link.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/decoder?decoder=turbo&*scale=quick*", timeout=10_000)
        _ready(page)
        assert page.get_by_role("heading", name="turbo", exact=True).count() == 1


def test_who_comes_by_a_link_first_sees_the_whole_frame(browser, tmp_path):
    """The first request to a new server is for a page that is not the first: it has the navigation, and our tables."""
    with _served(demo(tmp_path / "r.duckdb")) as address, _page(browser, DESK) as page:
        page.goto(f"{address}/decoder?decoder=turbo")
        _ready(page)
        assert page.get_by_role("link", name="Trade-off").count() == 1
        border = "getComputedStyle(document.querySelector('.board table')).borderCollapse"
        assert page.evaluate(border) == "collapse"


def test_charts_have_words_for_those_who_do_not_see_them(browser, board):
    with _page(browser, DESK) as page:
        page.goto(f"{board}/trade-off")
        _ready(page)
        words = page.get_by_label("On the Pareto front").or_(page.locator("[alt*='Pareto front']"))
        words.first.wait_for(state="attached", timeout=20_000)


def test_a_blind_vote_by_keyboard(browser, tmp_path):
    from decodathlon.harness.arena import pairs
    from decodathlon.harness.arena.pairs import Pair

    results = demo(tmp_path / "r.duckdb")
    some = [Pair(f"p{i}", f"Why {i}?", "own", "", (f"one-{i}", f"other-{i}")) for i in range(2)]
    pairs.save(pairs.home(results) / "mine", decoders=["top-p", "min-p"], model="m", pairs=some, more={})
    with _served(results) as address, _page(browser, DESK) as page:
        page.goto(f"{address}/arena?annotator=ann&set=mine")
        _ready(page)
        for number, key in enumerate(("ArrowLeft", "ArrowDown")):
            page.get_by_text(f"{number} of 2 judged").wait_for(timeout=10_000)
            assert page.get_by_text("min-p").count() == 0
            _ready(page)  # a key that meets a page being drawn is lost
            page.keyboard.press(key)
        page.get_by_text("You have judged them all").wait_for(timeout=10_000)
    arena = pairs.load(pairs.home(results) / "mine")
    first, second = arena.votes()
    seen = arena.shown(arena.pairs[0], "ann")[0]
    assert seen == arena.pairs[0].answers[0 if first.choice == "first" else 1]
    assert second.choice == "bad"


def test_from_a_table_at_equal_cost_down_to_one_answer(browser, tmp_path, shots):
    with _served(asked(tmp_path / "r.duckdb")) as address, _page(browser, DESK) as page:
        page.goto(f"{address}/tasks?answers=temperature&cost=answer_tokens")
        _ready(page)
        _choose(page, "Budget", "400 per question")
        page.wait_for_function("location.search.includes('budget=400')", timeout=10_000)
        table = page.get_by_role("region", name="At most 400 new tokens of the answers given per question")
        assert "no more were drawn" in table.get_by_role("row").filter(has_text="thrifty").inner_text()
        _ready(page)  # a click on what is being drawn anew is lost
        for _ in range(5):
            page.get_by_role("radio", name="wrong (2)").click()
            _ready(page)
            if "kind=wrong" in page.url:
                break
        _choose(page, "Question", "math-11")
        page.get_by_text("temperature says 3 to 11").wait_for(timeout=10_000)
        assert page.get_by_text("<b>Think</b>").count() == 1, "text of others is text"
        _ready(page)
        _shot(page, shots / "tasks-answer.png")


def test_nothing_is_advertised_over_the_page(browser, board):
    """Streamlit shows an offer of its own to whom it takes for a developer; here is its place in the page."""
    with _page(browser, PHONE) as page:
        page.goto(board)
        _ready(page)
        offer = "const e = document.createElement('div'); e.dataset.testid = 'stSkillsNudge'; e.textContent = 'Install'"
        page.evaluate(f"() => {{ {offer}; document.body.append(e) }}")
        page.get_by_test_id("stSkillsNudge").wait_for(state="hidden", timeout=10_000)


def test_an_open_page_shows_what_a_run_writes(browser, tmp_path):
    from made_results import cell, day, speed_metrics, write_run

    results = demo(tmp_path / "r.duckdb")
    with _served(results) as address, _page(browser, DESK) as page:
        page.goto(address)
        _ready(page)
        one = cell("live", "throughput", "newcomer", speed_metrics(1, 1.0), started=day(21), slice="batch-1")
        live = write_run(results.with_suffix(".shards"), "live", [one], started=day(21), planned=4)
        with file_lock(live / shards.LOCK_FILE):
            page.get_by_role("rowheader", name="newcomer").first.wait_for(timeout=20_000)
            page.get_by_text("being measured: live, 1 of 4 cells").wait_for(timeout=10_000)
        page.get_by_text("stopped: live, 1 of 4 cells").wait_for(timeout=10_000)
