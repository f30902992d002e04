"""Semantic textual similarity: Spearman correlation of cosines with people's scores.

The tasks are those of SimCSE's tables (Gao et al., EMNLP 2021, arXiv:2104.08821): STS12 to STS16,
the test split of STS-B, and the test split of SICK-R. Files are in SentEval's layout:

    STS/STS12-en-test/STS.input.MSRpar.txt     two sentences per line, separated by a tab
    STS/STS12-en-test/STS.gs.MSRpar.txt        one score per line, empty if the pair has none
    STS/STSBenchmark/sts-test.csv              tab-separated, or with titles
    SICK/SICK_test_annotated.txt               tab-separated, with titles

No sentence is changed, and nothing is trained on the scores.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_pretrain.data.texts.text_formats import DamagedRecord, TextLines, read_rows

Embed = Callable[[list[str]], np.ndarray]  # returns (n, dim)
# Subsets that SentEval uses. It leaves out STS13's SMT, whose license forbids copies.
SUBSETS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
TASKS = (*SUBSETS, "STS-B", "SICK-R")
_FILES = {
    "STS-B": tuple(
        f"{folder}sts-test.{suffix}"
        for suffix in ("csv", "tsv")
        for folder in ("STS/STSBenchmark/", "STSBenchmark/", "")
    ),
    "SICK-R": ("SICK/SICK_test_annotated.txt", "SICK_test_annotated.txt"),
}
# Titles in lower case, reduced to letters and digits, of the sentences and the score.
_TITLES = (
    ("sentence1", "sentencea"),
    ("sentence2", "sentenceb"),
    ("score", "relatednessscore", "similarityscore"),
)
_STS_B_COLUMNS = (5, 6, 4)  # sentences and score of STS-B's files, which have no titles


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of sentences and the similarity that people gave each pair."""

    name: str
    first: list[str]
    second: list[str]
    scores: np.ndarray  # float64 (n,)

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class TaskScores:
    """Spearman correlations of a task, times 100.

    Attributes:
        all: Correlation over the pairs of all subsets at once, which SimCSE reports.
        mean: Mean of the subsets' correlations.
        wmean: The same mean, weighted by the number of pairs.
        by_subset: Correlation of each subset.
    """

    all: float
    mean: float
    wmean: float
    by_subset: dict[str, float]


def spearman(values: np.ndarray, scores: np.ndarray) -> float:
    """Return Spearman's rank correlation times 100, in which tied values share their mean rank.

    It is NaN if all values or all scores are equal, as with collapsed embeddings.
    """
    if len(np.unique(values)) < 2 or len(np.unique(scores)) < 2:
        return float("nan")
    from scipy.stats import spearmanr  # slow to import

    return 100 * float(spearmanr(values, scores).statistic)


