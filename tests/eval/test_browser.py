"""The report, the comparison and the live page in a real headless chromium.

There is no console error, every picture has a size, and the numbers are those of metrics.jsonl.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from contextlib import contextmanager

import pytest
from test_report import (
    digits,  # noqa: F401  # the run that is shown
    make_run,
    write_metrics,
)

from ssl_pretrain.eval import compare
from ssl_pretrain.eval.html import live, sections

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="chromium and chromedriver are not installed: apt-get install chromium chromium-driver",
)
SIZES = """return [...document.querySelectorAll("img, svg")].map(e => {
  const box = e.getBoundingClientRect();
  return [e.tagName, box.width, box.height, e.tagName === "IMG" ? e.naturalWidth : 1]; });"""


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install selenium"
    )
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,2400",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


def opened(browser, address):
    """The page's text, after what must hold of every page was checked."""
    browser.get(address)
    sizes = browser.execute_script(SIZES)
    assert sizes and all(
        width > 0 and height > 0 and natural > 0 for _, width, height, natural in sizes
    ), sizes
    assert [
        entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ] == []
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= window.innerWidth"
    )  # nothing sticks out
    return browser.find_element("tag name", "body").text


def num_points(browser, label):
    """Return the number of points of the first curve of the chart with this label."""
    script = (
        "return document.querySelector(`svg[aria-label^='${arguments[0]} against'] #curve-0 path`)"
    )
    path = browser.execute_script(f"{script}.getAttribute('d')", label)
    return len(re.findall("[ML]", path))


def test_the_report(browser, digits):  # noqa: F811
    text = opened(browser, (digits / "report.html").as_uri())
    assert "moved <together>" in text and "52.0" in text
    records = sections.read_metrics(digits)
    assert num_points(browser, "loss") == len(records) and num_points(
        browser, "k-NN accuracy"
    ) == len(sections.curve(records, "knn"))


def test_the_comparison(browser, digits, tmp_path):  # noqa: F811
    other = make_run(tmp_path / "other", "optim.base_lr=0.125")
    write_metrics(other, num=20)
    text = opened(browser, compare.write([digits, other], tmp_path / "compare.html").as_uri())
    last = [sections.read_metrics(run)[-1]["images_per_second"] for run in (digits, other)]
    assert f"Speed: images per second {last[0]:.6g} {last[1]:.6g}" in text and text.index(
        "optim.base_lr"
    ) < text.index("last value of")


@contextmanager
def served(run):
    serving = live.server(run)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{serving.server_port}/"
    finally:
        serving.shutdown()
        serving.server_close()


def test_the_live_page_follows_the_run(browser, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    run = make_run(tmp_path / "run")
    write_metrics(run, num=10)
    with served(run) as address:
        text = opened(browser, address)
        assert "loss\n1.0000" in text and "step\n10" in text
        record = json.loads((run / "metrics.jsonl").read_text().splitlines()[9])
        with (run / "metrics.jsonl").open("a") as file:
            file.write("\n" + json.dumps(record | {"step": 11, "epoch": 2.2, "loss": 0.125}) + "\n")
        WebDriverWait(browser, 60).until(
            lambda driver: "loss\n0.1250" in driver.find_element("tag name", "body").text
        )
        assert num_points(browser, "loss") == 11
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_live_page_is_of_this_machine_alone_and_an_unchanged_one_is_not_sent_again(tmp_path):
    import urllib.error
    import urllib.request

    run = make_run(tmp_path / "run")
    serving = live.server(run)
    assert serving.server_address[0] == "127.0.0.1"
    serving.server_close()
    with served(run) as address:
        first = urllib.request.urlopen(address + "main")
        assert "No record yet." in first.read().decode()
        again = urllib.request.Request(
            address + "main", headers={"If-None-Match": first.headers["ETag"]}
        )
        with pytest.raises(urllib.error.HTTPError, match="304"):
            urllib.request.urlopen(again)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + "../config.yaml")
