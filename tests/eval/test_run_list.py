"""`ssl-pretrain runs`: the runs below a folder as a page, a table and data."""

import json
import shutil
import urllib.error
import urllib.request

import browser_checks
import pytest
from browser_checks import open_page
from page_runs import add_records, add_result, make_small_run, serve, train

from ssl_pretrain.eval import run_list
from ssl_pretrain.eval.html import run_list_server
from ssl_pretrain.eval.run_folders import RunFolders

needs_browser = browser_checks.needs_browser


@pytest.fixture
def runs(tmp_path):
    """Three runs, one of them in a study and one with a name to escape."""
    folder = tmp_path / "runs"
    add_result(make_small_run(folder / "first", steps=(10, 20, 30)), "linear", 81.5)
    make_small_run(folder / "study" / "lr=0.1", method="dino", seed=1)
    make_small_run(folder / "a <b> & 50% #1", method="vicreg", seed=2)
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(autouse=True)
def refresh_quickly(monkeypatch):
    monkeypatch.setattr(run_list_server, "REFRESH_SECONDS", 0.2)
    monkeypatch.setattr(run_list_server, "MIN_SCAN_SECONDS", 0.0)


def serve_list(folder):
    return serve(run_list_server.build_server(RunFolders(folder)))


def get(address, **headers):
    request = urllib.request.Request(address, headers=headers)
    return urllib.request.urlopen(request).read().decode()


def wait_until(browser, script, *arguments):
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 60, poll_frequency=0.1)
    return wait.until(lambda driver: driver.execute_script(f"return {script}", *arguments))


def names_on(browser):
    script = """return [...document.querySelectorAll(".runs tbody tr:not([hidden])")]
        .map(row => row.dataset.key)"""
    return browser.execute_script(script)


def test_runs_are_found_at_every_depth_and_new_and_deleted_ones_are_noticed(runs):
    folders = RunFolders(runs)
    assert list(folders.read()) == ["a <b> & 50% #1", "first", "study/lr=0.1"]
    make_small_run(runs / "study" / "lr=0.2")
    (runs / "first").rename(runs / "renamed")
    assert list(folders.read()) == ["a <b> & 50% #1", "renamed", "study/lr=0.1", "study/lr=0.2"]
    assert list(RunFolders(runs / "renamed").read()) == ["renamed"]


def test_the_table_has_a_line_per_run_and_fits_the_terminal(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    with pytest.raises(RuntimeError), train(runs / "first"):
        raise RuntimeError("out of memory")
    with train(runs / "study" / "lr=0.1"):
        run_list.main([str(runs), "--text"])
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 72
    header, _, *rows = output.splitlines()
    assert header.split()[:3] == ["run", "state", "done"]
    assert [row.split()[0] for row in rows[:2]] == ["study/lr=0.1", "first"]
    assert "81.5" in rows[1]
    assert rows[-2:] == [
        "3 runs: 1 running, 1 failed, 1 stopped",
        "first: RuntimeError: out of memory",
    ]


def test_the_states_are_printed_as_json(runs, capsys):
    run_list.main([str(runs), "--json"])
    first = json.loads(capsys.readouterr().out)[1]
    assert (first["name"], first["state"], first["step"]) == ("first", "stopped", 30)
    assert first["evaluations"] == {"linear": 81.5}


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError) as error:
        run_list.main([str(tmp_path / "missing")])
    assert str(error.value) == (
        f"{tmp_path}/missing: no such folder; give the folder that holds your runs"
    )


def test_only_the_rows_that_changed_are_sent(runs):
    with serve_list(runs) as address:
        first = json.loads(get(address + "changes?since=0"))
        assert len(first["rows"]) == len(first["names"]) == 3
        unchanged = json.loads(get(f"{address}changes?since={first['version']}"))
        assert (unchanged["rows"], unchanged["names"]) == ({}, None)
        with train(runs / "first"):
            add_records(runs / "first", 40)
        later = json.loads(get(f"{address}changes?since={first['version']}"))
        assert list(later["rows"]) == ["first"] and later["names"] is None
        assert "40 of 300" in later["rows"]["first"]


def test_a_page_of_an_earlier_server_gets_every_row(runs):
    with serve_list(runs) as address:
        version = json.loads(get(address + "changes"))["version"]
    with serve_list(runs) as address:
        assert len(json.loads(get(f"{address}changes?since={version}"))["rows"]) == 3


def test_each_run_has_its_live_page_and_its_report_and_no_other_file_is_sent(runs):
    (runs / "first" / "report.html").write_text("<p>the report")
    with serve_list(runs) as address:
        assert "lr=0.1" in get(address + "run/study/lr%3D0.1/")
        assert "lr=0.1" in get(address + "run/study/lr%3D0.1")  # redirected
        assert "a &lt;b&gt;" in get(address + "run/a%20%3Cb%3E%20%26%2050%25%20%231/main")
        assert get(address + "run/first/report.html") == "<p>the report"
        for path in (
            "run/first/config.yaml",
            "run/first/../first/config.yaml",
            "run/..%2f..%2fetc/passwd",
            "run/study/lr%3D0.1/report.html",
            "run/missing/",
            "compare?run=first&run=../first",
            "compare?run=first",
            "metrics.jsonl",
        ):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(address + path)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            get(address, Host="attacker.example")


