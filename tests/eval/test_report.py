"""The report of a run, its headline, and the summary of the demo."""

import json
import os
import re

import numpy as np
import pytest
from parsed_page import ParsedPage
from run_with_report import make_run_with_report
from untrained_run import make_run, write_images

from ssl_pretrain.eval import demo_summary, report, results, runs
from ssl_pretrain.eval.html import (
    headline,
    live,
    nearest_images,
    page,
    run_files,
    sections,
)
from ssl_pretrain.eval.run_state import RunState
from ssl_pretrain.system import program

SECTIONS = ["Evaluation", "Training", "Views", "Nearest neighbors", "Map", "Config"]
ALL_SECTIONS = ["Alerts", *SECTIONS[:3], "Neighbors over time", *SECTIONS[3:]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_run_with_report(tmp_path_factory.mktemp("runs") / "digits")


def test_the_page_holds_every_section_and_fetches_nothing(digits):
    text = (digits / "report.html").read_text()
    parsed_page = ParsedPage(text)
    assert parsed_page.headings == ALL_SECTIONS
    assert parsed_page.external_urls == []
    num_views, num_nearest, num_over_time = 8 * 2, 10 + 2 * 10 * 6, 2
    assert parsed_page.num_images == num_views + num_nearest + num_over_time
    addresses = re.findall(r"https?://[^\"' ]*", text)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}  # a name, in the script
    assert not re.search(r"url\((?!data:)|@import|fetch\(", text)
    assert not parsed_page.tags & {"link", "iframe"}
    assert text.count('<svg class="chart"') == 3 + 2 + 1
    assert text.count('<div class="map dots"') == 2
    for phrase in (
        "prefers-color-scheme: dark",
        "30.0 ± 2.5",
        "ten draws",
        "moved 2 right",
        "temperature: 0.2",
        "moved &lt;together&gt;",
        "10x10 pixels at (0, 0), flipped",
    ):
        assert phrase in text, phrase


def test_the_ten_queries_cover_ten_classes_and_are_shifted_by_one_or_two_pixels(digits):
    run = runs.load_run(digits, device="cpu")
    bank, test, kind = nearest_images.open_bank_and_query_candidates(run)
    queries = nearest_images.find_neighbors(run, bank, test)
    assert (len(bank), len(test), kind) == (1297, 500, "test images")
    assert sorted(query.label for query in queries) == list(range(10))
    assert [query.shift for query in queries[:4]] == ["1 right", "2 right", "1 left", "2 left"]
    for query in queries:
        if "right" in query.shift:
            assert query.image[:, :, : 2 * int(query.shift[0])].max() == 0


def test_a_training_image_that_is_not_shifted_is_its_own_nearest_neighbor(digits, monkeypatch):
    monkeypatch.setattr(nearest_images.features, "default_shift_distances", lambda split: [])
    run = runs.load_run(digits, device="cpu")
    bank, _, _ = nearest_images.open_bank_and_query_candidates(run)
    for query in nearest_images.find_neighbors(run, bank, bank):
        assert np.array_equal(query.feature_neighbors[0][0], query.image)
        assert np.array_equal(query.pixel_neighbors[0][0], query.image)
        assert query.feature_neighbors[0][1] == query.label


def test_class_names_and_config_are_escaped(tmp_path):
    classes = ["<script>alert(1)", 'a"><b>&', os.fsdecode(b"caf\xe9")]
    folders = [f"{split}/{name}" for split in ("train", "val") for name in classes]
    names = [f"{folder}/{number}.png" for folder in folders for number in range(6)]
    root = write_images(tmp_path / "data", names)
    data_overrides = ("data.source=folder", f"data.root={root}")
    run = make_run(tmp_path / "run", *data_overrides, "log.project='<img src=x>'")
    parsed_page = ParsedPage(report.write(runs.load_run(run, device="cpu")).read_text())
    assert parsed_page.headings == SECTIONS
    assert parsed_page.external_urls == []
    assert "alert(1)" not in parsed_page.scripts and "img" in parsed_page.tags
    assert "There are no evaluations yet" in (run / "report.html").read_text()


def test_the_text_of_a_result_is_escaped():
    html = "<script>x</script>"
    row = {"features": html, "metrics": {html: 1.0}, "spread": {}, "notes": {html: html}}
    evaluations = sections.evaluation_variables(
        [{"name": html, "protocol": {html: html}, "rows": [row]}]
    )
    empty = {"evaluations_over_steps": [], "views": [], "pixelated": False, "training": []}
    header = live.header_variables(RunState("failed", html), html) | {"home": "", "report": ""}
    context = (
        empty
        | header
        | {"has_files": True, "title": html, "facts": [], "alerts": [], "neighbors_over_time": []}
    )
    parsed_page = ParsedPage(page.render("run.html.jinja", **context, evaluations=evaluations))
    assert "script" not in parsed_page.tags
    assert {"table", "dl", "h3"} <= parsed_page.tags


