"""The live page of a run: state, progress and what an update leaves alone."""

import socket
import urllib.error
import urllib.request

import browser_checks
import pytest
from browser_checks import open_page
from page_runs import add_records, make_small_run, serve, train
from run_with_report import write_metrics
from untrained_run import make_run

from ssl_pretrain.eval.html import live

needs_browser = browser_checks.needs_browser


@pytest.fixture(autouse=True)
def refresh_quickly(monkeypatch):
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.2)


def wait_for(browser, text):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60, poll_frequency=0.1).until(
        lambda driver: text in driver.find_element("tag name", "body").text
    )


def get(address, **headers):
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers))


@needs_browser
def test_the_live_page_follows_a_run_from_before_its_start_to_its_death(browser, tmp_path):
    run = tmp_path / "run"
    with serve(live.build_server(run)) as address:
        text = open_page(browser, address)
        assert "waiting" in text and f"{run} does not exist yet" in text
        with train(make_small_run(run, steps=range(1, 31))):
            wait_for(browser, "step 30 of 300")
            assert "running\n10 %" in browser.find_element("class name", "status").text
            bar = browser.find_element("css selector", "[role=progressbar]")
            assert bar.get_attribute("aria-valuenow") == "10.0"
            assert browser.title == "10 % · run"
        wait_for(browser, "stopped")
        browser_checks.check_console(browser)


@needs_browser
def test_a_run_that_fails_says_why_on_its_live_page(browser, tmp_path):
    run = make_small_run(tmp_path / "run")
    with serve(live.build_server(run)) as address:
        with pytest.raises(RuntimeError), train(run):
            open_page(browser, address)
            wait_for(browser, "running")
            raise RuntimeError("out of <memory>")
        wait_for(browser, "failed")
        wait_for(browser, "RuntimeError: out of <memory>")


PREPARE = """
window.section = document.querySelector("main > section:last-of-type");
section.tabIndex = 0;
section.focus({preventScroll: true});
const fold = section.appendChild(document.createElement("details"));
fold.append("added by a script");
fold.open = true;
const facts = [...document.querySelectorAll("dd")];
getSelection().selectAllChildren(facts.find(item => item.textContent === "simclr"));
document.documentElement.scrollTop = 150;
"""
STATE = """return [section === document.querySelector("main > section:last-of-type"),
    document.activeElement === section, document.querySelector("details[open]") !== null,
    document.documentElement.scrollTop, getSelection().toString()]"""


@needs_browser
def test_an_update_keeps_selection_scroll_position_focus_and_folds(browser, tmp_path):
    run = make_run(tmp_path / "run")
    add_records(run, *range(1, 11))
    with train(run), serve(live.build_server(run)) as address:
        open_page(browser, address)
        browser.execute_script(PREPARE)
        state = browser.execute_script(STATE)
        assert state == [True, True, True, 150, "simclr"]
        add_records(run, 11, loss=0.125)
        wait_for(browser, "loss\n0.1250")
        assert browser.execute_script(STATE) == state
        browser_checks.check_console(browser)


@needs_browser
def test_the_live_page_says_that_its_server_is_gone(browser, tmp_path):
    run = make_small_run(tmp_path / "run")
    with train(run), serve(live.build_server(run)) as address:
        open_page(browser, address)
    wait_for(browser, "The program that serves this page does not answer")
    browser.get_log("browser")  # the refused requests


@needs_browser
@pytest.mark.full
def test_the_live_page_is_sound_in_all_windows(browser, tmp_path):
    run = make_run(tmp_path / "run")
    write_metrics(run, num_steps=40)
    with train(run), serve(live.build_server(run)) as address:
        open_page(browser, address)
        browser_checks.check_in_all_windows(browser)


def test_the_live_page_is_served_to_this_machine_only(tmp_path):
    server = live.build_server(make_small_run(tmp_path / "run"))
    assert server.server_address[0] == "127.0.0.1"
    with serve(server) as address, pytest.raises(urllib.error.HTTPError, match="403"):
        get(address, Host="attacker.example")


def test_an_unchanged_live_page_is_not_sent_twice_and_no_other_file_is_sent(tmp_path):
    with serve(live.build_server(make_run(tmp_path / "run"))) as address:
        answer = get(address + "main")
        assert "No record yet." in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="304"):
            get(address + "main", **{"If-None-Match": answer.headers["ETag"]})
        for path in ("../config.yaml", "config.yaml", "%2e%2e/config.yaml", "report.html"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(address + path)


def test_a_port_that_is_taken_is_named_with_the_remedy(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError) as error:
            live.serve(tmp_path / "run", port)
    assert str(error.value) == (
        f"--port {port}: this port is taken by another program; give another one, or leave --port"
        " out to take any free port"
    )


def test_a_file_is_no_run_to_follow(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: is a file; give the folder of a run"):
        live.serve(tmp_path / "file")
