"""Columns of a study's table, and the results of a run that fill them."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssl_pretrain.eval import results, spectrum
from ssl_pretrain.monitoring import records

RAW_PIXELS, RANDOM_BACKBONE = "raw pixels", "random backbone"  # rows to compare with


class RunResults:
    """Evaluation results and training records of one run."""

    def __init__(self, run: Path):
        self.path = run
        # Metrics by evaluation, and then by row.
        self.tables: dict[str, dict[str, dict[str, float]]] = {
            result["name"]: {row["features"]: row["metrics"] for row in result["rows"]}
            for result in results.load_newest(run)
        }
        self.records = records.read(run / "metrics.jsonl")

    def eigenvalues(self) -> spectrum.Eigenvalues:
        """Return the eigenvalues of the newest spectrum, or {} if it has no file of them."""
        path = self.path / "eval" / "spectrum.json"
        if not path.is_file():
            return {}
        checkpoint = json.loads(path.read_text())["checkpoint"]
        return spectrum.read_eigenvalues(
            spectrum.eigenvalues_path(self.path, "spectrum", checkpoint)
        )

    def minutes(self) -> float:
        """Return the minutes from the first record to the last, or NaN without records."""
        if not self.records:
            return math.nan
        return float(self.records[-1]["time"] - self.records[0]["time"]) / 60

    def last_value(self, metric: str) -> float:
        """Return the last value of a training metric, or NaN if there is none."""
        values = [record[metric] for record in self.records if metric in record]
        return float(values[-1]) if values else float("nan")

    def gain_over_random(self, evaluation: str, metric: str) -> float:
        """Return the gain in accuracy over the better random backbone, in points."""
        rows = self.tables[evaluation]
        return rows["pretrained"][metric] - rows[results.BETTER_RANDOM][metric]


@dataclass(frozen=True)
class Column:
    """A column of the table, with one number per run."""

    help: str
    evaluation: str  # evaluation that reports the number, or empty for training records
    metric: str = ""  # column of that evaluation
    row: str = "pretrained"  # row of that evaluation
    compute: Callable[[RunResults], float] | None = None  # replaces the lookup
    # Which mean is the best one, or "" if neither high nor low values are better.
    best: Literal["highest", "lowest", ""] = ""
    # Rows of the evaluation that the column is compared with, by name in the table.
    references: Mapping[str, str] = field(default_factory=dict)

    def value(self, run: RunResults) -> float:
        """Return the column's number for a run."""
        if self.compute is not None:
            return self.compute(run)
        return run.tables[self.evaluation][self.row][self.metric]

    def reference(self, run: RunResults, name: str) -> float | None:
        """Return the number of raw pixels or of the random backbone, or None if there is none."""
        rows = run.tables.get(self.evaluation, {})
        return rows.get(self.references.get(name, ""), {}).get(self.metric)


def _gain_column(evaluation: str, metric: str) -> Column:
    return Column(
        "gain in test accuracy over the better random backbone, in percentage points",
        evaluation,
        compute=lambda run: run.gain_over_random(evaluation, metric),
        best="highest",
    )


ACCURACY_REFERENCES = {RAW_PIXELS: RAW_PIXELS, RANDOM_BACKBONE: results.BETTER_RANDOM}
# The random backbone is the same for all variants. Its embeddings are not, because heads differ.
FEATURE_REFERENCES = {RANDOM_BACKBONE: "random, as built"}
DEFAULT_COLUMNS = {
    "linear, %": Column(
        "test accuracy of a linear classifier on frozen features, with the learning rate chosen "
        "on held-out training images",
        "linear",
        "all labels",
        best="highest",
        references=ACCURACY_REFERENCES,
    ),
    "top-5 of all, %": Column(
        "share of the five largest eigenvalues in the covariance of embeddings of length 1",
        "spectrum",
        "embeddings, top-5 of all",
    ),
    "effective rank": Column(
        "exponential of the entropy of the eigenvalues' shares", "spectrum", "embeddings, rank"
    ),
    "variance, %": Column(
        "sum of the eigenvalues, which is 100 for embeddings spread over the whole sphere and 0 "
        "for a single point",
        "spectrum",
        "embeddings, variance",
    ),
    "features' top-5, %": Column(
        "the same share for features",
        "spectrum",
        "features, top-5 of all",
        references=FEATURE_REFERENCES,
    ),
    "features' rank": Column(
        "the effective rank of features",
        "spectrum",
        "features, rank",
        references=FEATURE_REFERENCES,
    ),
}
COLUMNS = DEFAULT_COLUMNS | {
    "k-NN, %": Column(
        "test accuracy of weighted k-NN on frozen features",
        "knn",
        "clean",
        best="highest",
        references=ACCURACY_REFERENCES,
    ),
    "raw pixels, %": Column(
        "test accuracy of weighted k-NN on raw pixels", "knn", "clean", row=RAW_PIXELS
    ),
    "random backbone, %": Column(
        "test accuracy of weighted k-NN on features of the better random backbone",
        "knn",
        "clean",
        row=results.BETTER_RANDOM,
    ),
    "k-NN above random": _gain_column("knn", "clean"),
    "linear above random": _gain_column("linear", "all labels"),
    "attentive, %": Column(
        "test accuracy of one attention query and a linear classifier on frozen patch tokens, with "
        "the learning rate chosen on held-out training images",
        "attentive",
        "all labels",
        best="highest",
        references=ACCURACY_REFERENCES,
    ),
    "attentive above random": _gain_column("attentive", "all labels"),
    "RankMe": Column(
        "effective rank of the embeddings at the end of training",
        "",
        compute=lambda run: run.last_value("rankme"),
    ),
    "k-NN in the run, %": Column(
        "last accuracy of weighted k-NN on held-out training images during training",
        "",
        compute=lambda run: 100 * run.last_value("knn"),
        best="highest",
    ),
    "minutes": Column(
        "time from the first training record to the last", "", compute=RunResults.minutes
    ),
}


def has_random_row(run: Path) -> bool:
    """Return True if the run's linear evaluation includes the random backbone."""
    return results.BETTER_RANDOM in RunResults(run).tables.get("linear", {})
