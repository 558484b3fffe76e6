"""``kvledger view`` in a real browser (headless Chromium); skipped where there is none."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvledger import CacheConfig, CacheManager
from kvledger.debugger import open_source
from kvledger.view.export import export
from tests.view.viewing import HOSTILE, hostile_log, record, serving, showing
from tests.waiting import PATIENCE_S

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
_DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (_CHROMIUM and _DRIVER), reason="needs Chromium and chromedriver")
ROOT = Path(__file__).parents[2]


class Browser:
    """A page in Chromium, driven like a user drives it."""

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = _CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,900"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))

    def open(self, url: str) -> None:
        self.driver.get("about:blank")
        self.driver.get(url)
        self.until("document.body.dataset.ready === 'yes'")

    def js(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    def until(self, condition: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, PATIENCE_S, 0.02).until(lambda driver: self.js(condition), condition)

    def at(self, number: int) -> None:
        """Wait until the page shows that event."""
        self.until(f"model.at === {number}")

    def press(self, *keys: str, shift: bool = False) -> None:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        chain = ActionChains(self.driver)
        if shift:
            chain.key_down(Keys.SHIFT)
        for key in keys:
            chain.send_keys(getattr(Keys, key, key))
        if shift:
            chain.key_up(Keys.SHIFT)
        chain.perform()

    def click(self, selector: str, x: float, y: float) -> None:
        """Click inside an element, in pixels from its upper left corner."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By

        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        width, height = element.rect["width"], element.rect["height"]
        chain = ActionChains(self.driver)
        chain.move_to_element_with_offset(element, int(x - width // 2), int(y - height // 2)).click().perform()

    def drag(self, selector: str, start: float, stop: float) -> None:
        """Drag along an element, in shares of its width."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By

        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        width = element.rect["width"]
        chain = ActionChains(self.driver)
        chain.move_to_element_with_offset(element, int((start - 0.5) * width), 0).click_and_hold()
        for _ in range(5):
            chain.move_by_offset(int((stop - start) * width / 5), 0)
        chain.release().perform()

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({selector!r}).textContent"))

    def state(self) -> Any:
        """Everything the page knows of the state, in a form that can be compared."""
        return self.js(
            "[...TIERS.map((tier) => [[...model.blocks[tier].kinds], [...model.blocks[tier].owners]]),"
            " ...ROWS.map((name) => [...model[name]].sort((a, b) => a[0] - b[0]))]"
        )

    def complaints(self) -> list[str]:
        """What the browser's console says: errors, blocked content."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("view") / "run.kvlog"
    record(path, 400)
    return path


@pytest.fixture
def serve() -> Iterator[Callable[[str | Path], str]]:
    """Serves a log until the test ends: its address."""
    with contextlib.ExitStack() as stack:
        yield lambda src: stack.enter_context(serving(src)).url


@pytest.fixture
def page(browser: Browser, path: Path, serve: Callable[[str | Path], str]) -> Iterator[str]:
    """The address of a recording's page, after which the browser has nothing to complain about."""
    browser.complaints()
    yield serve(path)
    assert browser.complaints() == []


def test_it_loads_at_the_end_and_steps_back_and_forth(browser: Browser, page: str) -> None:
    browser.open(page)
    last = browser.js("summary.last")
    assert browser.js("model.at") == last and browser.text("#event b").replace(",", "").startswith(f"{last} ")
    states = {last: browser.state()}
    for back in range(1, 6):
        browser.press("ARROW_LEFT")
        browser.at(last - back)
        states[last - back] = browser.state()
    assert states[last] != states[last - 5]
    for forth in range(4, -1, -1):
        browser.press("ARROW_RIGHT")
        browser.at(last - forth)
        assert browser.state() == states[last - forth]
    browser.press("HOME")
    browser.at(1)
    browser.press("ARROW_LEFT")  # there is nothing before
    browser.press("PAGE_DOWN")
    browser.at(101)
    browser.press("PAGE_DOWN", shift=True)
    browser.at(1101)


def test_stepping_back_across_a_window_equals_arriving_from_the_other_side(browser: Browser, page: str) -> None:
    browser.open(f"{page}#at=513")
    browser.at(513)
    browser.press("ARROW_LEFT", "ARROW_LEFT")
    browser.at(511)
    backwards = browser.state()
    browser.open(f"{page}#at=400")
    browser.at(400)
    browser.js("void go(511)")
    browser.at(511)
    assert browser.state() == backwards
    browser.press("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT", "ARROW_LEFT")
    browser.at(511)
    assert browser.state() == backwards


def test_shift_steps_by_transactions(browser: Browser, page: str, path: Path) -> None:
    with open_source(str(path)) as source:
        ends = [transaction[-1].sequence for transaction in source.transactions() if transaction[0].sequence > 290][:8]
    assert any(b - a > 1 for a, b in itertools.pairwise(ends))
    browser.open(f"{page}#at={ends[0]}")
    browser.at(ends[0])
    for end in ends[1:]:
        browser.press("ARROW_RIGHT", shift=True)
        browser.at(end)
    for end in reversed(ends[:-1]):
        browser.press("ARROW_LEFT", shift=True)
        browser.at(end)


def test_scrubbing_and_zooming_the_timeline(browser: Browser, page: str) -> None:
    browser.open(page)
    last = browser.js("summary.last")
    browser.drag("#timeline canvas", 0.9, 0.5)
    browser.until(f"Math.abs(model.at - {last} / 2) < {last} * 0.02 && model.at === shown.at")
    browser.press("+", "+")
    browser.until(f"timeline.to - timeline.from < {last} * 0.3 && timeline.data.last.length > 100")
    assert browser.js("timeline.from < model.at && model.at < timeline.to")
    browser.press("0")
    browser.until(f"timeline.from === 1 && timeline.to === {last} && timeline.data.last.at(-1) === {last}")


def test_from_a_block_through_its_history_to_a_request(browser: Browser, page: str) -> None:
    browser.open(f"{page}#at=900")
    browser.at(900)
    cell, columns = browser.js("maps[0].cell"), browser.js("maps[0].columns")
    block = 3 * columns + 5
    browser.click("#device canvas", 5.5 * cell, 3.5 * cell)
    browser.until("document.querySelectorAll('#explain-past li').length > 2")
    assert browser.text("#explain-title") == f"device block {block}"
    assert f"device block {block} is" in browser.text("#explain-now")
    assert browser.js("timeline.marks.length") == browser.js("document.querySelectorAll('#explain-past li').length")
    told = int(browser.text("#explain-past li:last-child .number").replace(",", ""))
    browser.js("document.querySelector('#explain-past li:last-child').click()")
    browser.at(told)
    browser.js("void go(900)")
    browser.at(900)
    browser.until("document.querySelector('#explain-now .link') !== null")
    browser.js("document.querySelector('#explain-now .link').click()")
    browser.until("['run', 'request', 'transfer'].includes(shown.subject?.type)")
    browser.press("r")
    browser.until("document.querySelectorAll('#requests .row').length > 1")
    browser.js("document.querySelectorAll('#requests .row')[1].click()")
    browser.until("shown.subject?.type === 'request' && document.querySelector('#explain-past li .text') !== null")
    assert browser.text("#explain-title").startswith("request ")
    assert "begins" in browser.text("#explain-past li:last-child .text")
    before = browser.js("model.at")
    browser.press(",")
    browser.until(f"model.at < {before} && shown.subject?.id in (model.event.requests ?? {{}})")
    browser.press("ESCAPE")
    assert browser.js("shown.subject") is None


def test_the_tree_shows_every_run_at_that_time(browser: Browser, page: str) -> None:
    browser.open(f"{page}#at=900&tab=tree")
    browser.until("document.querySelectorAll('#tree .row').length > 2")
    assert browser.js("lists.tree.items.filter((line) => line.id).length") == browser.js("model.runs.size")
    browser.js("document.querySelectorAll('#tree .row')[1].click()")
    browser.until("shown.subject?.type === 'run' && shown.tab === 'tree'")
    assert browser.js("document.querySelectorAll('#tree .row.selected').length") == 1


def test_an_address_reproduces_the_view(browser: Browser, page: str) -> None:
    browser.open(f"{page}#at=700")
    browser.at(700)
    browser.press("c", "x", "+")
    browser.js("select({ type: 'host', id: 17 })")
    browser.js("void go(650)")
    browser.at(650)
    browser.until("location.hash.includes('at=650') && location.hash.includes('from=')")
    address, looks = browser.js("location.href"), browser.js("JSON.stringify(shown)")
    state, zoom = browser.state(), browser.js("[Math.round(timeline.from), Math.round(timeline.to)]")
    browser.open(address)
    browser.at(650)
    assert browser.js("JSON.stringify(shown)") == looks and browser.state() == state
    assert browser.js("[Math.round(timeline.from), Math.round(timeline.to)]") == zoom
    browser.js("void (location.hash = '#at=12&tab=requests')")
    browser.at(12)
    assert browser.js("shown.tab") == "requests" and browser.js("shown.subject") is None


def test_going_to_what_is_typed(browser: Browser, page: str) -> None:
    browser.open(page)
    for typed, condition in [
        ("1,234", "model.at === 1234"),
        ("block 17", "shown.subject?.type === 'device' && shown.subject?.id === 17"),
        ("host 3", "shown.subject?.type === 'host' && shown.subject?.id === 3"),
        ("request 20", "shown.subject?.type === 'request' && shown.subject?.id === 21"),
        ("step:x", "document.querySelector('#banner').textContent.includes('no step')"),
        ("5", "model.at === 5 && document.querySelector('#banner').hidden"),
    ]:
        browser.press("/")
        browser.until("document.activeElement.id === 'goto'")
        browser.press(typed, "ENTER")
        browser.until(condition)
        browser.press("ESCAPE")
    assert ["400" in complaint for complaint in browser.complaints()] == [True]


def test_names_that_are_attacks_are_text(browser: Browser, serve: Callable[[str | Path], str], tmp_path: Path) -> None:
    hostile_log(tmp_path / "hostile.kvlog")
    url = serve(tmp_path / "hostile.kvlog")
    with showing(tmp_path / "hostile.kvlog") as log:
        export(log, tmp_path / "hostile.html")
    for address in (url, f"file://{tmp_path}/hostile.html"):
        browser.complaints()
        browser.open(f"{address}#tab=requests&select=request%2020")
        browser.until("document.querySelectorAll('#requests .row').length === 2")
        assert HOSTILE in browser.text("#requests")
        browser.press("e")
        browser.until("document.querySelectorAll('#explain-past li').length > 1")
        assert HOSTILE in browser.text("#explain-title") and "onerror" in browser.text("#event-list")
        assert browser.js("document.images.length") == 0 and "broken" not in browser.js("document.title")
        assert browser.complaints() == []


def test_an_exported_file_needs_nobody(browser: Browser, path: Path, tmp_path: Path) -> None:
    with showing(path) as log:
        export(log, tmp_path / "view.html", 300, 900)
        last = log.last
    browser.complaints()
    browser.open(f"file://{tmp_path}/view.html#at=600")
    browser.at(600)
    assert f"300 to 900 of 1 to {last:,}" in browser.text("#banner")
    forwards = browser.state()
    browser.press("PAGE_DOWN", "PAGE_UP", "ARROW_LEFT", "ARROW_RIGHT")
    browser.at(600)
    assert browser.state() == forwards
    browser.press("HOME", "ARROW_LEFT")
    browser.at(300)
    browser.press("END")
    browser.at(900)
    browser.js("select({ type: 'device', id: 17 })")
    browser.until("document.querySelectorAll('#explain-past li').length > 0")
    browser.press("0")
    browser.until(f"timeline.data.last.at(-1) === {last}")
    assert browser.complaints() == []


def test_an_event_that_contradicts_the_state_stands_out(browser: Browser, serve: Any, tmp_path: Path) -> None:
    # in a process of its own: it takes the guards off
    command = [sys.executable, "-m", "examples.garbled", "twice", str(tmp_path / "twice.kvlog")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True, cwd=ROOT)
    guilty = int(made.stdout.split()[-1])
    browser.open(serve(tmp_path / "twice.kvlog"))
    browser.at(guilty - 1)
    assert f"event {guilty}: TransferStarted: HOST block 4" in browser.text("#banner")
    assert browser.text("#event-list .wrong .number") == str(guilty)
    assert browser.js("document.querySelectorAll('#event-list .beyond').length") > 1
    browser.press("ARROW_RIGHT")
    browser.js("document.querySelector('#event-list .wrong').click()")
    browser.press("/")
    browser.press("host 4", "ENTER")
    browser.until("document.querySelectorAll('#explain-past li').length > 0")
    assert browser.js("model.at") == guilty - 1 and "of run 21" in browser.text("#explain-now")


def test_65_536_blocks_and_one_that_changes_among_them(browser: Browser, serve: Callable[[str | Path], str]) -> None:
    name = f"view-map-{os.getpid()}"
    with CacheManager.create(name, CacheConfig(block_size=4, device_blocks=65_536, ranks=0)) as manager:
        manager.admit("a", [*range(400)])
        browser.open(serve(name))
        assert browser.js("model.counts('device')")[:2] == [65_536 - 100, 100]
        assert browser.js("maps[0].rows * maps[0].columns") >= 65_536
        colours = browser.js(
            "(() => { const { canvas } = maps[0], context = canvas.getContext('2d');"
            " const { data } = context.getImageData(0, 0, canvas.width, canvas.height);"
            " return new Set(new Uint32Array(data.buffer)).size })()"
        )
        assert colours > 2
        browser.press("END")
        manager.cache("a")  # a living ledger: the page follows
        browser.at(manager.next_sequence - 1)
        assert browser.js("model.counts('device')[2]") == 100
