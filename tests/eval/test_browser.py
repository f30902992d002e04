"""The report, the comparison and the live page in headless Chromium.

The browser's console stays empty, every picture has a size, and the numbers are those of
metrics.jsonl.
"""

import json
import re
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import browser_checks
import pytest
from browser_checks import console_entries, open_page
from run_with_report import make_run_with_report, write_metrics
from untrained_run import make_run

from ssl_pretrain.eval import compare
from ssl_pretrain.eval.html import live, sections

pytestmark = browser_checks.needs_browser


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_run_with_report(tmp_path_factory.mktemp("runs") / "digits")


def count_points(browser, label):
    """Return the number of points of the first curve of the chart with this label."""
    selector = "`svg[aria-label^='${arguments[0]} against'] #curve-0 path`"
    script = f"return document.querySelector({selector}).getAttribute('d')"
    path = browser.execute_script(script, label)
    return len(re.findall("[ML]", path))


def test_the_report_shows_every_point_of_its_curves(browser, digits):
    text = open_page(browser, (digits / "report.html").as_uri())
    assert "moved <together>" in text
    assert "52.0" in text
    records = sections.read_metrics(digits)
    assert count_points(browser, "loss") == len(records)
    assert count_points(browser, "k-NN accuracy") == len(sections.metric_points(records, "knn"))


def test_the_comparison_shows_differences_before_numbers(browser, digits, tmp_path):
    other = make_run(tmp_path / "other", "optim.base_lr=0.125")
    write_metrics(other, num_steps=20)
    text = open_page(browser, compare.write([digits, other], tmp_path / "compare.html").as_uri())
    speeds = [sections.read_metrics(run)[-1]["images_per_second"] for run in (digits, other)]
    assert f"Speed: images per second {speeds[0]:.6g} {speeds[1]:.6g}" in text
    assert text.index("optim.base_lr") < text.index("last value")


@contextmanager
def serve(run):
    """Serve the live page of a run and yield its address."""
    server = live.build_server(run)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def test_the_live_page_follows_the_run(browser, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    run = make_run(tmp_path / "run")
    write_metrics(run, num_steps=10)
    with serve(run) as address:
        text = open_page(browser, address)
        assert "loss\n1.0000" in text
        assert "step\n10" in text
        record = json.loads((run / "metrics.jsonl").read_text().splitlines()[9])
        with (run / "metrics.jsonl").open("a") as file:
            file.write("\n" + json.dumps(record | {"step": 11, "epoch": 2.2, "loss": 0.125}) + "\n")
        WebDriverWait(browser, 60).until(
            lambda driver: "loss\n0.1250" in driver.find_element("tag name", "body").text
        )
        assert count_points(browser, "loss") == 11
        assert console_entries(browser, "SEVERE") == []


def test_the_live_page_is_served_to_this_machine_only(tmp_path):
    server = live.build_server(make_run(tmp_path / "run"))
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()


def test_an_unchanged_live_page_is_not_sent_twice_and_no_other_file_is_sent(tmp_path):
    with serve(make_run(tmp_path / "run")) as address:
        response = urllib.request.urlopen(address + "main")
        assert "No record yet." in response.read().decode()
        headers = {"If-None-Match": response.headers["ETag"]}
        with pytest.raises(urllib.error.HTTPError, match="304"):
            urllib.request.urlopen(urllib.request.Request(address + "main", headers=headers))
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + "../config.yaml")
