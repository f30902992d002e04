"""Headless Chromium for tests of pages, and the checks that every page has to pass.

A test module takes the browser from the fixture `browser` and skips without one:

    pytestmark = browser_checks.needs_browser

    def test_the_page_is_sound(browser, page):
        browser_checks.open_page(browser, page.as_uri())
        browser_checks.check_in_all_windows(browser)
"""

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="chromium and chromedriver are not installed: apt-get install chromium chromium-driver",
)
ARGUMENTS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage"
WIDTHS, SCHEMES = (1400, 400), ("light", "dark")
CHECKS = ("overflow", "pictures", "contrast", "headings", "controls")
WINDOW_HEIGHT = 1000
# The text of the tooltip that is shown, or "".
TOOLTIP = """return [...document.querySelectorAll("[role=tooltip]")]
  .filter(pageChecks.shown).map(e => e.textContent.trim()).join(" | ")"""
MARK_FOCUS = """window.reached = new Set();
document.addEventListener("focusin", event => window.reached.add(event.target));"""


@contextmanager
def start_browser() -> Iterator[Any]:
    """Start headless Chromium, yield its driver, and end it."""
    selenium = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install selenium"
    )
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (*ARGUMENTS.split(), "--window-size=1200,2400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


@functools.cache
def _page_checks() -> str:
    return Path(__file__).with_name("page_checks.js").read_text()


def console_entries(browser, *levels):
    """Return the new entries of the browser's console of these levels."""
    return [entry for entry in browser.get_log("browser") if entry["level"] in levels]


def check_console(browser):
    """Check that the browser's console has no new error or warning."""
    entries = console_entries(browser, "SEVERE", "WARNING")
    assert not entries, entries


def set_window(browser, width, scheme="light", height=WINDOW_HEIGHT):
    """Give the page a window of this width and a color scheme, as a user's system would."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def open_page(browser, address, width=1200):
    """Open a page, check what a page must have in any window, and return its text."""
    set_window(browser, width)
    browser.get("about:blank")  # the page before may still ask a server that has ended
    browser.get_log("browser")
    browser.get(address)
    check_page(browser, ("pictures", "headings", "controls"))
    check_console(browser)
    return browser.find_element("tag name", "body").text


def check_page(browser, checks=CHECKS):
    """Check the open page in the present window.

    Nothing is wider than the window or cut off, pictures have sizes, text is legible (WCAG AA),
    headings are in order, and every control has a name.
    """
    browser.execute_script(_page_checks())
    calls = ", ".join(f"{name}: pageChecks.{name}()" for name in checks)
    problems = browser.execute_script(f"return {{{calls}}}")
    messages = [f"{name}: {problem}" for name in checks for problem in problems[name]]
    assert not messages, "\n".join(messages)


def check_in_all_windows(browser, widths=WIDTHS, schemes=SCHEMES):
    """Check the open page at each width in each color scheme, and that its console is empty."""
    for width in widths:
        for scheme in schemes:
            set_window(browser, width, scheme)
            try:
                check_page(browser)
            except AssertionError as error:
                raise AssertionError(f"{width} pixels, {scheme}: {error}") from None
    check_console(browser)
    set_window(browser, 1200)


def press(browser, key, times=1):
    """Press a key, such as Tab or ArrowRight, in the page."""
    codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}
    event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
    if key in ("Enter", " "):
        event["text"] = "\r" if key == "Enter" else " "
    for _ in range(times):
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", **event})
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", **event})


def unreachable_by_tab(browser, selector):
    """Press Tab through the whole page and return the shown elements that never got the focus."""
    browser.execute_script(_page_checks() + MARK_FOCUS + "document.activeElement.blur()")
    num_stops = browser.execute_script(
        """return [...document.querySelectorAll("*")].filter(e => e.tabIndex >= 0).length"""
    )
    press(browser, "Tab", num_stops + 2)
    return browser.execute_script(
        """return [...document.querySelectorAll(arguments[0])]
        .filter(e => pageChecks.shown(e) && !window.reached.has(e)).map(pageChecks.name)""",
        selector,
    )
