"""The report, the comparison and the service's page in headless Chromium.

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
from ssl_pretrain.eval.html import run_files

pytestmark = browser_checks.needs_browser


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_run_with_report(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def comparison(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    other = make_run(folder / "other", "optim.base_lr=0.125")
    write_metrics(other, num_steps=20)
    return compare.write([digits, other], folder / "compare.html")


@pytest.fixture(scope="module")
def service_page(tmp_path_factory):
    pytest.importorskip("fastapi")
    pytest.importorskip("onnx")
    from small_service import open_client, open_service, write_export

    folder = tmp_path_factory.mktemp("service")
    with open_client(open_service(write_export(folder / "export"))) as client:
        (folder / "docs.html").write_text(client.get("/docs").text, encoding="utf-8")
    return folder / "docs.html"


def count_points(browser, label):
    """Return the number of points of the first curve of the chart with this label."""
    selector = "`svg[aria-label^='${arguments[0]} against'] #curve-0 path`"
    script = f"return document.querySelector({selector}).getAttribute('d')"
    path = browser.execute_script(script, label)
    return len(re.findall("[ML]", path))


def read_by_keyboard(browser, label):
    """Return what a chart's tooltip says, from the last point to the first."""
    browser_checks.press(browser, "Tab")  # the last input decides whether focus is visible
    chart = browser.execute_script(
        "const chart = document.querySelector(`svg[aria-label^='${arguments[0]} against']`);"
        "chart.focus({focusVisible: true}); return chart",
        label,
    )
    num_stops = browser.execute_script(
        "return JSON.parse(arguments[0].dataset.chart).series[0].x.length", chart
    )
    texts = [browser.execute_script(browser_checks.TOOLTIP)]
    for _ in range(num_stops - 1):
        browser_checks.press(browser, "ArrowLeft")
        texts.append(browser.execute_script(browser_checks.TOOLTIP))
    return texts


def saved_file(browser, label, kind):
    """Return the name and the text of the file that a chart's button saves."""
    return browser.execute_async_script(
        """const [label, kind, done] = arguments, click = HTMLAnchorElement.prototype.click;
        HTMLAnchorElement.prototype.click = async function () {
          HTMLAnchorElement.prototype.click = click;
          done([this.download, await blob.text()]);
        };
        let blob = null;
        const create = URL.createObjectURL;
        URL.createObjectURL = object => { blob = object; return create(object); };
        const chart = document.querySelector(`svg[aria-label^='${label} against']`);
        chart.closest("figure").querySelector(`[data-save=${kind}]`).click();""",
        label,
        kind,
    )


def test_the_report_shows_every_point_of_its_curves(browser, digits):
    text = open_page(browser, (digits / "report.html").as_uri())
    assert "moved <together>" in text
    assert "52.0" in text
    records = run_files.read_metrics(digits)
    assert count_points(browser, "Loss") == len(records)
    knn_points = run_files.metric_points(records, "knn")
    assert count_points(browser, "k-NN accuracy, %") == len(knn_points)


def test_the_report_fits_every_window_and_is_legible(browser, digits):
    open_page(browser, (digits / "report.html").as_uri())
    browser_checks.check_in_all_windows(browser)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser_checks.check_in_all_windows(browser, schemes=("light",))


def test_the_comparison_fits_every_window_and_is_legible(browser, comparison):
    open_page(browser, comparison.as_uri())
    browser_checks.check_in_all_windows(browser)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser_checks.check_in_all_windows(browser, schemes=("light",))


def test_the_page_of_the_service_fits_every_window_and_is_legible(browser, service_page):
    open_page(browser, service_page.as_uri())
    browser_checks.check_in_all_windows(browser)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser_checks.check_in_all_windows(browser, schemes=("light",))
    unreachable = browser_checks.unreachable_by_tab(browser, "input, button, summary")
    assert not unreachable, unreachable


def test_the_keyboard_reads_every_value_of_a_curve(browser, digits):
    open_page(browser, (digits / "report.html").as_uri())
    points = run_files.metric_points(run_files.read_metrics(digits), "knn")
    texts = read_by_keyboard(browser, "k-NN accuracy, %")
    assert texts == [f"epoch {x:g}k-NN accuracy, % {y:g}" for x, y in reversed(points)]
    unreachable = browser_checks.unreachable_by_tab(browser, "svg.chart, [data-roving], button")
    assert not unreachable, unreachable


def test_the_pointer_reads_the_values_of_all_runs(browser, comparison):
    from selenium.webdriver.common.action_chains import ActionChains

    open_page(browser, comparison.as_uri())
    chart = browser.find_element("css selector", "svg[aria-label^='Loss against']")
    ActionChains(browser, duration=0).move_to_element(chart).perform()
    text = browser.execute_script(browser_checks.TOOLTIP)
    assert re.fullmatch(r"epoch [\d.]+(digits|other) [\d.]+(digits|other) [\d.]+", text), text


def test_the_arrow_keys_show_the_name_of_every_image(browser, digits):
    open_page(browser, (digits / "report.html").as_uri())
    browser_checks.press(browser, "Tab")  # as in `read_by_keyboard`
    names = browser.execute_async_script(
        """const done = arguments[0], map = document.querySelector(".map");
        map.focus({focusVisible: true});
        const tip = document.querySelector("[role=tooltip]"), names = [tip.textContent];
        map.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
        setTimeout(() => {
          names.push(tip.textContent, tip.querySelectorAll("i").length);
          done(names);
        }, 200);"""
    )
    first, second, num_pictures = names
    assert first.isdigit() and second.isdigit() and num_pictures == 1


def test_a_chart_is_saved_with_its_values(browser, digits):
    open_page(browser, (digits / "report.html").as_uri())
    name, text = saved_file(browser, "k-NN accuracy, %", "csv")
    points = run_files.metric_points(run_files.read_metrics(digits), "knn")
    assert name == "digits_knn.csv"
    header, *lines = text.splitlines()
    assert header == 'epoch,"k-NN accuracy, %"'
    values = [tuple(map(float, line.split(","))) for line in lines]
    assert values == [pytest.approx(point) for point in points]


def test_a_saved_picture_needs_nothing_else(browser, digits, tmp_path):
    open_page(browser, (digits / "report.html").as_uri())
    name, text = saved_file(browser, "Covariance spectrum", "svg")
    assert name == "covariance_spectrum.svg"
    assert "var(" not in text and "data-chart" not in text
    assert "step 5" in text  # the legend
    (tmp_path / name).write_text(text)
    browser.get((tmp_path / name).as_uri())
    assert browser.execute_script("return document.documentElement.localName") == "svg"
    browser_checks.check_console(browser)


def test_a_page_without_javascript_shows_its_charts(browser, digits):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get((digits / "report.html").as_uri())
        charts = browser.find_elements("css selector", "svg.chart .curve")
        assert len(charts) > 6 and all(chart.is_displayed() for chart in charts)
        buttons = browser.find_elements("css selector", ".downloads")
        assert not any(button.is_displayed() for button in buttons)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_comparison_shows_results_before_the_differing_keys(browser, comparison):
    open_page(browser, comparison.as_uri())
    texts = browser.execute_script(
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "return document.body.innerText"
    )
    assert texts.index("52.0") < texts.index("optim.base_lr")
    assert re.search(r"Speed: images per second\s+140\s+120", texts)
