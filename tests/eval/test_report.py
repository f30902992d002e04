"""The report fetches nothing, whatever the run holds. The demo prints the same numbers."""

from __future__ import annotations

import itertools
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from made_run import make_run, write_images
from torchvision.utils import save_image

from ssl_pretrain.eval import compare, demo_summary, report, results, runs
from ssl_pretrain.eval.html import charts, nearest_images, page, sections
from ssl_pretrain.eval.results import Row

SECTIONS = ["Evaluation", "Training", "Views", "Nearest neighbors", "Projection", "Config"]
FULL = ["Alerts", *SECTIONS[:3], "Neighbors over time", *SECTIONS[3:]]
VOID = {"meta", "img", "br"}
ABOUT = {"checkpoint": "step_00000007", "step": 7, "network": "student"}
PROTOCOL = {
    "network": "n",
    "images": "digits: 1297 training, 500 test images, 10 classes",
    "k": 20,
    "temperature": 0.07,
}


class Page(HTMLParser):
    """A page with balanced tags: its headings, its tags, its pictures and what a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.fetched, self.num_pictures, self.tags = [], [], [], 0, set()
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.num_pictures += value.startswith("data:image/")
                self.fetched += [] if value.startswith("data:image/") else [value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, text):
        if self.open and self.open[-1] == "h2":
            self.headings.append(text)


def curve_points(chart, number=0):
    """Read the points of one curve from a chart's SVG. Heights grow upward."""
    (path,) = re.findall(rf'<g id="curve-{number}">\s*<path d="([^"]*)"', chart)
    return [(float(x), -float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def write_metrics(run, num=40):
    lines = []
    for step in range(1, num + 1):
        record = {
            "step": step,
            "epoch": step / 5,
            "loss": 10 / step,
            "lr": 0.1,
            "images_per_second": 100 + step,
            "time": 1000.0 + step,
        }
        lines.append(json.dumps(record | ({"knn": step / 100} if step % 5 == 0 else {})))
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 41, "loss": NaN, "epo']) + "\n")


def write_monitors(run):
    """What the monitors leave: an alarm, two sets of curves, two pictures of neighbours, an earlier evaluation."""
    (run / "alerts.jsonl").write_text(
        json.dumps({"title": "collapse", "text": "moved <together>", "time": 1.0}) + "\n"
    )
    plots = [
        {
            "step": step,
            "epoch": step / 5,
            "spectrum_index": [1, 2, 4],
            "spectrum": [1.0, 0.1, 0.01],
            "deviations": [0.5, 1.0],
        }
        for step in (5, 40)
    ]
    (run / "plots.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in plots))
    (run / "neighbors").mkdir()
    for step in (5, 40):
        save_image(torch.rand(3, 30, 40), run / "neighbors" / f"step_{step:08d}.png")
    earlier = json.loads((run / "eval" / "knn.json").read_text()) | {"step": 3}
    (run / "eval" / "step_00000003").mkdir()
    (run / "eval" / "step_00000003" / "knn.json").write_text(json.dumps(earlier))
    (run / "views.json").write_text(json.dumps([["10x10 pixels at (0, 0), flipped", "grey"]] * 8))


def save_results(run, columns=("clean", "shifted 1", "shifted 2")):
    rows = [
        Row(name, dict.fromkeys(columns, 50.0 + i))
        for i, name in enumerate(["raw pixels", "random, as built", "pretrained"])
    ]
    results.save(
        run, "knn", PROTOCOL | {"shifts": "by four"}, results.with_better_random(rows), ABOUT, 1.0
    )
    rows = [Row(row.features, {"1 per class": 30.0}, {"1 per class": 2.5}) for row in rows]
    results.save(
        run,
        "linear",
        PROTOCOL | {"few labels": "ten draws"},
        results.with_better_random(rows),
        ABOUT,
        1.0,
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "digits")
    write_metrics(run)
    save_results(run)
    write_monitors(run)
    save_image(torch.rand(3, 2 + 8 * 18, 2 + 2 * 18), run / "views.png")
    report.write(runs.load_run(run, device="cpu"))
    return run


def test_the_page_holds_every_section_and_fetches_nothing(digits):
    text = (digits / "report.html").read_text()
    shown = Page(text)
    assert shown.headings == FULL and shown.fetched == []
    views, nearest, over_time = 8 * 2, 10 + 2 * 10 * 6, 2
    assert shown.num_pictures == views + nearest + over_time
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert not shown.tags & {"script", "link", "iframe"}
    assert text.count('class="chart"') == 4 + 2 + 1 and text.count('class="scatter"') == 2
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


def test_ten_queries_are_of_ten_classes_and_moved_by_one_or_two(digits):
    run = runs.load_run(digits, device="cpu")
    bank, test, kind = nearest_images.open_bank_and_queries(run)
    queries = nearest_images.find_neighbors(run, bank, test)
    assert (len(bank), len(test), kind) == (1297, 500, "test images")
    assert sorted(query.label for query in queries) == list(range(10))
    assert [query.shift for query in queries[:4]] == ["1 right", "2 right", "1 left", "2 left"]
    for query in queries:
        if "right" in query.shift:
            assert query.image[:, :, : 2 * int(query.shift[0])].max() == 0


def test_a_training_image_that_is_not_shifted_is_its_own_nearest_neighbor(digits, monkeypatch):
    monkeypatch.setattr(nearest_images.shifts, "default_distances", lambda split: [])
    run = runs.load_run(digits, device="cpu")
    bank, _, _ = nearest_images.open_bank_and_queries(run)
    for query in nearest_images.find_neighbors(run, bank, bank):
        assert np.array_equal(query.by_features[0][0], query.image)
        assert np.array_equal(query.by_pixels[0][0], query.image)
        assert query.by_features[0][1] == query.label


def test_class_names_and_config_are_escaped(tmp_path):
    classes = ["<script>alert(1)", 'a"><b>&', os.fsdecode(b"caf\xe9")]
    names = [
        f"{part}/{name}/{number}.png"
        for part in ("train", "val")
        for name in classes
        for number in range(6)
    ]
    root = write_images(tmp_path / "data", names)
    run = make_run(
        tmp_path / "run", "data.source=folder", f"data.root={root}", "log.project='<img src=x>'"
    )
    found = Page(report.write(runs.load_run(run, device="cpu")).read_text())
    assert found.headings == SECTIONS and found.fetched == [] and not found.tags & {"script", "b"}
    assert "Nothing measured yet" in (run / "report.html").read_text()


def test_whatever_a_result_says_is_escaped():
    bad = "<script>x</script>"
    row = {"features": bad, "metrics": {bad: 1.0}, "spread": {}, "notes": {bad: bad}}
    evaluation = sections.evaluation({"name": bad, "protocol": {bad: bad}, "rows": [row]})
    nothing = {"evaluations_over_steps": [], "views": [], "pixelated": False, "training": []}
    context = nothing | {"title": bad, "facts": [], "alerts": [], "neighbors_over_time": []}
    shown = Page(page.render("run.html.jinja", **context, evaluations=[evaluation]))
    assert "script" not in shown.tags and {"table", "dl", "h3"} <= shown.tags


def test_images_without_labels_or_a_test_part_are_shown_too(tmp_path):
    root = write_images(tmp_path / "photos", [f"{number}.png" for number in range(40)], size=40)
    run = make_run(tmp_path / "run", "data.source=folder", f"data.root={root}")
    text = report.write(runs.load_run(run, device="cpu")).read_text()
    assert (
        "4 held-out training images among 36 training images" in text
        and "right" not in re.findall(r'<span class="(\w*)">', text)
    )
    assert "moved" not in text  # of 40 pixels: large


def test_a_cut_or_repeated_record_counts_once(tmp_path):
    first, again, second = (
        json.dumps({"step": step, "epoch": 0.5, "loss": loss})
        for step, loss in ((1, 3), (1, 4), (2, None))
    )
    lines = [first, second, again, '{"ste']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    records = sections.read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2] and sections.curve(records, "loss") == [
        (0.5, 4)
    ]
    assert sections.read_metrics(tmp_path / "none") == []


def test_a_curve_shows_every_finite_point_in_its_place():
    nan = float("nan")
    points = [(0, 0.0), (5, 50.0), (10, 100.0), (11, nan)]
    (x0, y0), (x1, y1), (x2, y2) = curve_points(charts.line_chart({"": points}, "y"))
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2)) and x0 < x2 and y0 < y2
    assert charts.line_chart({"": [(1, nan)]}, "y") == ""
    assert "<use" in charts.line_chart({"": [(1, 2.0)]}, "y")  # a single point has a marker


