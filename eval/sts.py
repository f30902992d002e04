"""Semantic textual similarity: compare cosines of sentences with people's scores.

Each task has pairs of sentences, and people have scored how similar the sentences of a pair are. A
number is Spearman's rank correlation of the cosines with the scores, times 100, over the pairs of
all subsets of a task at once, as in SimCSE (Gao et al., EMNLP 2021, arXiv:2104.08821). Nothing is
trained on the scores. The average is shown if all seven tasks are there. The row "shared words
(tf-idf)" counts common words, and "random, as built" has random weights. The result is printed and
saved to RUN/eval/sts.json, or to sts_NAME.json with --file. If a task has several subsets,
sts_grid.json has the number of each and SentEval's means over them.

    # the tasks in SentEval's layout
    python -m ssl_pretrain.eval.sts runs/simcse --folder SentEval/data/downstream
    # pairs of your own, with the columns sentence1, sentence2 and score
    python -m ssl_pretrain.eval.sts runs/simcse --file pairs.tsv
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ssl_pretrain.eval import command_line, results, sts_scores, tf_idf
from ssl_pretrain.eval.frozen import sentences
from ssl_pretrain.eval.frozen.evaluation_split import UnlabeledError
from ssl_pretrain.eval.frozen.sentences import SentenceEncoder
from ssl_pretrain.eval.sts_scores import ScoredPairs, TaskScores
from ssl_pretrain.eval.trained_run import TrainedRun

MEASURE = "Spearman x 100"
OPTIONS: dict[str, dict[str, Any]] = {
    "--folder": {
        "metavar": "PATH",
        "help": "folder with the tasks, as SentEval's data/downstream (default: the setting"
        " evaluation.sts_folder)",
    },
    "--file": {
        "metavar": "TABLE",
        "help": "table of your own, with the columns sentence1, sentence2 and score",
    },
}

Tasks = Mapping[str, list[ScoredPairs]]
Scores = Mapping[str, TaskScores]  # by task


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_sentences_and_print(
        command_line.build_sentence_parser("ssl_pretrain.eval.sts", __doc__, OPTIONS),
        arguments,
        lambda run, options: evaluate(run, options.folder, options.file),
    )


def evaluate(
    run: TrainedRun, folder: str | Path | None = None, file: str | Path | None = None
) -> dict[str, Any]:
    """Measure the correlations and save them to RUN/eval/sts.json.

    Args:
        run: Run to evaluate.
        folder: Folder with the tasks. Default: `evaluation.sts_folder`.
        file: Table of scored pairs instead. The result is then saved as sts_NAME.json.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the folder has no task, a file is damaged, or an embedding is not finite.
    """
    start = time.monotonic()
    name, origin, tasks = _read_tasks(run, folder, file)
    scores = {"shared words (tf-idf)": _score(tasks, _score_shared_words)}
    _print_progress(scores)
    for row_name in ("random, as built", "pretrained"):
        encoder = sentences.build_encoder(run, is_pretrained=row_name == "pretrained")
        scores[row_name] = _score(tasks, partial(_score_encoder, encoder))
        _print_progress(scores)
    protocol = _describe(run, tasks, origin, scores)
    seconds, provenance = time.monotonic() - start, run.provenance()
    if _has_subsets(tasks):
        grid = [results.Row(row_name, _subset_columns(row)) for row_name, row in scores.items()]
        grid_name = f"{name}{results.GRID_SUFFIX}"
        results.save(run.path, grid_name, protocol, grid, provenance, seconds, MEASURE)
    rows = [results.Row(row_name, _columns(row)) for row_name, row in scores.items()]
    return results.save(run.path, name, protocol, rows, provenance, seconds, MEASURE)


def _read_tasks(
    run: TrainedRun, folder: str | Path | None, file: str | Path | None
) -> tuple[str, str, Tasks]:
    """Return the name of the result, the path of the tasks, and the tasks.

    Raises:
        UnlabeledError: If no folder is given.
    """
    if folder and file:
        raise ValueError(
            f"--folder {folder} --file {file}: both name tasks; give one of them at a time"
        )
    if file:
        path = Path(file)
        return f"sts_{path.stem}", str(path), {path.stem: [sts_scores.read_scored_table(path)]}
    folder = folder or run.config.evaluation.sts_folder
    if not folder:
        raise UnlabeledError(
            "evaluation.sts_folder: no folder with tasks is given; give SentEval's data/downstream "
            "with --folder PATH, or a table of scored pairs with --file TABLE"
        )
    return "sts", str(folder), sts_scores.find_tasks(Path(folder).expanduser())


def _score(tasks: Tasks, score_task: Callable[[list[ScoredPairs]], TaskScores]) -> Scores:
    return {task: score_task(subsets) for task, subsets in tasks.items()}


def _score_shared_words(subsets: list[ScoredPairs]) -> TaskScores:
    """Score the similarity by shared words, whose weights come from the task's own sentences."""
    texts = [text for subset in subsets for text in (*subset.first, *subset.second)]
    return sts_scores.score_similarities(
        subsets,
        [tf_idf.paired_similarities(texts, subset.first, subset.second) for subset in subsets],
    )


