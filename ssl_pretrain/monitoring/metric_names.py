"""Every number of metrics.jsonl, named for people: its group, its title, what it means. W&B, the dashboard and the report share it."""

from __future__ import annotations

from typing import NamedTuple


class Curve(NamedTuple):
    group: str
    title: str
    about: str = ""
    percent: bool = False  # a share in [0, 1], shown times 100


LEARNING, COLLAPSE, NETWORK, SPEED, EVALUATION = (
    "Learning",
    "Collapse",
    "Network",
    "Speed",
    "Evaluation",
)
GROUPS = (LEARNING, COLLAPSE, EVALUATION, NETWORK, SPEED)
CURVES = {
    "loss": Curve(
        LEARNING, "loss", "what is minimized; it may fall while the representation collapses"
    ),
    "knn": Curve(
        LEARNING,
        "k-NN accuracy",
        "of frozen features, on training images held out of the bank",
        percent=True,
    ),
    "probe": Curve(
        LEARNING, "linear accuracy", "of the same features, on the same images", percent=True
    ),
    "lr": Curve(LEARNING, "learning rate"),
    "weight_decay": Curve(LEARNING, "weight decay"),
    "skipped_steps": Curve(
        LEARNING, "skipped steps", "whose gradient was not finite, since the record before"
    ),
    "replaced_images": Curve(
        LEARNING, "replaced images", "which could not be read, since the record before"
    ),
    "replay_error": Curve(
        LEARNING, "replay error", "largest difference between the two passes over a part"
    ),
    "rankme": Curve(
        COLLAPSE, "RankMe", "effective rank of the embeddings, uncentred; 1 is collapsed"
    ),
    "effective_rank_centered": Curve(
        COLLAPSE, "effective rank, centred", "of what differs between images"
    ),
    "rank_share": Curve(
        COLLAPSE,
        "effective rank over the most possible",
        "centred, over min(images - 1, dimension)",
    ),
    "top5_ratio": Curve(
        COLLAPSE,
        "variance in five directions",
        "share of the covariance's first five eigenvalues",
        percent=True,
    ),
    "embedding_std": Curve(
        COLLAPSE,
        "spread",
        "deviation of unit-length embeddings times sqrt(dim): 1 is uniform, 0 collapsed",
    ),
    "embedding_std_min": Curve(COLLAPSE, "spread of the flattest dimension"),
    "embedding_scale": Curve(
        COLLAPSE,
        "deviation before normalization",
        "mean over dimensions; toward 0 the embeddings shrink to a point",
    ),
    "uniformity": Curve(COLLAPSE, "uniformity", "0 is collapsed, -4 the best"),
    "alignment": Curve(
        COLLAPSE, "alignment", "squared distance of two views of an image: 0 the same, 2 unrelated"
    ),
    "pair_cosine": Curve(COLLAPSE, "cosine of positive pairs"),
    "positive_rank": Curve(
        COLLAPSE, "rank of the positive", "among all images of the batch: 1 is first"
    ),
    "positive_chance": Curve(
        COLLAPSE,
        "rank of the positive over chance's",
        "1: an image's other view cannot be told from others'",
    ),
    "prototype_usage": Curve(
        COLLAPSE,
        "prototypes in use",
        "over the most that the measured images can reach",
        percent=True,
    ),
    "prototype_entropy": Curve(
        COLLAPSE,
        "evenness of prototypes",
        "entropy of the assignments over the most possible: 0 is one for all",
    ),
    "feature_rank_centered": Curve(
        COLLAPSE, "effective rank of the features", "of the backbone's output, centred"
    ),
    "alpha_req": Curve(COLLAPSE, "alpha-ReQ", "decay of the features' spectrum; about 1 is best"),
    "teacher_distance": Curve(NETWORK, "teacher from student", "over the student's size"),
    "gradient_norm": Curve(NETWORK, "gradient, all", "before clipping"),
    "images_per_second": Curve(SPEED, "images per second"),
    "seconds_per_step": Curve(SPEED, "seconds a step"),
    "data_wait": Curve(
        SPEED, "waiting for images", "share of the time, of the slowest rank", percent=True
    ),
    "straggler": Curve(SPEED, "slowest rank", "which the others wait for where a step begins"),
    "straggler_seconds": Curve(SPEED, "seconds waited for it"),
    "memory_gib": Curve(
        SPEED, "memory, GiB", "most that a rank held: of its GPU, or of the host's"
    ),
    "model_tflops": Curve(
        SPEED, "model TFLOP/s of a rank", "forward, twice that backward, and the teacher's forward"
    ),
    "flops_utilization": Curve(
        SPEED, "model FLOPs utilization", "of the GPU's peak in bfloat16", percent=True
    ),
}
AXES = ("step", "epoch", "evaluated_step")
PREFIXES = {"gradient_norm_": "gradient, ", "update_ratio_": "update over weights, "}


def of(key: str) -> Curve:
    """The curve of a key; a method's own terms are of the group Learning, under their own names."""
    if key in CURVES:
        return CURVES[key]
    for prefix, title in PREFIXES.items():
        if key.startswith(prefix):
            return Curve(NETWORK, title + key.removeprefix(prefix))
    return Curve(LEARNING, key.replace("_", " "))


def name(key: str) -> str:
    """What W&B calls it: Group/title; the axes keep their names."""
    return key if key in AXES else "/".join(of(key)[:2])


def evaluation(result: str, column: str) -> str:
    """What W&B calls the accuracy of the pretrained features in one column of an evaluation."""
    return f"{EVALUATION}/{result}, {column}"
