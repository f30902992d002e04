"""Plots of a study: baselines, error bars over seeds, ranges that do not exaggerate, curves."""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from study_runs import save_results

from ssl_pretrain.launch import (
    study_curves,
    study_plan,
    study_plot,
    study_spectrum,
    study_table,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(monkeypatch):
    """Figures that were saved, without writing a file."""
    saved = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: saved.update({Path(path).name: figure})
    )
    return saved


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Function that returns the comparison of a study's first variants with made-up results."""
    monkeypatch.chdir(ROOT)

    def comparison(name, accuracies, missing=0, columns=("linear, %", "effective rank")):
        definition = study_plan.load(f"configs/sweeps/{name}.yaml")
        seeds = ",".join(map(str, range(len(accuracies[0]))))
        arguments = [f"seed={seeds}", f"output={tmp_path}"]
        definition.runs = definition.runs[: len(accuracies)]
        definition.seed_by_seed = False
        runs = study_plan.plan_runs(definition, Path(name), None, arguments)
        numbers = [number for row in accuracies for number in row]
        finished = runs[: len(runs) - missing]
        for run, number in zip(finished, numbers):
            save_results(Path(run.config.output), number, spectrum_number=number)
        return study_table.Comparison(
            definition.title,
            list(columns),
            [(run.variant, run.config) for run in finished],
            definition.plot_against,
            missing=[(run.variant, run.config) for run in runs[len(finished) :]],
        )

    return comparison


def text_of(figure):
    """Return the note below the panels."""
    legends = [legend.get_title().get_text() for legend in figure.legends]
    return "".join(legends) or figure.get_supxlabel()


def lines_with_label(panel):
    return {line.get_label(): line for line in panel.lines if line.get_label()[0] != "_"}


@pytest.mark.parametrize("name", ["ablation", "temperature"])
def test_both_baselines_are_labeled_lines_where_the_measure_has_them(
    name, compare, figures, tmp_path
):
    study_plot.draw(compare(name, [[91, 92], [93, 95]]), tmp_path / "plot.png")
    assert set(figures) == {"plot.png", "plot.svg"}
    figure = figures["plot.png"]
    accuracy, rank = figure.axes
    baselines = lines_with_label(accuracy)
    read = "get_ydata" if name == "temperature" else "get_xdata"
    assert {label: getattr(line, read)()[0] for label, line in baselines.items()} == {
        "random backbone": 80,
        "raw pixels": 90,
    }
    assert not lines_with_label(rank)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["random backbone", "raw pixels"]


def test_error_bars_are_the_deviation_over_seeds(compare, figures, tmp_path):
    study_plot.draw(compare("ablation", [[91, 92, 93], [80, 90, 100]]), tmp_path / "plot.png")
    figure = figures["plot.png"]
    bars = [container.lines[2][0].get_segments()[0] for container in figure.axes[0].containers]
    assert [[x for x, _ in segment] for segment in bars] == [[91, 93], [80, 100]]
    assert text_of(figure) == "Error bars: standard deviation over 3 seeds."


def test_with_one_seed_there_is_no_error_bar_and_the_plot_says_so(compare, figures, tmp_path):
    study_plot.draw(compare("ablation", [[91], [92]]), tmp_path / "plot.png")
    figure = figures["plot.png"]
    assert not any(container.has_xerr for container in figure.axes[0].containers)
    assert text_of(figure) == "One seed per row, so there is no deviation."


def test_a_variant_with_one_seed_among_others_has_no_bar(compare, figures, tmp_path):
    comparison = compare("ablation", [[91, 92], [92, 93], [94, 95]], missing=3)
    study_plot.draw(comparison, tmp_path / "plot.png")
    figure = figures["plot.png"]
    assert [bool(container.has_xerr) for container in figure.axes[0].containers] == [True, False]
    assert (
        text_of(figure) == "Error bars: standard deviation over 1 or 2 seeds (none with one seed)."
    )
    assert [text.get_text() for text in figure.axes[0].texts] == ["not run"]


def test_the_values_of_the_plotted_key_are_sorted_whatever_the_order_of_the_runs(
    compare, figures, tmp_path
):
    comparison = compare("temperature_spectrum", [[91, 92], [93, 95], [92, 92]])
    assert comparison.variants == ["0.03", "0.1", "0.2"]
    study_plot.draw(comparison, tmp_path / "plot.png")
    (line,) = [c.lines[0] for c in figures["plot.png"].axes[0].containers]
    assert line.get_xydata().tolist() == [[0.03, 91.5], [0.1, 92], [0.2, 94]]


@pytest.mark.parametrize(
    ("column", "numbers", "expected"),
    [
        ("linear, %", [44.0, 45.0], (39.5, 49.5)),  # noise of a point does not fill the panel
        ("linear, %", [38.0, 58.0], (36.0, 60.0)),
        ("linear, %", [95.0, 99.0], (92.0, 102.0)),
        ("top-5, %", [40.0, 99.0], (0.0, 102.0)),
        ("top-5, %", [0.0, 3.0], (0.0, 10.0)),
        ("effective rank", [10.0, 20.0], (0.0, 22.0)),
        ("gain", [-10.0, 20.0], (-11.0, 22.0)),
        ("rank", [], (0.0, 1.0)),
    ],
)
def test_axes_do_not_exaggerate(column, numbers, expected):
    assert study_plot.axis_range(column, numbers) == pytest.approx(expected)


