"""Spectrum of a run's embeddings (the projector's output) and features.

Both are computed for training images in evaluation views. Three numbers describe the covariance of
the vectors scaled to length 1. The top-5 share is the sum of the 5 largest
eigenvalues as a percentage of the sum of all eigenvalues. It is near 100 for a representation that
has collapsed into a few directions. The effective rank is the exponential of the entropy of the
normalized eigenvalues. The variance is the sum of all eigenvalues as a percentage of its maximum.
It is 100 for vectors that fill the sphere evenly and 0 for a single point. RankMe and LiDAR are
the ranks of the papers that are named below the table. No labels are needed.
The result is printed and saved to RUN/eval/spectrum.json. All eigenvalues are in
RUN/eval/CHECKPOINT/spectrum_eigenvalues.csv.

    python -m ssl_pretrain.eval.spectrum runs/demo
"""

import csv
import io
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssl_pretrain import config
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import command_line, results, run_method, training_views
from ssl_pretrain.eval.frozen import features, named_features, view_rank
from ssl_pretrain.eval.frozen.evaluation_split import BATCH_SIZE, EvaluationSplit, open_images
from ssl_pretrain.eval.runs import Run, prepare_for_evaluation
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.monitoring.collapse_metrics import effective_rank, singular_values
from ssl_pretrain.schema import NON_NEGATIVE_INT, POSITIVE_INT
from ssl_pretrain.system import durable_files

NUM_TOP = 5  # number of largest eigenvalues in the top-5 share
MAX_IMAGES = 10000  # training images to embed
OPTIONS: dict[str, dict[str, Any]] = {
    **named_features.OPTION,
    "--lidar-images": {
        "type": POSITIVE_INT,
        "default": view_rank.NUM_IMAGES,
        "metavar": "N",
        "help": f"images of LiDAR (default: {view_rank.NUM_IMAGES})",
    },
    "--lidar-views": {
        "type": NON_NEGATIVE_INT,
        "default": view_rank.NUM_VIEWS,
        "metavar": "N",
        "help": (
            f"training views per image of LiDAR (default: {view_rank.NUM_VIEWS}; 0 leaves it out)"
        ),
    },
}

# Eigenvalues in descending order, by row of the result and by "embeddings" or "features".
Eigenvalues = dict[tuple[str, str], list[float]]


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.spectrum", __doc__, OPTIONS),
        arguments,
        lambda run, options: evaluate(
            run, options.feature, options.lidar_images, options.lidar_views
        ),
    )


@torch.no_grad()
def evaluate(
    run: Run,
    feature: str = named_features.POOLED,
    lidar_images: int = view_rank.NUM_IMAGES,
    lidar_views: int = view_rank.NUM_VIEWS,
) -> dict[str, Any]:
    """Measure the random and the pretrained network and save RUN/eval/spectrum.json.

    Args:
        run: Run to evaluate.
        feature: Name of the backbone's feature, see `named_features`. The projector's input is
            always the pooled one.
        lidar_images: Number of training images for LiDAR.
        lidar_views: Number of training views of each, at least 2, or 0 to leave LiDAR out.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the method has no projector, the backbone does not have the feature, or there
            is a single view.
    """
    start = time.monotonic()
    if lidar_views == 1:
        raise ValueError(
            "--lidar-views 1: one view does not show how views differ; give at least 2, or 0 to "
            "leave LiDAR out"
        )
    named_features.network_of_feature(run.backbone, feature)  # refuses before anything is computed
    source = open_images(run, "train")
    split = EvaluationSplit(run, source).random_subset(MAX_IMAGES)
    rows: list[results.Row] = []
    eigenvalues: Eigenvalues = {}
    for name in ("random, as built", "pretrained"):
        backbone, projector = build_backbone_and_projector(run, is_pretrained=name == "pretrained")
        pooled_features, _ = features.extract(backbone, split)
        embeddings = torch.cat([projector(batch) for batch in pooled_features.split(BATCH_SIZE)])
        values = pooled_features
        if feature != named_features.POOLED:
            values, _ = features.extract(named_features.Feature(backbone, feature), split)
        metrics: dict[str, float] = {}
        for vectors, matrix in (("embeddings", embeddings), ("features", values)):
            spectrum = covariance_spectrum(matrix)
            eigenvalues[name, vectors] = spectrum.tolist()
            metrics |= spectrum_metrics(vectors, matrix, spectrum)
        if lidar_views:
            metrics |= _lidar_metrics(
                split.random_subset(lidar_images), backbone, projector, feature, lidar_views
            )
        rows.append(results.Row(name, metrics))
    origin = "output of the backbone" if feature == named_features.POOLED else feature
    protocol = {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.backbone.name};"
        " the random network has its initial weights",
        "embeddings": f"output of the projector, {embeddings.shape[1]} dimensions; features:"
        f" {origin}, {values.shape[1]} dimensions",
        "precision": run.describe_precision(),
        "mode": "evaluation mode, in which batch norm uses its running statistics",
        "normalization": "vectors scaled to length 1, then centered",
        "measure": f"top-{NUM_TOP}: sum of the {NUM_TOP} largest eigenvalues of the covariance, in"
        " percent of the sum of all; rank: exponential of the entropy of the normalized"
        " eigenvalues; variance: sum of all eigenvalues, in percent of its maximum",
        "RankMe": "exponential of the entropy of the singular values of the vectors, neither scaled"
        " nor centered (arXiv:2210.02885)",
        "images": f"{run.config.data.source}: {len(split)} training images in evaluation views",
    }
    if lidar_views:
        view = training_views.describe_train_view(view_rank.view_of_run(split))
        num_images = view_rank.num_measured(min(lidar_images, len(split)))
        protocol["LiDAR"] = (
            f"{num_images} images, {lidar_views} training views each (first kind of view: {view};"
            f" the run's colors), delta {view_rank.DELTA:g} (arXiv:2312.04000)"
        )
    name, provenance = f"spectrum{results.suffix_of_feature(feature)}", run.provenance()
    if process_group.is_main():
        save_eigenvalues(eigenvalues_path(run.path, name, provenance["checkpoint"]), eigenvalues)
    return results.save(
        run.path,
        name,
        protocol,
        rows,
        provenance,
        time.monotonic() - start,
        measure=results.measure_of_feature("spectrum", feature),
    )


