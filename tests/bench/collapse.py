"""Runs made to collapse, and healthy ones, on digits: when does the alarm ring, and when has the run collapsed?

PYTHONPATH=. .venv/bin/python tests/bench/collapse.py [--cases byol_without_predictor vicreg ...] [--steps 1000] [--output runs/collapse]

Collapse is defined by an oracle that shares no code with the monitor: scikit-learn's k-NN of the backbone's features within
2 points of chance, or the effective rank of the embeddings, by numpy's decomposition, under 2 % of their dimension. The run has
collapsed at the first step from which on the oracle says so to the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from ssl_pretrain import config, health, methods, train

YAML = """
method: {{name: {method}}}
backbone: {{name: test_resnet}}
data: {{source: digits, num_workers: 0}}
views: {{crops: {{global: {{count: 2, size: 16, scale: [0.3, 1.0], flip: 0.0, jitter: 0.8, brightness: 0.4, contrast: 0.4}}}}}}
optim: {{name: adamw, base_lr: 0.002, lr_scaling: none, weight_decay: 0.0001, warmup_epochs: 5}}
parallel: {{threads: 1}}
log: {{every_steps: 10, wandb: "off"}}
online: {{knn_every_epochs: 0}}
checkpoint: {{every_epochs: 0}}
global_batch_size: 64
health: {{every_steps: 10}}
epochs: 50
"""
COLLAPSING = {
    "byol_without_predictor": ["method.name=byol", "method.predictor=false"],
    "simsiam_without_stop_gradient": ["method.name=simsiam", "method.stop_gradient=false"],
    "vicreg_without_variance": ["method.name=vicreg", "method.variance_weight=0"],
    "vicreg_invariance_alone": ["method.name=vicreg", "method.variance_weight=0", "method.covariance_weight=0"],
}
HEALTHY = [name for name in methods.names() if name not in ("cpc",)]
ORACLE_EVERY = 10
CHANCE = 0.1


class Watched(health.Monitor):
    """The monitor, and beside it the oracle, which writes oracle.jsonl."""

    folder: Path

    def __init__(self, settings, method, optimizer, *arguments, **named):
        super().__init__(settings, method, optimizer, *arguments, **named)
        from sklearn.datasets import load_digits

        images, self.labels = load_digits(return_X_y=True)
        pixels = torch.from_numpy(images.reshape(-1, 1, 8, 8) / 16).float()
        self.pixels = torch.nn.functional.interpolate(pixels, 16, mode="bilinear").expand(-1, 3, -1, -1)

    def at(self, step, embeddings):
        if step % ORACLE_EVERY == 0:
            with (self.folder / "oracle.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **self.oracle(embeddings)}) + "\n")
        return super().at(step, embeddings)

    @torch.no_grad()
    def oracle(self, embeddings):
        backbone = self.method.get_submodule(self.method.evaluated)
        training = backbone.training
        features = backbone.eval()(self.pixels).numpy()
        backbone.train(training)
        unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        judge = KNeighborsClassifier(20).fit(unit[:1297], self.labels[:1297])
        name = next(name for name in ("z_a", "queries", "p_a") if name in embeddings)
        z = embeddings[name].double().numpy()
        ranks = [effective_rank(z), effective_rank(z - z.mean(0))]
        return {"knn": judge.score(unit[1297:], self.labels[1297:]), "rank": ranks[0], "rank_centered": ranks[1], "dim": z.shape[1]}


def effective_rank(z: np.ndarray) -> float:
    values = np.linalg.svd(z, compute_uv=False)
    share = values[values > 0] / max(values.sum(), 1e-300)
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


def collapsed(entry: dict[str, float]) -> bool:
    return entry["knn"] <= CHANCE + 0.02 or entry["rank"] < 0.02 * entry["dim"]


def collapsed_at(entries: list[dict[str, float]]) -> int | None:
    """The first step from which on every entry is collapsed."""
    alive = [number for number, entry in enumerate(entries) if not collapsed(entry)]
    first = alive[-1] + 1 if alive else 0
    return int(entries[first]["step"]) if first < len(entries) else None


def run(case: str, output: Path, steps: int) -> None:
    folder = output / case
    folder.mkdir(parents=True, exist_ok=True)
    name = COLLAPSING[case][0].partition("=")[2] if case in COLLAPSING else case
    (folder / "run.yaml").write_text(YAML.format(method=name))
    small = methods.find(name).SMALL
    overrides = [*COLLAPSING.get(case, []), *(f"method.{key}={value}" for key, value in small.items()), f"output={folder}"]
    overrides += [override for override in getattr(methods.find(name), "PRESET", []) if override.startswith("method.")]
    if name == "moco":
        overrides += ["parallel.bn_group_images=32"]
    if name in ("moco", "nnclr"):
        overrides += ["method.queue_size=1024"]
    Watched.folder = folder
    (folder / "oracle.jsonl").unlink(missing_ok=True)
    train.health.Monitor = Watched
    train.train(config.load(folder / "run.yaml", overrides), torch.device("cpu"), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*COLLAPSING, *HEALTHY], choices=[*COLLAPSING, *HEALTHY], metavar="CASE")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("runs/collapse"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in options.cases:
        run(case, options.output, options.steps)


if __name__ == "__main__":
    main()
