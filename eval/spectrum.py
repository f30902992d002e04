"""How many directions a run's embeddings use: `python -m ssl_pretrain.eval.spectrum RUN`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import config, rng
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.eval import results, runs
from ssl_pretrain.eval.frozen import evaluation_split, features
from ssl_pretrain.eval.results import Row
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models import backbones

TOP = 5  # eigenvalues
MAX_IMAGES = 10000
HELP = f"""The spectrum of a run's embeddings (the projector's output) and of its features, on training images in their evaluation views.

Of the covariance of vectors scaled to length 1: the share in percent that the {TOP} largest eigenvalues have of the sum of all,
which is near 100 when a representation has collapsed into a few directions; the effective rank, exp of the entropy of the
eigenvalues' shares; and the sum itself, 100 where vectors fill the sphere evenly, 0 where all are one point. No
labels are needed. The numbers and their protocol are printed and kept in RUN/eval/spectrum.json.

    python -m ssl_pretrain.eval.spectrum runs/demo"""


def main(arguments: list[str]) -> None:
    options = runs.parser("ssl_pretrain.eval.spectrum", HELP).parse_intermixed_args(arguments)
    run = runs.load_run(options.run, options.checkpoint, options.overrides, options.device)
    result = evaluate(run)
    print(
        f"\n{results.text(result)}\n\n{result['seconds']:.0f} s; kept in {run.path / 'eval/spectrum.json'}"
    )


def evaluate(run: Run) -> dict[str, Any]:
    """Top share and effective rank of features and embeddings, random and pretrained; see HELP. Kept in RUN/eval/spectrum.json.

    Raises:
        ValueError: the method has no projector.
    """
    began = time.monotonic()
    source = evaluation_split.open_source(run.config.data, "train")
    images = evaluation_split.Part(
        run, source, rng.permutation(0, 0, len(source), rng.Purpose.SUBSET)[:MAX_IMAGES]
    )
    rows = []
    for name, backbone, projector in (
        ("random, as built", *networks(run, trained=False)),
        ("pretrained", *networks(run, trained=True)),
    ):
        found, _ = features.extract(backbone, images)
        with torch.no_grad():
            embedded = torch.cat(
                [projector(chunk) for chunk in found.split(evaluation_split.BATCH)]
            )
        rows.append(Row(name, measures("embeddings", embedded) | measures("features", found)))
    protocol = {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.backbone.name}; random: before its first step",
        "embeddings": f"projector's output, {embedded.shape[1]} numbers; features: the backbone's, {found.shape[1]}",
        "mode": "evaluation: batch norm with its running statistics",
        "normalization": "vectors scaled to length 1, then centred",
        "measure": f"top-{TOP}: share of the {TOP} largest eigenvalues of the covariance in all, in percent; rank: exp(entropy); "
        "variance: that sum, in percent of the most there can be",
        "images": f"{run.config.data.source}: {len(images)} training images in evaluation views",
    }
    return results.save(
        run.path, "spectrum", protocol, rows, run.about(), time.monotonic() - began, "spectrum"
    )


def networks(run: Run, trained: bool) -> tuple[nn.Module, nn.Module]:
    """(backbone, projector) in evaluation mode: the checkpoint's, or those of the run's first step.

    Raises:
        ValueError: the method has no projector, or its weights do not fit.
    """
    if run.config.method.name == config.NO_METHOD:
        raise ValueError(
            f"{run.checkpoint_path}: weights without a run have no projector, whose output this measures; see eval.knn, eval.linear"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(run.config.seed, 0, 0))  # as the trainer does
        method = run.config.method.build(backbones.build(run.config.backbone, run.view_size))
    if not hasattr(method, "projector"):
        raise ValueError(
            f"{run.path}: method {run.config.method.name} has no projector, whose output this measures; see eval.knn, eval.linear"
        )
    if trained:
        _, tensors = read_checkpoint(run.checkpoint_path)
        backbones.load_strict(method, tensors, str(run.checkpoint_path), exact=True)
    # the student's heads on the student's backbone, whatever network the other evaluations judge
    return runs.place(method.backbone, run.device), method.get_submodule("projector").eval().to(
        run.device
    )


def measures(name: str, vectors: Tensor) -> dict[str, float]:
    """{"<name>, top-5 of all": percent, "<name>, rank": effective rank, "<name>, variance": percent} of (n, dim) vectors."""
    eigenvalues = spectrum(vectors)
    total = eigenvalues.sum()
    shares = eigenvalues / total.clamp(min=1e-30)
    rank = torch.exp(-(shares * shares.clamp(min=1e-30).log()).sum())
    share = 100 * shares[:TOP].sum().item()
    return {
        f"{name}, top-{TOP} of all": share,
        f"{name}, rank": rank.item(),
        f"{name}, variance": 100 * total.item(),
    }


def spectrum(vectors: Tensor) -> Tensor:
    """Eigenvalues, largest first, float64 (dim,), of the covariance of the vectors (n, dim) scaled to length 1."""
    unit = F.normalize(vectors.double(), dim=1)
    centred = unit - unit.mean(dim=0)
    return torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp(min=0).flip(0)


if __name__ == "__main__":
    results.command(main, "ssl_pretrain.eval.spectrum")