def _lidar_metrics(
    images: EvaluationSplit,
    backbone: nn.Module,
    projector: nn.Module,
    feature: str,
    num_views: int,
) -> dict[str, float]:
    """Return LiDAR of the embeddings and of the features."""
    run, network = images.run, cast(Backbone, backbone)

    def embed(views: Tensor) -> Tensor:
        pooled = features.compute(run, backbone, views)
        values = pooled
        if feature != named_features.POOLED:
            values = features.compute(run, named_features.Feature(backbone, feature), views)
        return torch.cat([projector(pooled), values], dim=1)

    both = view_rank.embed_views(images, embed, num_views)
    dim = projector(torch.zeros(2, network.feature_dim, device=run.device)).shape[1]
    return {
        "embeddings, LiDAR": view_rank.lidar(both[..., :dim]),
        "features, LiDAR": view_rank.lidar(both[..., dim:]),
    }


def build_backbone_and_projector(run: Run, is_pretrained: bool) -> tuple[nn.Module, nn.Module]:
    """Return the student's backbone and projector in evaluation mode.

    The projector was trained on the student's backbone, so this is the student even if the other
    evaluations use the teacher.

    Args:
        run: Run to evaluate.
        is_pretrained: True for the weights of the checkpoint, False for the initial weights.

    Raises:
        ValueError: If the method has no projector, or the weights do not match it.
    """
    if run.config.method.name == config.NO_METHOD:
        raise ValueError(
            f"{run.checkpoint_path}: this evaluation measures the projector's output, and weights"
            " without a run have no projector; use eval.knn or eval.linear"
        )
    method = run_method.build_method(run, is_pretrained, run.config.backbone)
    if not hasattr(method, "projector"):
        raise ValueError(
            f"{run.path}: this evaluation measures the projector's output, and method"
            f" {run.config.method.name} has no projector; use eval.knn or eval.linear"
        )
    projector = method.get_submodule("projector").eval().to(run.device)
    return prepare_for_evaluation(method.backbone, run.device), projector


def spectrum_metrics(
    name: str, vectors: Tensor, eigenvalues: Tensor | None = None
) -> dict[str, float]:
    """Return the top-5 share, the effective rank, the variance and RankMe of vectors (n, dim).

    Args:
        name: Name of the vectors, with which the columns begin.
        vectors: The vectors.
        eigenvalues: Their `covariance_spectrum`, if it is known.
    """
    if eigenvalues is None:
        eigenvalues = covariance_spectrum(vectors)
    total = eigenvalues.sum()
    shares = eigenvalues / total.clamp(min=1e-30)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum()
    return {
        f"{name}, top-{NUM_TOP} of all": 100 * shares[:NUM_TOP].sum().item(),
        f"{name}, rank": torch.exp(entropy).item(),
        f"{name}, variance": 100 * total.item(),
        f"{name}, RankMe": effective_rank(singular_values(vectors)).item(),
    }


def covariance_spectrum(vectors: Tensor) -> Tensor:
    """Return the eigenvalues of the covariance of vectors (n, dim) scaled to length 1.

    The result is float64, shape (dim,), in descending order.
    """
    directions = nn.functional.normalize(vectors.double(), dim=1)
    centered = directions - directions.mean(dim=0)
    return torch.linalg.eigvalsh(centered.T @ centered / len(centered)).clamp(min=0).flip(0)


def eigenvalues_path(run: Path, name: str, checkpoint: str) -> Path:
    """Return the path of the file with the eigenvalues of a result.

    Args:
        run: Folder of the run.
        name: Name of the result, such as spectrum.
        checkpoint: Name of the checkpoint.
    """
    return run / "eval" / checkpoint / f"{name}_eigenvalues.csv"


def save_eigenvalues(path: Path, eigenvalues: Eigenvalues) -> None:
    """Write eigenvalues as a CSV file with one line per eigenvalue."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["network", "vectors", "index", "eigenvalue"])
    for (network, vectors), values in eigenvalues.items():
        for index, value in enumerate(values, start=1):
            writer.writerow([network, vectors, index, f"{value:.9g}"])
    path.parent.mkdir(parents=True, exist_ok=True)
    durable_files.replace(path, content.getvalue())


def read_eigenvalues(path: Path) -> Eigenvalues:
    """Read a file that `save_eigenvalues` wrote. The result is empty if the file is missing."""
    eigenvalues: Eigenvalues = {}
    if path.is_file():
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                key = (line["network"], line["vectors"])
                eigenvalues.setdefault(key, []).append(float(line["eigenvalue"]))
    return eigenvalues


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.spectrum")
