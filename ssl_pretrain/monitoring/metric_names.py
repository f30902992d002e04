"""Titles and descriptions of the metrics of a run, and their names in earlier versions.

W&B, the dashboard and the HTML reports use the groups and titles of this module.
"""

from pathlib import Path
from typing import Any, NamedTuple


class Curve(NamedTuple):
    """Group, title and description of a metric's curve."""

    group: str
    title: str
    description: str = ""
    percent: bool = False  # True for a fraction in [0, 1] that is shown times 100


LEARNING, COLLAPSE, NETWORK = "Learning", "Collapse", "Network"
SPEED, EVALUATION = "Speed", "Evaluation"
GROUPS = (LEARNING, COLLAPSE, EVALUATION, NETWORK, SPEED)
SPREAD, SPECTRUM = f"{COLLAPSE}/spread of the dimensions", f"{COLLAPSE}/spectrum"
VIEWS_PICTURE, NEIGHBORS_PICTURE = "Pictures/views", "Pictures/nearest neighbors"
CURVES = {
    "loss": Curve(
        LEARNING, "loss", "the objective; it can fall while the representation collapses"
    ),
    "knn": Curve(
        LEARNING, "k-NN accuracy", "frozen features, on training images outside the bank", True
    ),
    "probe": Curve(
        LEARNING, "linear accuracy", "linear classifier on the images and features of k-NN", True
    ),
    "lr": Curve(LEARNING, "learning rate"),
    "weight_decay": Curve(LEARNING, "weight decay"),
    "skipped_steps": Curve(
        LEARNING, "skipped steps", "steps since the last record whose gradient was not finite"
    ),
    "replaced_images": Curve(
        LEARNING, "replaced images", "unreadable images since the last record"
    ),
    "replay_error": Curve(
        LEARNING,
        "replay error",
        "largest difference between the two forward passes over a micro-batch",
    ),
    "rankme": Curve(
        COLLAPSE, "RankMe", "effective rank of the embeddings, not centered; 1 means collapse"
    ),
    "effective_rank_centered": Curve(
        COLLAPSE, "effective rank, centered", "effective rank of the embeddings minus their mean"
    ),
    "rank_share": Curve(
        COLLAPSE,
        "relative effective rank",
        "centered effective rank over its maximum, min(images - 1, dimension)",
    ),
    "top5_ratio": Curve(
        COLLAPSE,
        "variance in five directions",
        "share of the five largest eigenvalues of the covariance",
        True,
    ),
    "embedding_std": Curve(
        COLLAPSE,
        "spread",
        "standard deviation of unit-length embeddings times sqrt(dim); "
        "1 is uniform, 0 is collapsed",
    ),
    "embedding_std_min": Curve(COLLAPSE, "spread of the flattest dimension"),
    "embedding_scale": Curve(
        COLLAPSE,
        "deviation before normalization",
        "mean over dimensions; near 0 the embeddings shrink to a point",
    ),
    "uniformity": Curve(COLLAPSE, "uniformity", "0 is collapsed, -4 is best"),
    "alignment": Curve(
        COLLAPSE, "alignment", "squared distance of two views; 0 if they are equal, 2 if unrelated"
    ),
    "pair_cosine": Curve(COLLAPSE, "cosine of positive pairs"),
    "positive_rank": Curve(
        COLLAPSE, "rank of the positive", "among all images of the batch; 1 is first"
    ),
    "positive_chance": Curve(
        COLLAPSE,
        "rank of the positive relative to chance",
        "1 means the two views of an image cannot be matched",
    ),
    "prototype_usage": Curve(
        COLLAPSE,
        "prototypes in use",
        "share of the prototypes that the measured images can reach",
        True,
    ),
    "prototype_entropy": Curve(
        COLLAPSE,
        "evenness of prototypes",
        "entropy of the assignments over its maximum; at 0 one prototype has all images",
    ),
    "feature_rank_centered": Curve(
        COLLAPSE, "effective rank of the features", "the backbone's output, centered"
    ),
    "alpha_req": Curve(
        COLLAPSE, "alpha-ReQ", "decay exponent of the features' spectrum; about 1 is best"
    ),
    "teacher_distance": Curve(
        NETWORK, "distance of teacher and student", "relative to the norm of the student"
    ),
    "gradient_norm": Curve(NETWORK, "gradient, all", "before clipping"),
    "images_per_second": Curve(SPEED, "images per second"),
    "seconds_per_step": Curve(SPEED, "seconds per step"),
    "data_wait": Curve(SPEED, "waiting for images", "share of the time, on the slowest rank", True),
    "straggler": Curve(SPEED, "slowest rank", "the rank that the others wait for"),
    "straggler_seconds": Curve(SPEED, "seconds spent waiting for the slowest rank"),
    "memory_gib": Curve(
        SPEED, "memory, GiB", "largest peak of any rank, on its GPU or on the host"
    ),
    "model_tflops": Curve(
        SPEED, "model TFLOP/s per rank", "forward, backward, and the teacher's forward"
    ),
    "flops_utilization": Curve(
        SPEED, "model FLOPs utilization", "share of the GPU's peak in bfloat16", True
    ),
}
AXES = ("step", "epoch", "evaluated_step")
PREFIXES = {"gradient_norm_": "gradient, ", "update_ratio_": "update over weights, "}

# Current names of metrics and files, by the names that earlier versions gave them.
RENAMED = {
    "alarms.jsonl": "alerts.jsonl",
    "neighbours": "neighbors",
    "neighbour_cosine": "neighbor_cosine",
}


def curve(key: str) -> Curve:
    """Return the group, title and description of a metric.

    Metrics that only one method has are in the group Learning, under their own names.
    """
    if key in CURVES:
        return CURVES[key]
    for prefix, title in PREFIXES.items():
        if key.startswith(prefix):
            return Curve(NETWORK, title + key.removeprefix(prefix))
    return Curve(LEARNING, key.replace("_", " "))


def display_name(key: str) -> str:
    """Return the name of a metric in W&B, ``Group/title``. Axes keep their names."""
    return key if key in AXES else "/".join(curve(key)[:2])


def evaluation(result: str, column: str) -> str:
    """Return the W&B name of a column in the result of an evaluation of pretrained features."""
    return f"{EVALUATION}/{result}, {column}"


def with_current_names(record: dict[str, Any]) -> dict[str, Any]:
    """Rename the metrics of a record that an earlier version wrote."""
    return {RENAMED.get(key, key): value for key, value in record.items()}


def existing_paths(run: Path, name: str) -> list[Path]:
    """Return the existing files of a run under this name and its earlier names, earlier first."""
    earlier_names = [old for old, new in RENAMED.items() if new == name]
    paths = [run / file_name for file_name in (*earlier_names, name)]
    return [path for path in paths if path.exists()]