def test_a_percentage_without_baselines_starts_at_zero():
    limits = study_plot.axis_range("top-5, %", [50.0, 60.0], has_references=False)
    assert limits == pytest.approx((0, 66))


def test_an_axis_that_does_not_start_at_zero_says_so_and_shows_the_baselines(
    compare, figures, tmp_path
):
    study_plot.draw(compare("ablation", [[91, 92], [93, 95]]), tmp_path / "plot.png")
    accuracy, rank = figures["plot.png"].axes
    assert accuracy.get_xlabel() == "linear, % (axis from 78 to 97)"
    low, high = accuracy.get_xlim()
    assert low < 80 and high > 95
    assert rank.get_xlabel() == "effective rank"
    assert rank.get_xlim()[0] == 0


def test_curves_are_means_over_seeds_with_a_band_and_the_accuracy_on_test_images(
    compare, figures, tmp_path
):
    comparison = compare("ablation", [[80, 90], [70, 70], [60, 60]])
    study_curves.draw(comparison, ["knn", "rankme"], tmp_path / "curves.png")
    figure = figures["curves.png"]
    assert [panel.get_title() for panel in figure.axes] == [
        "SimCLR",
        "SimCLR",
        "SimSiam",
        "SimSiam",
    ]
    accuracy, rank = figure.axes[:2]
    assert accuracy.lines[0].get_xydata().tolist() == [[1, 10], [2, 20], [3, pytest.approx(30)]]
    test_accuracy = accuracy.containers[0].lines[0]
    assert test_accuracy.get_xydata().tolist() == [[3, 85]]
    assert [line.get_label() for line in rank.lines] == ["SimCLR", "SimCLR, no projector"]
    assert rank.lines[0].get_ydata().tolist() == [85, 85, 85]
    band = rank.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((85 - 50**0.5, 85 + 50**0.5))
    assert rank.get_ylim()[0] == 0
    assert accuracy.get_ylabel() == "k-NN accuracy, %"


def test_curves_need_no_evaluation_of_knn(compare, figures, tmp_path):
    comparison = compare("ablation", [[80, 90], [70, 70]])
    for run in comparison.results:
        del run.tables["knn"]
    study_curves.draw(comparison, ["knn"], tmp_path / "curves.png")
    (panel,) = figures["curves.png"].axes
    assert not panel.containers
    assert [line.get_label() for line in panel.lines] == ["SimCLR", "SimCLR, no projector"]


def test_a_metric_that_no_run_recorded_leaves_a_note(compare, figures, tmp_path):
    comparison = compare("ablation", [[80], [70]])
    study_curves.draw(comparison, ["gaussianity"], tmp_path / "curves.png")
    (panel,) = figures["curves.png"].axes
    assert [text.get_text() for text in panel.texts] == ["not recorded"]


def test_the_spectrum_is_the_geometric_mean_on_a_logarithmic_axis(compare, figures, tmp_path):
    comparison = compare("ablation", [[30, 129], [33, 33], [40, 40]])
    assert study_spectrum.draw(comparison, tmp_path / "spectrum.png")
    embeddings, features = figures["spectrum.png"].axes[:2]
    assert embeddings.get_title() == "SimCLR, embeddings"
    assert embeddings.get_yscale() == "log"
    third = embeddings.lines[0].get_ydata()[2]
    assert third == pytest.approx(0.001)  # of 0.0001 and 0.01
    assert embeddings.lines[0].get_ydata()[3] == pytest.approx(study_spectrum.FLOOR)
    assert "random backbone" in lines_with_label(features)
    assert "random backbone" not in lines_with_label(embeddings)


def test_runs_without_eigenvalues_have_no_plot_of_them(compare, figures, tmp_path):
    comparison = compare("ablation", [[80], [70]])
    for path in tmp_path.rglob("*eigenvalues.csv"):
        path.unlink()
    assert not study_spectrum.draw(comparison, tmp_path / "spectrum.png")
    assert not figures


def test_the_part_of_a_page_that_is_written_by_hand_is_kept(compare, tmp_path):
    comparison = compare("ablation", [[80], [70]])
    page = tmp_path / "page.md"
    page.write_text("# Old\n\n<!-- kept -->\n\nSeen: nothing.\n\n<!-- end of kept -->\n\nold\n")
    study_table.write(comparison, "command", page, [])
    study_table.write(replace(comparison, title="New"), "command", page, [])
    text = page.read_text()
    assert text.startswith(
        "# New\n\n<!-- kept -->\n\nSeen: nothing.\n\n<!-- end of kept -->\n\nCommand: `command`\n"
    )
    assert "old" not in text


def test_the_best_accuracy_is_bold_and_a_partly_finished_variant_names_its_seeds(compare, tmp_path):
    comparison = compare("ablation", [[80, 81], [90, 91], [70, 71]], missing=1)
    page = tmp_path / "page.md"
    study_table.write(comparison, "command", page, [])
    lines = page.read_text().splitlines()
    assert "| SimCLR, no projector | 2 | **90.5 ± 0.7** | 90.5 ± 0.7 |" in lines
    assert "| SimSiam | 1 | 70.0 | 70.0 |" in lines
    assert "Not run: SimSiam (seed 1)." in lines