def test_long_curves_are_averaged_over_equal_stretches():
    chart = charts.line_chart({"": [(x, 2 * x) for x in range(3 * charts.MAX_POINTS)]}, "y")
    assert len(curve_points(chart)) == charts.MAX_POINTS


def test_logarithmic_curves_are_straight_for_a_power_law():
    power_law = [(10.0**i, 10.0 ** (-2 * i)) for i in range(4)]
    series = {"a": power_law, "b": [(1.0, 0.0), (1000.0, 1.0)]}
    chart = charts.line_chart(series, "y", logarithmic=True)
    points = curve_points(chart)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert slopes == pytest.approx([slopes[0]] * 3, rel=0.01) and slopes[0] < 0
    assert len(curve_points(chart, 1)) == 1  # zero has no logarithm


def test_evaluations_of_all_steps_are_found_by_name(digits):
    found = results.by_step(digits)
    assert {name: list(steps) for name, steps in found.items()} == {"knn": [3, 7], "linear": [7]}


def test_a_comparison_shows_differences_first_and_the_numbers_of_both(digits, tmp_path):
    other = make_run(tmp_path / "other", "optim.base_lr=0.125", "seed=0")
    write_metrics(other, num=20)
    path = compare.write([digits, other], tmp_path / "both.html")
    found = Page(path.read_text())
    assert (
        found.headings == ["Config", "Numbers", "Training", "Alerts of digits"]
        and found.fetched == []
    )
    text = path.read_text()
    assert (
        list(compare.differences({"a": digits, "b": other})) == ["optim.base_lr"]
        and "0.125" in text
    )
    last = [sections.read_metrics(run)[-1]["loss"] for run in (digits, other)]
    assert "<td>Learning: loss</td>" + "".join(f"<td>{value:.6g}</td>" for value in last) in text
    assert "<td>k-NN, clean</td><td>52.0 (step 7)</td><td>-</td>" in text
    assert text.count('<g id="curve-') == 2 * text.count('class="chart"')


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["a"], "a comparison needs two or more runs"),
        (["a", "b"], "there is no config.yaml, so this is not the folder of a run"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path, folders, message):
    with pytest.raises(ValueError, match=message):
        compare.write([tmp_path / name for name in folders])


