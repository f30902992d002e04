"""The report and the comparison in headless Chromium.

The browser's console stays empty, every picture has a size, and the numbers are those of
metrics.jsonl.
"""

import re

import browser_checks
import pytest
from browser_checks import open_page
from run_with_report import make_run_with_report, write_metrics
from untrained_run import make_run

from ssl_pretrain.eval import compare
from ssl_pretrain.eval.html import sections

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
