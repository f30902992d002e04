"""Correlations of a run's cosines with people's scores: by hand, averages, collapse, refusals."""

import numpy as np
import pytest
import sentence_run
import torch
from scipy.stats import spearmanr
from test_sts_scores import STS_B, error_of, write_subset

import ssl_pretrain
from ssl_pretrain.eval import sts, sts_scores
from ssl_pretrain.eval.frozen import sentences
from ssl_pretrain.eval.trained_run import load_sentence_run

pytest.importorskip("open_clip")

SUBSETS = {
    "answers-forums": (
        [("a red cat", "the cat is red today"), ("a big dog", "an old car")],
        [5, 1],
    ),
    "answers-students": ([("a new car", "a new boat"), ("a red cat", "a lamp")], [3, 0]),
    "belief": ([("a cold lamp", "a warm lamp"), ("a road", "a black road")], [2, 4.5]),
    "headlines": ([("white house", "black house"), ("big tree", "the tree is big")], [1.5, 4]),
    "images": ([("small dog", "small cat"), ("a boat", "the boat"), ("a", "b c")], [2, 5, 0.5]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose method compares dot products, unlike the evaluation."""
    return sentence_run.train_run(tmp_path_factory.mktemp("sts"), "method.similarity=dot")


@pytest.fixture
def folder(tmp_path):
    """A folder of SentEval with STS15 and STS-B."""
    for name, (pairs, scores) in SUBSETS.items():
        write_subset(tmp_path / "STS/STS15-en-test", name, pairs, scores)
    path = tmp_path / "STS/STSBenchmark/sts-test.csv"
    path.parent.mkdir()
    path.write_text(STS_B + STS_B.replace("A girl sings", "A cat").replace("2.5", "0.5"))
    return tmp_path


def correlate(run, pairs, scores, is_pretrained=True):
    encoder = sentences.build_encoder(run, is_pretrained)
    cosines = [
        torch.cosine_similarity(encoder.embed([first]), encoder.embed([second])).item()
        for first, second in pairs
    ]
    return 100 * spearmanr(cosines, scores).statistic


def test_a_task_is_the_correlation_over_the_pairs_of_all_subsets(run, folder):
    result = sts.evaluate(run, folder)
    rows = {row["features"]: row["metrics"] for row in result["rows"]}
    assert list(rows) == ["shared words (tf-idf)", "random, as built", "pretrained"]
    pairs = [pair for subset, _ in SUBSETS.values() for pair in subset]
    scores = [score for _, subset in SUBSETS.values() for score in subset]
    for name in ("random, as built", "pretrained"):
        expected = correlate(run, pairs, scores, is_pretrained=name == "pretrained")
        assert rows[name]["STS15"] == pytest.approx(expected)
        assert rows[name].keys() == {"STS15", "STS-B"}
    assert result["measure"] == "Spearman x 100"
    assert result["protocol"]["tasks"] == f"{folder}: STS15 11 pairs, STS-B 2 pairs"
    assert "nan" not in result["protocol"]


def test_the_subsets_and_their_means_are_saved_beside_the_result(run, folder):
    ssl_pretrain.Run(run.path).evaluate("sts", folder=folder)
    saved = {result["name"]: result for result in sts.results.load_newest(run.path)}
    metrics = saved["sts_grid"]["rows"][-1]["metrics"]
    by_subset = [metrics[f"STS15, {name}"] for name in SUBSETS]
    assert by_subset[-1] == pytest.approx(correlate(run, *SUBSETS["images"]))
    assert metrics["STS15, mean"] == pytest.approx(np.mean(by_subset))
    assert metrics["STS15, wmean"] == pytest.approx(
        (2 * sum(by_subset[:-1]) + 3 * by_subset[-1]) / 11
    )
    assert metrics["STS15"] == saved["sts"]["rows"][-1]["metrics"]["STS15"]
    assert "STS-B, mean" not in metrics


def test_shared_words_count_rare_ones_more():
    pairs = [("the red cat", "the blue cat"), ("the road", "the lamp"), ("cat", "cat")]
    subset = sts_scores.ScoredPairs("x", *map(list, zip(*pairs)), np.array([3.0, 1, 5]))
    assert sts._score_shared_words([subset]).all == pytest.approx(100)


def test_the_average_is_shown_for_all_seven_tasks(run, folder):
    for year, names in sts_scores.SUBSETS.items():
        for name in names:
            pairs, scores = SUBSETS["images"]
            write_subset(folder / f"STS/{year}-en-test", name, pairs, scores)
    (folder / "SICK_test_annotated.txt").write_text(
        "sentence_A\tsentence_B\trelatedness_score\nA dog\tA cat\t3.3\na\tb\t1\n"
    )
    metrics = sts.evaluate(run, folder)["rows"][-1]["metrics"]
    assert list(metrics) == [*sts_scores.TASKS, "average"]
    assert metrics["average"] == pytest.approx(np.mean([metrics[t] for t in sts_scores.TASKS]))


def test_collapsed_embeddings_have_no_correlation(run, folder, monkeypatch, capsys):
    monkeypatch.setattr(
        sentences.SentenceEncoder, "embed", lambda self, texts: torch.ones(len(texts), 4)
    )
    sts.main([str(run.path), "--folder", str(folder), "--device", "cpu"])
    text = capsys.readouterr().out
    assert text.splitlines()[-4].split() == ["pretrained", "nan", "nan"]
    (saved,) = (r for r in sts.results.load_newest(run.path) if r["name"] == "sts")
    assert saved["protocol"]["nan"] == (
        "STS15 of random, as built, STS-B of random, as built, STS15 of pretrained, STS-B of "
        "pretrained: all similarities or all scores are equal, as with collapsed embeddings"
    )


def test_a_table_of_the_user_has_a_result_of_its_own(run, tmp_path):
    table = tmp_path / "mine.tsv"
    pairs, scores = SUBSETS["images"]
    lines = [f"{first}\t{second}\t{score}" for (first, second), score in zip(pairs, scores)]
    table.write_text("\n".join(["sentence1\tsentence2\tscore", *lines]))
    result = sts.evaluate(run, file=table)
    assert result["name"] == "sts_mine"
    assert result["rows"][-1]["metrics"] == pytest.approx({"mine": correlate(run, pairs, scores)})
    assert (run.path / "eval" / "sts_mine.json").exists()
    assert not (run.path / "eval" / "sts_mine_grid.json").exists()


def test_the_folder_is_a_setting_or_an_option(run, folder):
    assert error_of(sts.evaluate, run) == (
        "evaluation.sts_folder: no folder with tasks is given; give SentEval's data/downstream "
        "with --folder PATH, or a table of scored pairs with --file TABLE"
    )
    assert error_of(sts.evaluate, run, folder, "mine.tsv") == (
        f"--folder {folder} --file mine.tsv: both name tasks; give one of them at a time"
    )
    setting = [f"evaluation.sts_folder={folder}"]
    with_setting = load_sentence_run(run.path, overrides=setting, device="cpu")
    assert sts.evaluate(with_setting)["rows"] == sts.evaluate(run, folder)["rows"]


def test_the_command_without_a_folder_is_skipped_at_the_end_of_a_run(run, monkeypatch, capsys):
    arguments = [str(run.path), "--skip-unlabeled", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["sts", *arguments])
    with pytest.raises(SystemExit) as status:
        sts.command_line.execute(sts.main, "ssl_pretrain.eval.sts")
    assert status.value.code == 77
    assert capsys.readouterr().out.startswith("ssl_pretrain.eval.sts: skipped: evaluation.sts_f")
