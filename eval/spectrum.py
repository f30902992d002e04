"""Spectrum of a run's embeddings (the projector's output) and features.

The vectors of training images in their evaluation views are scaled to length 1. Three numbers
describe their covariance. The share of the 5 largest eigenvalues in the sum of all, in percent, is
near 100 for a representation that collapsed into a few directions. The effective rank is the
exponential of the entropy of the eigenvalues' shares. The variance is the sum in percent: 100 for
vectors that fill the sphere evenly, 0 for a single point. No labels are needed. The result is
printed and saved to RUN/eval/spectrum.json.

    python -m ssl_pretrain.eval.spectrum runs/demo
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain import config, rng
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import BATCH_SIZE, EvaluationSplit
from ssl_pretrain.eval.runs import Run, to_device
from ssl_pretrain.models import backbones

NUM_TOP = 5  # number of eigenvalues whose share is measured
MAX_IMAGES = 10000


def main(arguments: list[str]) -> None:
    """Run the command line."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.spectrum", __doc__, {}),
        arguments,
        lambda run, _: evaluate(run),
    )


@torch.no_grad()
def evaluate(run: Run) -> dict[str, Any]:
    """Measure the spectra of a random and the pretrained network for RUN/eval/spectrum.json.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the method has no projector.
    """
    began = time.monotonic()
    source = open_source(run.config.data, "train")
    images = EvaluationSplit(run, source).random_subset(MAX_IMAGES)
    rows = []
    for name in ("random, as built", "pretrained"):
        backbone, projector = backbone_and_projector(run, trained=name == "pretrained")
        pooled, _ = features.extract(backbone, images)
        embeddings = torch.cat([projector(chunk) for chunk in pooled.split(BATCH_SIZE)])
        metrics = spectrum_metrics("embeddings", embeddings) | spectrum_metrics("features", pooled)
        rows.append(results.Row(name, metrics))
    protocol = {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.backbone.name};"
        " random: before its first step",
        "embeddings": f"projector's output, {embeddings.shape[1]} numbers; features: the"
        f" backbone's, {pooled.shape[1]}",
        "mode": "evaluation: batch norm with its running statistics",
        "normalization": "vectors scaled to length 1, then centered",
        "measure": f"top-{NUM_TOP}: share of the {NUM_TOP} largest eigenvalues of the covariance in"
        " the sum of all, in percent; rank: exp(entropy); variance: that sum, in percent of its"
        " maximum",
        "images": f"{run.config.data.source}: {len(images)} training images in evaluation views",
    }
    return results.save(
        run.path,
        "spectrum",
        protocol,
        rows,
        run.provenance(),
        time.monotonic() - began,
        measure="spectrum",
    )


def backbone_and_projector(run: Run, trained: bool) -> tuple[nn.Module, nn.Module]:
    """Return the student's backbone and projector in evaluation mode.

    The projector was trained on the student's backbone, so the student is returned even if other
    evaluations use the teacher.

    Args:
        run: Run to evaluate.
        trained: Load the weights of the checkpoint. Otherwise the weights are those before the
            first step.

    Raises:
        ValueError: If the method has no projector, or the weights do not fit.
    """
    if run.config.method.name == config.NO_METHOD:
        raise ValueError(
            f"{run.checkpoint_path}: weights without a run have no projector, whose output this"
            " evaluation measures; see eval.knn and eval.linear"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(run.config.seed, 0, 0))  # the trainer's seed
        method = run.config.method.build(backbones.build(run.config.backbone, run.view_size))
    if not hasattr(method, "projector"):
        raise ValueError(
            f"{run.path}: method {run.config.method.name} has no projector, whose output this"
            " evaluation measures; see eval.knn and eval.linear"
        )
    if trained:
        _, tensors = read_checkpoint(run.checkpoint_path)
        backbones.load_strict(method, tensors, str(run.checkpoint_path), exact=True)
    projector = method.get_submodule("projector").eval().to(run.device)
    return to_device(method.backbone, run.device), projector


def spectrum_metrics(name: str, vectors: Tensor) -> dict[str, float]:
    """Return share of the top eigenvalues, effective rank and variance of (n, dim) vectors."""
    eigenvalues = spectrum(vectors)
    total = eigenvalues.sum()
    shares = eigenvalues / total.clamp(min=1e-30)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum()
    return {
        f"{name}, top-{NUM_TOP} of all": 100 * shares[:NUM_TOP].sum().item(),
        f"{name}, rank": torch.exp(entropy).item(),
        f"{name}, variance": 100 * total.item(),
    }


def spectrum(vectors: Tensor) -> Tensor:
    """Return the eigenvalues of the covariance of vectors (n, dim) scaled to length 1.

    They are float64 (dim,), largest first.
    """
    unit = nn.functional.normalize(vectors.double(), dim=1)
    centered = unit - unit.mean(dim=0)
    return torch.linalg.eigvalsh(centered.T @ centered / len(centered)).clamp(min=0).flip(0)


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.spectrum")
