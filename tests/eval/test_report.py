"""The report, the comparison of runs and the summary of the demo."""

import itertools
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from run_with_report import make_run_with_report, write_metrics
from untrained_run import make_run, write_images

from ssl_pretrain.eval import compare, demo_summary, report, results, runs
from ssl_pretrain.eval.html import (
    axes,
    charts,
    colors,
    headline,
    image_maps,
    live,
    nearest_images,
    page,
    run_files,
    run_groups,
    sections,
    training_figures,
)
from ssl_pretrain.eval.run_state import RunState
from ssl_pretrain.system import program

SECTIONS = ["Evaluation", "Training", "Views", "Nearest neighbors", "Map", "Config"]
ALL_SECTIONS = ["Alerts", *SECTIONS[:3], "Neighbors over time", *SECTIONS[3:]]
VOID_TAGS = {"meta", "img", "br"}


class ParsedPage(HTMLParser):
    """Tags, headings, embedded images and external URLs of a page, whose tags must balance."""

    def __init__(self, text):
        super().__init__()
        self.open_tags, self.headings, self.external_urls = [], [], []
        self.num_images, self.tags, self.scripts = 0, set(), ""
        self.feed(text)
        assert not self.open_tags, f"tags without an end: {self.open_tags}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.num_images += value.startswith("data:image/")
                is_own = value.startswith(("data:", "#"))
                self.external_urls += [] if is_own else [value]
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID_TAGS:
            assert self.open_tags.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, text):
        if self.open_tags and self.open_tags[-1] == "h2":
            self.headings.append(text)
        if self.open_tags and self.open_tags[-1] == "script":
            self.scripts += text


def read_curve_points(chart, number=0):
    """Read the points of one curve from a chart's SVG. Heights grow upward."""
    (path,) = re.findall(rf'<g id="curve-{number}"><path [^>]* d="([^"]*)"', chart)
    return [(float(x), -float(y)) for x, y in re.findall(r"[ML](\S+) ([\d.]+)", path)]


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


def test_a_curve_shows_the_finite_points_to_scale():
    nan = float("nan")
    points = [(0, 0.0), (5, 50.0), (10, 100.0), (11, nan)]
    (x0, y0), (x1, y1), (x2, y2) = read_curve_points(charts.line_chart({"": points}, "y"))
    assert x0 < x2 and y0 < y2
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2))
    assert charts.line_chart({"": [(1, nan)]}, "y") == ""
    assert "<circle" in charts.line_chart({"": [(1, 2.0)]}, "y")  # a single point has a marker


def test_long_curves_are_averaged_to_the_largest_number_of_points():
    chart = charts.line_chart({"": [(x, 2 * x) for x in range(3 * charts.MAX_POINTS)]}, "y")
    assert len(read_curve_points(chart)) == charts.MAX_POINTS


def test_logarithmic_curves_are_straight_for_a_power_law():
    power_law = [(10.0**i, 10.0 ** (-2 * i)) for i in range(4)]
    series = {"a": power_law, "b": [(1.0, 0.0), (1000.0, 1.0)]}
    chart = charts.line_chart(series, "y", has_log_axes=True)
    points = read_curve_points(chart)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert slopes == pytest.approx([slopes[0]] * 3, rel=0.01) and slopes[0] < 0
    assert len(read_curve_points(chart, 1)) == 1  # zero has no logarithm


def test_results_of_all_steps_are_grouped_by_evaluation(digits):
    by_name = results.load_by_step(digits)
    assert {name: list(steps) for name, steps in by_name.items()} == {"knn": [3, 7], "linear": [7]}


def test_a_comparison_shows_results_first_and_differing_keys_last(digits, tmp_path):
    other_run = make_run(tmp_path / "other", "optim.base_lr=0.125", "seed=0")
    write_metrics(other_run, num_steps=20)
    text = compare.write([digits, other_run], tmp_path / "both.html").read_text()
    parsed_page = ParsedPage(text)
    assert parsed_page.headings == ["Results", "Training", "Alerts of digits", "Config"]
    assert parsed_page.external_urls == []
    runs_to_compare = [run_groups.read_run(run.name, run) for run in (digits, other_run)]
    assert list(compare.config_differences(runs_to_compare)) == ["optim.base_lr"]
    assert "0.125" in text
    last_losses = compare.last_values(runs_to_compare)[2]
    assert last_losses == ["Learning: loss", "0.25", "0.5"]
    assert text.count('<g id="curve-') == 2 * text.count('<svg class="chart"')
    assert "k-NN, clean: digits reaches 52.0 %, 2.0 points above raw pixels (50.0 %)" in text


