"""Titles and descriptions of the metrics of a run, and their names in earlier versions.

A metric has one name everywhere, its key in `metrics.jsonl`. W&B and TensorBoard show it in the
section of its group. The dashboard and the HTML reports add its title.
"""

from pathlib import Path
from typing import Any, NamedTuple


class MetricInfo(NamedTuple):
    """Group, title and description of a metric in the dashboard and the reports."""

    group: str
    title: str
    description: str = ""
    is_percentage: bool = False  # True for a fraction in [0, 1] that is shown times 100


LEARNING, COLLAPSE, NETWORK = "Learning", "Collapse", "Network"
SPEED, EVALUATION = "Speed", "Evaluation"
GROUPS = (LEARNING, COLLAPSE, EVALUATION, NETWORK, SPEED)
SPREAD_CHART, SPECTRUM_CHART = f"{COLLAPSE}/deviations", f"{COLLAPSE}/spectrum"
VIEWS_PICTURE, NEIGHBORS_PICTURE = "Pictures/views", "Pictures/neighbors"
METRICS = {
    "loss": MetricInfo(
        LEARNING, "loss", "the objective; it can fall while the representation collapses"
    ),
    "knn": MetricInfo(
        LEARNING, "k-NN accuracy", "frozen features, on training images outside the bank", True
    ),
    "probe": MetricInfo(
        LEARNING, "linear accuracy", "linear classifier on the images and features of k-NN", True
    ),
    "lr": MetricInfo(LEARNING, "learning rate"),
    "weight_decay": MetricInfo(LEARNING, "weight decay"),
    "skipped_steps": MetricInfo(
        LEARNING, "skipped steps", "steps since the last record whose gradient was not finite"
    ),
    "replaced_images": MetricInfo(
        LEARNING, "replaced images", "unreadable images since the last record"
    ),
    "replay_error": MetricInfo(
        LEARNING,
        "replay error",
        "largest difference between the two forward passes over a micro-batch",
    ),
    "rankme": MetricInfo(
        COLLAPSE, "RankMe", "effective rank of the embeddings, not centered; 1 means collapse"
    ),
    "effective_rank_centered": MetricInfo(
        COLLAPSE, "effective rank, centered", "effective rank of the embeddings minus their mean"
    ),
    "rank_share": MetricInfo(
        COLLAPSE,
        "relative effective rank",
        "centered effective rank over its maximum, min(images - 1, dimension)",
    ),
    "top5_ratio": MetricInfo(
        COLLAPSE,
        "variance in five directions",
        "share of the five largest eigenvalues of the covariance",
        True,
    ),
    "embedding_std": MetricInfo(
        COLLAPSE,
        "spread",
        "standard deviation of unit-length embeddings times sqrt(dim); "
        "1 is uniform, 0 is collapsed",
    ),
    "embedding_std_min": MetricInfo(COLLAPSE, "spread of the flattest dimension"),
    "embedding_scale": MetricInfo(
        COLLAPSE,
        "deviation before normalization",
        "mean over dimensions; near 0 the embeddings shrink to a point",
    ),
    "uniformity": MetricInfo(COLLAPSE, "uniformity", "0 is collapsed, -4 is best"),
    "alignment": MetricInfo(
        COLLAPSE, "alignment", "squared distance of two views; 0 if they are equal, 2 if unrelated"
    ),
    "pair_cosine": MetricInfo(COLLAPSE, "cosine of positive pairs"),
    "positive_rank": MetricInfo(
        COLLAPSE, "rank of the positive", "among all images of the batch; 1 is first"
    ),
    "positive_chance": MetricInfo(
        COLLAPSE,
        "rank of the positive relative to chance",
        "1 means the two views of an image cannot be matched",
    ),
    "prototype_usage": MetricInfo(
        COLLAPSE,
        "prototypes in use",
        "share of the prototypes that the measured images can reach",
        True,
    ),
    "prototype_entropy": MetricInfo(
        COLLAPSE,
        "evenness of prototypes",
        "entropy of the assignments over its maximum; at 0 one prototype has all images",
    ),
    "gaussianity": MetricInfo(
        COLLAPSE,
        "closeness to a normal distribution",
        "1 minus SIGReg's statistic over that of a collapsed batch; 1 is standard normal",
    ),
    "feature_rank_centered": MetricInfo(
        COLLAPSE, "effective rank of the features", "the backbone's output, centered"
    ),
    "alpha_req": MetricInfo(
        COLLAPSE, "alpha-ReQ", "decay exponent of the features' spectrum; about 1 is best"
    ),
    "teacher_distance": MetricInfo(
        NETWORK, "distance of teacher and student", "relative to the norm of the student"
    ),
    "gradient_norm": MetricInfo(NETWORK, "gradient, all", "before clipping"),
    "images_per_second": MetricInfo(
        SPEED, "images per second", "all ranks, loader included; an image counts once for all views"
    ),
    "seconds_per_step": MetricInfo(SPEED, "seconds per step"),
    "data_wait": MetricInfo(
        SPEED, "waiting for images", "share of the time, on the slowest rank", True
    ),
    "straggler": MetricInfo(SPEED, "slowest rank", "the rank that the others wait for"),
    "straggler_seconds": MetricInfo(SPEED, "seconds spent waiting for the slowest rank"),
    "compile_seconds": MetricInfo(
        SPEED, "seconds spent on compilation", "since the process started, on rank 0"
    ),
    "memory_gib": MetricInfo(
        SPEED, "memory, GiB", "largest peak of any rank, on its GPU or on the host"
    ),
    "model_tflops": MetricInfo(
        SPEED, "model TFLOP/s per rank", "forward, backward, and the teacher's forward"
    ),
    "flops_utilization": MetricInfo(
        SPEED, "model FLOPs utilization", "share of the GPU's peak in bfloat16", True
    ),
}
AXES = ("step", "epoch", "evaluated_step")
# Start of the title, by prefix of the metrics that exist once per submodule of the method.
TITLE_BY_PREFIX = {"gradient_norm_": "gradient, ", "update_ratio_": "update over weights, "}
# Words of metrics that only one method has, if their spelling in a title is not that of the key.
SPELLINGS = {
    "nt xent": "NT-Xent",
    "info nce": "InfoNCE",
    "n pair": "N-pair",
    "sigreg": "SIGReg",
    "koleo": "KoLeo",
    "ibot": "iBOT",
}