def cosine_similarities(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows in float64, and 0 for a row of zeros."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / np.where(norms > 0, norms, 1)


def score_task(subsets: Sequence[ScoredPairs], embed: Embed) -> TaskScores:
    """Return the correlations of a task, in which sentences are compared by cosine.

    Args:
        subsets: Subsets of the task, each with a name of its own.
        embed: Function that returns the embeddings of sentences, (n, dim).
    """
    return score_similarities(subsets, [_similarities(subset, embed) for subset in subsets])


def score_similarities(
    subsets: Sequence[ScoredPairs], similarities: Sequence[np.ndarray]
) -> TaskScores:
    """Return the correlations of a task.

    Args:
        subsets: Subsets of the task, each with a name of its own.
        similarities: Similarities of the pairs of each subset, (n,).
    """
    by_subset = {
        subset.name: spearman(values, subset.scores)
        for subset, values in zip(subsets, similarities)
    }
    correlations = list(by_subset.values())
    return TaskScores(
        all=spearman(
            np.concatenate(similarities), np.concatenate([subset.scores for subset in subsets])
        ),
        mean=float(np.mean(correlations)),
        wmean=float(np.average(correlations, weights=[len(subset) for subset in subsets])),
        by_subset=by_subset,
    )


def average_of_tasks(scores: Mapping[str, TaskScores]) -> float:
    """Return the mean of the tasks' `all`, the column "Avg." of SimCSE's tables.

    Raises:
        ValueError: If one of the seven tasks is missing, because the mean would mean another thing.
    """
    if missing_tasks := [task for task in TASKS if task not in scores]:
        raise ValueError(
            f"the average is over {', '.join(TASKS)}; these are missing: {', '.join(missing_tasks)}"
        )
    return float(np.mean([scores[task].all for task in TASKS]))


def find_tasks(root: Path) -> dict[str, list[ScoredPairs]]:
    """Read the tasks that a folder in SentEval's layout contains.

    Raises:
        ValueError: If it contains none, or a file is damaged.
    """
    tasks = {}
    for task in SUBSETS:
        folders = [
            root / prefix / f"{task}{end}" for prefix in ("STS", "") for end in ("-en-test", "")
        ]
        if folder := next((folder for folder in folders if folder.is_dir()), None):
            tasks[task] = read_sts_folder(folder, SUBSETS[task])
    for task, names in _FILES.items():
        if path := next((root / name for name in names if (root / name).is_file()), None):
            tasks[task] = [read_scored_table(path, task)]
    if not tasks:
        raise ValueError(
            f"{root} contains no task such as STS/STS12-en-test or STS/STSBenchmark/sts-test.csv; "
            "give the folder `data/downstream` of SentEval"
        )
    return tasks


def read_sts_folder(folder: Path, names: Sequence[str] = ()) -> list[ScoredPairs]:
    """Read the subsets of a year of STS.

    Args:
        folder: Folder with `STS.input.NAME.txt` and `STS.gs.NAME.txt`.
        names: Names of the subsets. If empty, those of all files, in alphabetical order.

    Raises:
        ValueError: If a file is missing or damaged, or the numbers of lines differ.
    """
    if not names:
        files = sorted(folder.glob("STS.input.*.txt"))
        names = [path.name.removeprefix("STS.input.").removesuffix(".txt") for path in files]
    if not names:
        raise ValueError(f"{folder} contains no STS.input.NAME.txt; give a folder of STS")
    return [_read_subset(folder, name) for name in names]


def read_scored_table(path: Path, name: str = "") -> ScoredPairs:
    """Read a table of sentences and scores, such as `sts-test.csv` or `SICK_test_annotated.txt`.

    Columns are found by their titles, or are those of STS-B. Tables are separated by tabs, or else
    by commas. Pairs without a score are left out.

    Raises:
        ValueError: If the table has other columns, or a score is not a number.
    """
    rows = _read_table(path)
    columns, has_titles = _find_columns(path, rows[0][1])
    pairs = []
    for line, row in rows[has_titles:]:
        if len(row) <= max(columns):
            raise ValueError(
                f"{path}:{line} has {len(row)} cells, and the score and the sentences need "
                f"{max(columns) + 1}; download the file again"
            )
        first, second, score = (row[column] for column in columns)
        pairs.append((line, first, second, score))
    return _scored_pairs(path, name or path.stem, pairs)


def _similarities(subset: ScoredPairs, embed: Embed) -> np.ndarray:
    embeddings = np.asarray(embed([*subset.first, *subset.second]))
    return cosine_similarities(embeddings[: len(subset)], embeddings[len(subset) :])


def _read_subset(folder: Path, name: str) -> ScoredPairs:
    path, scores_path = folder / f"STS.input.{name}.txt", folder / f"STS.gs.{name}.txt"
    sentences, scores = _read_lines(path), _read_lines(scores_path)
    if len(sentences) != len(scores):
        raise ValueError(
            f"{path} has {len(sentences):,} lines, and {scores_path} {len(scores):,}; download "
            "both again"
        )
    pairs = []
    for line, (text, score) in enumerate(zip(sentences, scores), 1):
        cells = text.split("\t")
        if len(cells) < 2:
            raise ValueError(
                f"{path}:{line} is {text[:40]!r}, without a tab between two sentences; download "
                "the file again"
            )
        pairs.append((line, cells[0], cells[1], score))
    return _scored_pairs(scores_path, name, pairs)


def _scored_pairs(path: Path, name: str, pairs: Sequence[tuple[int, str, str, str]]) -> ScoredPairs:
    """Return the pairs that have a score. Each one comes with its line."""
    scored = [pair for pair in pairs if pair[3].strip()]
    scores = []
    for line, _, _, score in scored:
        try:
            scores.append(float(score))
        except ValueError:
            raise ValueError(
                f"{path}:{line} has the score {score.strip()!r}, not a number; download the file "
                "again"
            ) from None
    if not scores:
        raise ValueError(f"{path} has no scores; give the files with people's scores")
    return ScoredPairs(
        name,
        [first.strip() for _, first, _, _ in scored],
        [second.strip() for _, _, second, _ in scored],
        np.array(scores),
    )


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a file. Other characters that Python takes for line ends are text."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; download the task with SentEval's script")
    with open(path, "rb") as file:
        return [line.rstrip("\r\n") for line in TextLines(str(path), file)]


def _read_table(path: Path) -> list[tuple[int, list[str]]]:
    """Return the rows of a table, each with its number from 1."""
    lines = [f"{line}\n" for line in _read_lines(path)]
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    try:
        rows = [(number, row) for number, row in enumerate(read_rows(lines, delimiter), 1) if row]
    except DamagedRecord as error:
        raise ValueError(f"{path} {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty; download the file again")
    return rows


def _find_columns(path: Path, first_row: list[str]) -> tuple[tuple[int, ...], bool]:
    """Return the columns of the sentences and the score, and True if the first row has titles."""
    keys = [re.sub(r"[^a-z0-9]", "", title.lower()) for title in first_row]
    columns = [next((keys.index(key) for key in names if key in keys), -1) for names in _TITLES]
    if -1 not in columns:
        return tuple(columns), True
    if len(first_row) > max(_STS_B_COLUMNS):
        return _STS_B_COLUMNS, False
    raise ValueError(
        f"{path} begins with the cells {', '.join(first_row)}; give a first line with the titles "
        "sentence1, sentence2 and score"
    )
