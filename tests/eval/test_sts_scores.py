"""Semantic textual similarity: correlations by hand, SentEval's files and aggregation, refusals."""

import numpy as np
import pytest

from ssl_pretrain.eval import sts_scores
from ssl_pretrain.eval.sts_scores import ScoredPairs, TaskScores


def write_subset(folder, name, pairs, scores):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{first}\t{second}\n" for first, second in pairs)
    (folder / f"STS.input.{name}.txt").write_text(lines)
    (folder / f"STS.gs.{name}.txt").write_text("".join(f"{score}\n" for score in scores))


def embed(sentences):
    """Embed a sentence that is an angle in degrees."""
    angles = np.radians([float(sentence) for sentence in sentences])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def angles(name, differences, scores):
    """Return pairs whose cosine falls with the difference of their angles."""
    first = ["10"] * len(differences)
    second = [str(10 + difference) for difference in differences]
    return ScoredPairs(name, first, second, np.array(scores, float))


def error_of(function, *arguments):
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def test_the_correlation_is_that_of_the_ranks_with_ties_at_their_mean():
    values = np.array([0.1, 0.4, 0.4, 0.9, 0.2])
    scores = np.array([1.0, 3.0, 5.0, 5.0, 2.0])
    value_ranks = np.array([1, 3.5, 3.5, 5, 2])
    score_ranks = np.array([1, 3, 4.5, 4.5, 2])
    covariance = ((value_ranks - 3) * (score_ranks - 3)).mean()
    expected = 100 * covariance / (value_ranks.std() * score_ranks.std())
    assert sts_scores.spearman(values, scores) == pytest.approx(expected)
    assert sts_scores.spearman(values, np.exp(values)) == pytest.approx(100)
    assert sts_scores.spearman(values, -values) == pytest.approx(-100)


def test_the_correlation_of_collapsed_embeddings_is_undefined():
    assert np.isnan(sts_scores.spearman(np.ones(3), np.arange(3)))


def test_the_cosine_does_not_depend_on_the_length_and_is_0_for_zeros():
    first, second = np.array([[3.0, 0], [1, 1], [0, 0]]), np.array([[5.0, 5], [-2, -2], [1, 0]])
    np.testing.assert_allclose(
        sts_scores.cosine_similarities(first, second), [0.5**0.5, -1, 0], atol=1e-12
    )


def test_a_task_is_aggregated_in_the_three_ways_of_senteval():
    easy = angles("easy", [0, 20, 40, 60], [5, 4, 3, 2])
    reversed_order = angles("reversed", [5, 15], [0, 1])
    scores = sts_scores.score_task([easy, reversed_order], embed)
    assert scores.by_subset == pytest.approx({"easy": 100, "reversed": -100})
    assert scores.mean == pytest.approx(0)
    assert scores.wmean == pytest.approx(100 * (4 - 2) / 6)
    # All pairs by rising angle, 0 5 15 20 40 60, have the scores 5 0 1 4 3 2.
    differences = np.array([6 - 6, 5 - 1, 4 - 2, 3 - 5, 2 - 4, 1 - 3])
    assert scores.all == pytest.approx(100 * (1 - 6 * (differences**2).sum() / (6 * 35)))


def test_pairs_without_a_score_are_left_out(tmp_path):
    write_subset(tmp_path, "plagiarism", [("a", "b"), ("c", "d"), ("e", "f")], ["1.5", "", "4"])
    (subset,) = sts_scores.read_sts_folder(tmp_path)
    assert (subset.name, subset.first, subset.second) == ("plagiarism", ["a", "e"], ["b", "f"])
    assert subset.scores.tolist() == [1.5, 4]


def test_characters_that_python_takes_for_line_ends_do_not_shift_the_scores(tmp_path):
    write_subset(tmp_path, "x", [("one\x85two\u2028", 'a "quote'), ("three", "four")], [1, 2])
    (subset,) = sts_scores.read_sts_folder(tmp_path)
    assert subset.first == ["one\x85two", "three"]
    assert subset.second == ['a "quote', "four"]


