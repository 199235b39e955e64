"""A real browser for tests of pages: Debian's chromium, Chrome, or the one that playwright has downloaded."""

import contextlib
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

_launched = []


class Opened:
    """A page, and what the browser had to say about it."""

    def __init__(self, page):
        self.page = page
        self.complaints = []
        self.requests = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def column(self, table, index):
        """Texts of one column of a table, of the rows that are shown."""
        cells = self.page.locator(f'[data-table="{table}"] tbody tr:visible td:nth-child({index + 1})')
        return cells.all_inner_texts()

    def sort(self, table, index):
        self.page.locator(f'[data-table="{table}"] th').nth(index).locator("button").click()


@pytest.fixture(scope="session")
def browser():
    """A headless browser; the test is skipped where there is none."""
    if _launched:  # every module that imports this fixture has one of its own; playwright allows one browser a thread
        yield _launched[0]
        return
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    with contextlib.ExitStack() as stack:
        playwright = stack.enter_context(sync_playwright())
        if found is None and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip("no browser found: apt-get install chromium, or playwright install chromium")
        launched = playwright.chromium.launch(executable_path=found, args=FLAGS)
        stack.callback(launched.close)
        _launched.append(launched)
        yield launched
        _launched.clear()


@pytest.fixture
def opened(browser):
    """Open a file: ``opened(path, width)``."""
    with contextlib.ExitStack() as stack:

        def open_file(path, width=1280, theme="light"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
            stack.callback(page.close)
            page.set_default_timeout(5000)
            found = Opened(page)
            page.goto(path.as_uri(), wait_until="load")
            return found

        yield open_file