def _score_encoder(encoder: SentenceEncoder, subsets: list[ScoredPairs]) -> TaskScores:
    return sts_scores.score_task(subsets, lambda texts: encoder.embed(texts).cpu().numpy())


def _columns(scores: Scores) -> dict[str, float]:
    """Return the number of each task, and the average if all seven tasks are there."""
    columns = {task: task_scores.all for task, task_scores in scores.items()}
    if set(scores) == set(sts_scores.TASKS):
        columns["average"] = sts_scores.average_of_tasks(scores)
    return columns


def _subset_columns(scores: Scores) -> dict[str, float]:
    """Return the number of each task and, if it has several subsets, of those and their means."""
    columns: dict[str, float] = {}
    for task, task_scores in scores.items():
        columns[task] = task_scores.all
        if len(task_scores.by_subset) > 1:
            columns |= {f"{task}, mean": task_scores.mean, f"{task}, wmean": task_scores.wmean}
            columns |= {f"{task}, {name}": value for name, value in task_scores.by_subset.items()}
    return columns


def _describe(
    run: TrainedRun, tasks: Tasks, origin: str, scores: Mapping[str, Scores]
) -> dict[str, Any]:
    sizes = {task: sum(map(len, subsets)) for task, subsets in tasks.items()}
    protocol = {
        **sentences.describe_encoder(run),
        "tasks": f"{origin}: {', '.join(f'{task} {size:,} pairs' for task, size in sizes.items())}",
        "similarity": "cosine, whatever method.similarity is",
        "numbers": "Spearman's correlation with people's scores over the pairs of all subsets of a"
        " task at once, times 100; tied values share their mean rank",
        "shared words": "cosine of tf-idf; the weights of words come from the task's sentences"
        " without the scores",
    }
    if _has_subsets(tasks):
        protocol["mean and wmean"] = (
            f"means over the subsets, in sts{results.GRID_SUFFIX}; wmean is weighted by the number "
            "of pairs"
        )
    undefined = [
        f"{task} of {row_name}"
        for row_name, row in scores.items()
        for task, task_scores in row.items()
        if math.isnan(task_scores.all)
    ]
    if undefined:
        protocol["nan"] = (
            f"{', '.join(undefined)}: all similarities or all scores are equal, as with collapsed "
            "embeddings"
        )
    return protocol


def _has_subsets(tasks: Tasks) -> bool:
    return any(len(subsets) > 1 for subsets in tasks.values())


def _print_progress(scores: Mapping[str, Scores]) -> None:
    """Print the newest row."""
    name, row = list(scores.items())[-1]
    results.print_progress(results.Row(name, _columns(row)).summary(unit=""))


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.sts")