def test_sparkline():
    assert demo_summary.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert (
        demo_summary.sparkline([2.0, 2.0]) == "▁▁"
        and len(demo_summary.sparkline([*range(1000)])) == 48
    )


def test_the_demo_prints_numbers_curves_and_the_next_commands(digits):
    text = demo_summary.summary(digits, {"training": 80.4, "k-NN": 12})
    assert (
        "digits: 1297 training, 500 test images, 10 classes" in text
        and "k-NN: k = 20, temperature 0.07" in text
    )
    assert re.search(r"accuracy, % +raw pixels +random backbone +pretrained\n", text)
    assert re.search(r"k-NN, shifted 2 +50.0 +51.0 +52.0\n", text) and re.search(
        r"linear, 1 per class +30.0 ± 2.5 +30.0 ± 2.5", text
    )
    assert (
        re.search(r"loss  █▄.*▁  10 to 0.25\n", text)
        and "5 to 40 %, of held-out training images" in text
    )
    assert f"seconds: training 80, k-NN 12\nreport: {digits / 'report.html'}\n" in text
    assert (
        text.count("\n  ") == 3 and "my images" in text and "CIFAR-10" in text and "8 GPUs" in text
    )


def test_the_demo_needs_both_evaluations(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no knn evaluation; run python -m ssl_pretrain.eval.knn"
    ):
        demo_summary.summary(tmp_path)
