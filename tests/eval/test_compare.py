"""The comparison of runs: results, groups of seeds, and the keys that differ."""

import json

import pytest
from parsed_page import ParsedPage
from run_with_report import make_run_with_report, write_metrics
from untrained_run import make_run

from ssl_pretrain.eval import compare, results
from ssl_pretrain.eval.html import run_groups


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_run_with_report(tmp_path_factory.mktemp("runs") / "digits")


def test_a_comparison_shows_results_first_and_differing_keys_last(digits, tmp_path):
    other_run = make_run(tmp_path / "other", "optim.base_lr=0.125", "seed=0")
    write_metrics(other_run, num_steps=20)
    text = compare.write([digits, other_run], tmp_path / "both.html").read_text()
    parsed_page = ParsedPage(text)
    assert parsed_page.headings == ["Results", "Alerts of digits", "Training", "Config"]
    assert parsed_page.external_urls == []
    runs_to_compare = [run_groups.read_run(run.name, run) for run in (digits, other_run)]
    assert list(compare.config_differences(runs_to_compare)) == ["optim.base_lr"]
    assert "0.125" in text
    last_losses = compare.last_values(runs_to_compare)[2]
    assert last_losses == ["Learning: loss", "0.25", "0.5"]
    assert text.count('<g id="curve-') == 2 * text.count('<svg class="chart"')
    headline = "k-NN, clean: digits reaches 52.0 %, 2.0 points above raw pixels (50.0 %)"
    assert headline.replace(" %", "\N{NO-BREAK SPACE}%") in text


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
    assert compare.describe_best(groups, [("knn", "clean")]) == (
        "k-NN, clean: simclr reaches 97.0 ± 2.0 % over 3 seeds, 0.2 points above raw pixels "
        "(96.8 %) and 16.0 points above the random network (81.0 %). Then vicreg 96.8 ± 0.0 % "
        "over 3 seeds."
    )


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