# Current names of metrics and files, by the names that earlier versions gave them.
CURRENT_NAMES = {
    "alarms.jsonl": "alerts.jsonl",
    "neighbours": "neighbors",
    "neighbour_cosine": "neighbor_cosine",
}


def metric_info(key: str) -> MetricInfo:
    """Return the group, title and description of a metric.

    Metrics that only one method has are in the group Learning. Their titles are made of their keys.
    """
    if key in METRICS:
        return METRICS[key]
    for prefix, title in TITLE_BY_PREFIX.items():
        if key.startswith(prefix):
            return MetricInfo(NETWORK, title + key.removeprefix(prefix))
    title = key.replace("_", " ")
    for words, spelling in SPELLINGS.items():
        title = title.replace(words, spelling)
    return MetricInfo(LEARNING, title)


def tracker_name(key: str) -> str:
    """Return the name of a metric in W&B and TensorBoard, ``Group/key``. Axes keep their names."""
    return key if key in AXES else f"{metric_info(key).group}/{key}"


def evaluation_name(result: str, column: str) -> str:
    """Return the name in trackers of one column of a result, for pretrained features."""
    return f"{EVALUATION}/{result}/{column}"


def evaluation_metrics(result: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of the pretrained features in an evaluation's result, by tracker name."""
    rows = (row["metrics"] for row in result["rows"] if row["features"] == "pretrained")
    metrics: dict[str, float] = next(rows, {})
    return {evaluation_name(result["name"], column): metrics[column] for column in metrics}


def with_current_names(record: dict[str, Any]) -> dict[str, Any]:
    """Rename the metrics of a record that an earlier version wrote."""
    return {CURRENT_NAMES.get(key, key): value for key, value in record.items()}


def existing_paths(run: Path, name: str) -> list[Path]:
    """Return the existing files of a run under this name and its earlier names, earlier first."""
    earlier_names = [old for old, new in CURRENT_NAMES.items() if new == name]
    paths = [run / file_name for file_name in (*earlier_names, name)]
    return [path for path in paths if path.exists()]