def test_two_runs_are_compared_without_a_file(runs):
    before = sorted(runs.rglob("*"))
    with serve_list(runs) as address:
        page = get(address + "compare?run=first&run=study/lr%3D0.1")
    assert "lr=0.1" in page and "dino" in page
    assert sorted(runs.rglob("*")) == before


def test_a_page_for_the_disk_links_to_the_reports(runs, tmp_path):
    (runs / "a <b> & 50% #1" / "report.html").write_text("<p>the report")
    run_list.main([str(runs), "--output", str(tmp_path / "runs.html")])
    page = (tmp_path / "runs.html").read_text()
    assert 'href="runs/a%20%3Cb%3E%20%26%2050%25%20%231/report.html"' in page
    assert "/run/" not in page and "<b>" not in page.partition("<tbody>")[2]


@needs_browser
def test_an_update_keeps_filters_order_selection_folds_and_focus(browser, runs):
    with serve_list(runs) as address:
        open_page(browser, address)
        browser.find_element("css selector", "[data-key=first] summary").click()
        browser.find_element("css selector", "[data-key=first] input").click()
        browser.find_element("css selector", "[data-key='study/lr=0.1'] input").click()
        browser.find_element("xpath", "//th/button[text()='seed']").click()
        assert names_on(browser) == ["a <b> & 50% #1", "study/lr=0.1", "first"]
        filters = browser.find_element("id", "filter")
        filters.send_keys("digits stopped")
        choices = """[document.activeElement.id, document.getElementById("compare").textContent,
            document.getElementById("filter").value,
            document.querySelector("[data-key=first] details").open]"""
        state = browser.execute_script(f"return {choices}")
        assert state == ["filter", "Compare 2 runs", "digits stopped", True]
        make_small_run(runs / "fourth", seed=7)
        with train(runs / "first"):
            add_records(runs / "first", 60)
        wait_until(browser, "document.body.innerText.includes('60 of 300')")
        wait_until(browser, "document.body.innerText.includes('4 runs')")
        assert names_on(browser) == ["fourth", "a <b> & 50% #1", "study/lr=0.1", "first"]
        assert browser.execute_script(f"return {choices}") == state
        filters.clear()
        filters.send_keys("dino")
        assert names_on(browser) == ["study/lr=0.1"]
        browser.refresh()  # the address and the session remember
        assert names_on(browser) == ["study/lr=0.1"]
        compare = browser.find_element("id", "compare")
        assert compare.text == "Compare 2 runs"
        browser_checks.check_console(browser)
        compare.click()
        wait_until(browser, "location.pathname === '/compare'")


@needs_browser
def test_deleted_runs_leave_the_page_and_others_are_updated_again(browser, runs):
    with serve_list(runs) as address:
        open_page(browser, address)
        with train(runs / "first"):
            for step in (60, 70):
                add_records(runs / "first", step)
                wait_until(browser, f"document.body.innerText.includes('{step} of 300')")
        shutil.rmtree(runs / "first")
        shutil.rmtree(runs / "study")
        wait_until(browser, "document.body.innerText.includes('1 run:')")
        assert names_on(browser) == ["a <b> & 50% #1"]
        browser_checks.check_console(browser)


@needs_browser
def test_the_list_is_shown_without_javascript(browser, runs):
    with serve_list(runs) as address:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        try:
            browser.get(address)
            links = browser.find_elements("css selector", ".runs .name a")
            assert len(links) == 3 and all(link.is_displayed() for link in links)
        finally:
            browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@needs_browser
def test_rows_are_sorted_and_selected_by_keyboard(browser, runs):
    with serve_list(runs) as address:
        open_page(browser, address)
        stops = ".runs button, .runs a, .runs summary, .runs input, .filters input, .filters select"
        assert browser_checks.unreachable_by_tab(browser, stops) == []
        button = browser.find_element("xpath", "//th/button[text()='progress']")
        browser.execute_script("arguments[0].focus()", button)
        browser_checks.press(browser, "Enter")
        browser_checks.press(browser, "Enter")
        assert names_on(browser)[0] == "first"
        assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"


@needs_browser
@pytest.mark.full
def test_the_list_is_sound_in_all_windows(browser, runs):
    with pytest.raises(RuntimeError), train(runs / "first"):
        raise RuntimeError("CUDA out of memory. " * 20)
    with train(runs / "study" / "lr=0.1"), serve_list(runs) as address:
        open_page(browser, address)
        for summary in browser.find_elements("css selector", ".runs summary"):
            summary.click()
        browser_checks.check_in_all_windows(browser)