STS_B = 'main-captions\tMSRvid\t2012test\t1\t2.5\tA girl sings.\tA "girl".\n'
SICK = (
    "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    "6\tA dog runs\tA cat, too\t3.3\tNEUTRAL\n"
)
TITLED = 'split,sentence1,sentence2,score\ntest,"One, two",Three,0.5\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (STS_B, ("A girl sings.", 'A "girl".', 2.5)),
        (SICK, ("A dog runs", "A cat, too", 3.3)),
        (TITLED, ("One, two", "Three", 0.5)),
    ],
)
def test_tables_are_read_by_their_titles_or_as_sts_b(tmp_path, content, expected):
    (tmp_path / "table.csv").write_text(content)
    pairs = sts_scores.read_scored_table(tmp_path / "table.csv")
    assert (pairs.first, pairs.second, pairs.scores.tolist()) == tuple(
        [value] for value in expected
    )


def test_all_seven_tasks_are_found_in_the_layout_of_senteval(tmp_path):
    for year, names in sts_scores.SUBSETS.items():
        for name in (*names, "SMT"):
            write_subset(tmp_path / f"STS/{year}-en-test", name, [("1", "2"), ("1", "9")], [5, 3])
    for path, content in (
        ("STS/STSBenchmark/sts-test.csv", STS_B),
        ("SICK/SICK_test_annotated.txt", SICK),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    tasks = sts_scores.find_tasks(tmp_path)
    assert tuple(tasks) == sts_scores.TASKS
    assert [subset.name for subset in tasks["STS13"]] == ["FNWN", "headlines", "OnWN"]
    assert sts_scores.score_task(tasks["STS16"], embed).all == pytest.approx(100)


def test_the_average_is_that_of_seven_tasks():
    scores = {
        task: TaskScores(all=value, mean=0, wmean=0, by_subset={})
        for value, task in enumerate(sts_scores.TASKS)
    }
    assert sts_scores.average_of_tasks(scores) == 3
    del scores["STS-B"]
    assert error_of(sts_scores.average_of_tasks, scores) == (
        "the average is over STS12, STS13, STS14, STS15, STS16, STS-B, SICK-R; these are missing: "
        "STS-B"
    )


REFUSED_TABLES = {
    "score": (
        "sentence1,sentence2,score\na,b,high\n",
        "PATH:2 has the score 'high', not a number; download the file again",
    ),
    "cells": (
        f"{STS_B}too\tshort\n",
        "PATH:2 has 2 cells, and the score and the sentences need 7; download the file again",
    ),
    "columns": (
        "a,b\n1,2\n",
        "PATH begins with the cells a, b; give a first line with the titles"
        " sentence1, sentence2 and score",
    ),
    "empty": ("", "PATH is empty; download the file again"),
    "unscored": (
        "sentence1,sentence2,score\na,b,\n",
        "PATH has no scores; give the files with people's scores",
    ),
}


@pytest.mark.parametrize("name", REFUSED_TABLES)
def test_damaged_tables_are_refused_with_the_line(tmp_path, name):
    content, message = REFUSED_TABLES[name]
    path = tmp_path / "table.csv"
    path.write_text(content)
    assert error_of(sts_scores.read_scored_table, path) == message.replace("PATH", str(path))


def test_damaged_subsets_are_refused(tmp_path):
    write_subset(tmp_path, "x", [("a", "b")], [1, 2])
    path, scores_path = tmp_path / "STS.input.x.txt", tmp_path / "STS.gs.x.txt"
    assert error_of(sts_scores.read_sts_folder, tmp_path) == (
        f"{path} has 1 lines, and {scores_path} 2; download both again"
    )
    scores_path.write_text("1\n")
    path.write_text("one sentence\n")
    assert error_of(sts_scores.read_sts_folder, tmp_path) == (
        f"{path}:1 is 'one sentence', without a tab between two sentences; download the file again"
    )
    scores_path.unlink()
    assert error_of(sts_scores.read_sts_folder, tmp_path) == (
        f"{scores_path} does not exist; download the task with SentEval's script"
    )


def test_a_folder_without_tasks_is_refused(tmp_path):
    assert error_of(sts_scores.find_tasks, tmp_path) == (
        f"{tmp_path} contains no task such as STS/STS12-en-test or STS/STSBenchmark/sts-test.csv; "
        "give the folder `data/downstream` of SentEval"
    )
    assert error_of(sts_scores.read_sts_folder, tmp_path) == (
        f"{tmp_path} contains no STS.input.NAME.txt; give a folder of STS"
    )