def save_knn(run, seed, pretrained, random):
    """Write the configuration of a run and its k-NN accuracies, without a checkpoint."""
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"method: {{name: {run.name.partition('_')[0]}}}\nseed: {seed}\noutput: {run}\n"
        "data: {source: digits}\nbackbone: {name: test_resnet}\n"
    )
    numbers = {"raw pixels": 96.8, results.BETTER_RANDOM: random, "pretrained": pretrained}
    rows = [
        {"features": name, "metrics": {"clean": value}, "spread": {}, "notes": {}}
        for name, value in numbers.items()
    ]
    result = {"name": "knn", "step": 5, "measure": results.ACCURACY, "rows": rows, "protocol": {}}
    (run / "eval" / "knn.json").write_text(json.dumps(result))


def test_runs_that_differ_by_seed_share_a_row_and_the_best_number_is_bold(tmp_path):
    numbers = {"simclr": (95.0, 97.0, 99.0), "vicreg": (96.81, 96.84, 96.79)}
    paths = []
    for method, accuracies in numbers.items():
        for seed, accuracy in enumerate(accuracies):
            paths.append(tmp_path / f"{method}_{seed}")
            save_knn(paths[-1], seed, accuracy, random=80.0 + seed)
    runs_to_compare = [run_groups.read_run(path.name, path) for path in paths]
    groups = run_groups.group_by_seed(runs_to_compare)
    assert [(group.name, len(group.runs)) for group in groups] == [("simclr", 3), ("vicreg", 3)]
    table = run_groups.results_table(groups, [("knn", "clean")])
    assert table.markdown().splitlines()[2:] == [
        "| simclr | 3 | **97.0 ± 2.0** |",
        "| vicreg | 3 | 96.8 ± 0.0 |",
        "| raw pixels | 1 | 96.8 |",
        "| random network | 3 | 81.0 ± 1.0 |",  # one per seed, not one per run
    ]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["a"], "a comparison needs two or more runs"),
        (["a", "b"], "there is no config.yaml, so this is not a run folder"),
    ],
)
def test_a_comparison_needs_the_folders_of_two_runs(tmp_path, folders, message):
    with pytest.raises(ValueError, match=message):
        compare.write([tmp_path / name for name in folders])


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


def test_the_perplexity_is_below_the_number_of_images():
    assert nearest_images.tsne_perplexity(500) == 30
    assert nearest_images.tsne_perplexity(10) == 3


def test_the_headline_says_how_far_the_features_are_from_each_baseline(digits):
    (knn,) = [result for result in results.load_newest(digits) if result["name"] == "knn"]
    assert headline.describe_result(knn) == (
        "k-NN reaches 52.0 % of 500 test images, 2.0 points above raw pixels (50.0 %) and "
        "1.0 points above the random network (51.0 %)."
    )
    rows = [
        {"features": "raw pixels", "metrics": {"clean": 96.8}, "spread": {}},
        {"features": "pretrained", "metrics": {"clean": 96.4}, "spread": {}},
    ]
    assert headline.describe_result(knn | {"rows": rows}) == (
        "k-NN reaches 96.4 % of 500 test images, 0.4 points below raw pixels (96.8 %)."
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


def test_a_small_change_does_not_look_like_a_crash():
    axis = axes.fit(np.array([0.9975, 0.9985]), (178, 12))
    assert axis.high - axis.low >= axes.MIN_RELATIVE_SPAN * 0.99
    assert [text for _, text in axis.labels()] == ["0.98", "1.00", "1.02"]
    assert axes.format_ticks([0.0, 1e-4, 2e-4], axis) == ["0", "1e-4", "2e-4"]


def test_curves_without_information_are_named_instead_of_drawn():
    records = [
        {"step": i, "epoch": i, "loss": 10 / i, "nt_xent": 5 / i, "weight_decay": 1e-6}
        for i in range(1, 6)
    ]
    (group,) = training_figures.draw_run_groups({"": records}, "run")
    assert [figure.caption for figure in group.figures] == ["Loss"]
    assert group.notes == ["Constant: weight decay 1e-6.", "NT-Xent is 0.5 times loss."]


def test_healthy_ranges_and_limits_of_alerts_are_drawn():
    records = [{"step": i, "epoch": i, "embedding_std": 0.9 - i / 100} for i in range(1, 6)]
    (group,) = training_figures.draw_run_groups({"": records}, "run")
    (figure,) = group.figures
    assert 'class="healthy"' in figure.image and 'class="limit"' in figure.image
    assert figure.note.endswith("Healthy: 0.2 to 1, alert below 0.2")


def test_every_thumbnail_of_a_map_has_a_cell_of_its_own_near_its_place():
    positions = np.random.default_rng(0).normal(size=(60, 2))
    cells = image_maps.assign_cells(positions, num_columns=12, num_rows=8)
    assert len({tuple(cell) for cell in cells}) == 60
    correlations = [np.corrcoef(positions[:, axis], cells[:, axis])[0, 1] for axis in (0, 1)]
    assert min(correlations) > 0.9


def test_colors_are_legible_on_both_pages():
    for number in (10, 200):
        for index in range(number):
            shown = colors.color(index, number)
            assert colors.contrast(shown, "#fdfdfc") >= 3, shown
            assert colors.contrast(shown, "#16181a") >= 3, shown