def test_images_without_labels_or_a_test_split_are_shown(tmp_path):
    root = write_images(tmp_path / "photos", [f"{number}.png" for number in range(40)], size=40)
    run = make_run(tmp_path / "run", "data.source=folder", f"data.root={root}")
    text = report.write(runs.load_run(run, device="cpu")).read_text()
    assert "4 held-out training images among 36 training images" in text
    assert "right" not in re.findall(r'<span class="(\w*)">', text)
    assert "moved" not in text  # only small images are shifted, and these are 40 pixels wide


def test_the_latest_record_of_a_step_counts_and_a_truncated_one_does_not(tmp_path):
    losses = [(1, 3), (2, None), (1, 4)]
    lines = [json.dumps({"step": step, "epoch": 0.5, "loss": loss}) for step, loss in losses]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"ste']))
    records = run_files.read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2]
    assert run_files.metric_points(records, "loss") == [(0.5, 4)]
    assert run_files.read_metrics(tmp_path / "none") == []


def test_results_of_all_steps_are_grouped_by_evaluation(digits):
    by_name = results.load_by_step(digits)
    assert {name: list(steps) for name, steps in by_name.items()} == {"knn": [3, 7], "linear": [7]}


def test_a_sparkline_scales_values_to_eight_heights_and_at_most_48_characters():
    assert demo_summary.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert demo_summary.sparkline([2.0, 2.0]) == "▁▁"
    assert len(demo_summary.sparkline([*range(1000)])) == 48


def test_the_demo_prints_numbers_curves_and_the_next_commands(digits):
    text = demo_summary.render_summary(digits, {"training": 80.4, "k-NN": 12})
    assert "digits: 1297 training, 500 test images, 10 classes" in text
    assert "k-NN: k = 20, temperature 0.07" in text
    assert re.search(r"accuracy, % +raw pixels +random backbone +pretrained\n", text)
    assert re.search(r"k-NN, shifted 2 +50.0 +51.0 +52.0\n", text)
    assert re.search(r"linear, 1 per class +30.0 ± 2.5 +30.0 ± 2.5", text)
    assert re.search(r"loss  █▄.*▁  10 to 0.25\n", text)
    assert "5 to 40 %, of held-out training images" in text
    assert f"seconds: training 80, k-NN 12\nreport: {digits / 'report.html'}\n" in text
    assert text.count("\n  ") == 3
    script = program.name()
    assert f"\n  my images   {script} inspect /path/to/my/images\n" in text
    assert f"\n  CIFAR-10    {script} pretrain simclr_cifar10_cpu\n" in text
    assert f"\n  all GPUs    {script} pretrain simclr_imagenet data.root=/data/imagenet" in text


def test_the_demo_needs_both_evaluations(tmp_path):
    message = r"has no knn evaluation; run python -m ssl_pretrain.eval.knn"
    with pytest.raises(ValueError, match=message):
        demo_summary.render_summary(tmp_path)


def test_the_headline_says_how_far_the_features_are_from_each_baseline(digits):
    (knn,) = [result for result in results.load_newest(digits) if result["name"] == "knn"]
    assert headline.describe_result(knn) == (
        "k-NN reaches 52.0 % on 500 test images, 2.0 points above raw pixels (50.0 %) and "
        "1.0 points above the random network (51.0 %)."
    )
    rows = [
        {"features": "raw pixels", "metrics": {"clean": 96.8}, "spread": {}},
        {"features": "pretrained", "metrics": {"clean": 96.4}, "spread": {}},
    ]
    assert headline.describe_result(knn | {"rows": rows}) == (
        "k-NN reaches 96.4 % on 500 test images, 0.4 points below raw pixels (96.8 %)."
    )
    assert headline.describe_results([]) == ""


def test_the_headline_says_if_the_run_is_not_finished_or_failed():
    failed = RunState("failed", "RuntimeError: out of memory", step=60, num_steps=200)
    assert headline.describe_state(failed, checkpoint_step=50) == (
        "The run failed after 60 of 200 steps: RuntimeError: out of memory. "
        "The weights are those of step 50."
    )
    stopped = RunState("stopped", "the same command resumes the run", step=60, num_steps=200)
    assert headline.describe_state(stopped, checkpoint_step=60) == (
        "The run is not finished: it stopped after 60 of 200 steps. "
        "The weights are those of step 60."
    )
    assert headline.describe_state(RunState("finished"), checkpoint_step=200) == ""
