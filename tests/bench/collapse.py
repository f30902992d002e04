"""Runs made to collapse, and healthy ones, on digits: when does the alarm ring, and when has the run collapsed?

PYTHONPATH=. .venv/bin/python tests/bench/collapse.py [--cases byol_without_predictor vicreg ...] [--steps 1000] [--output runs/collapse]
PYTHONPATH=. .venv/bin/python tests/bench/collapse.py --draw docs/results/health    # tables and pictures of the runs that are there

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

from ssl_pretrain import config, methods, train
from ssl_pretrain.monitoring import collapse
from ssl_pretrain.monitoring.collapse_alerts import Alarms

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
    "byol_without_predictor": ["method.name=byol", "method.without_predictor=true"],
    "simsiam_without_stop_gradient": ["method.name=simsiam", "method.without_stop_gradient=true"],
    "vicreg_without_variance": ["method.name=vicreg", "method.variance_weight=0"],
    "vicreg_invariance_alone": [
        "method.name=vicreg",
        "method.variance_weight=0",
        "method.covariance_weight=0",
    ],
}
HEALTHY = [name for name in methods.names() if name not in ("cpc",)]
ORACLE_EVERY = 10
CHANCE = 0.1


class Watched(collapse.Monitor):
    """The monitor, and beside it the oracle, which writes oracle.jsonl."""

    folder: Path

    def __init__(self, settings, method, optimizer, *arguments, **named):
        super().__init__(settings, method, optimizer, *arguments, **named)
        from sklearn.datasets import load_digits

        images, self.labels = load_digits(return_X_y=True)
        pixels = torch.from_numpy(images.reshape(-1, 1, 8, 8) / 16).float()
        self.pixels = torch.nn.functional.interpolate(pixels, 16, mode="bilinear").expand(
            -1, 3, -1, -1
        )

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
        return {
            "knn": judge.score(unit[1297:], self.labels[1297:]),
            "rank": ranks[0],
            "rank_centered": ranks[1],
            "dim": z.shape[1],
        }


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
    overrides = [
        *COLLAPSING.get(case, []),
        *(f"method.{key}={value}" for key, value in small.items()),
        f"output={folder}",
    ]
    overrides += [
        override
        for override in getattr(methods.find(name), "PRESET", [])
        if override.startswith("method.")
    ]
    if name == "moco":
        overrides += ["parallel.bn_group_images=32"]
    if name in ("moco", "nnclr"):
        overrides += ["method.queue_size=1024"]
    Watched.folder = folder
    (folder / "oracle.jsonl").unlink(missing_ok=True)
    train.health.Monitor = Watched
    train.train(config.load(folder / "run.yaml", overrides), torch.device("cpu"), steps)


def alarms_of(records: list[dict[str, float]]) -> list[tuple[int, str]]:
    """What would have rung at the default interval, from records that have a measurement every 10 steps."""
    judge, every = Alarms([]), collapse.HealthConfig().every_steps
    due = [record for record in records if record["step"] % every == 0]
    return [
        (record["step"], alarm.title)
        for record in due
        for alarm in judge.judge(record["step"], record)
    ]


def read(folder: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    return tuple(
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "oracle.jsonl")
    )


def draw(output: Path, pictures: Path) -> None:
    """A line of a table and a picture for each run that is there."""
    print(
        "| run | steps | k-NN, first and last | effective rank / dim, first and last | collapsed from step | alarm at step |"
    )
    print("|---|---|---|---|---|---|")
    for case in [*COLLAPSING, *HEALTHY]:
        if not (output / case / "oracle.jsonl").exists():
            continue
        records, entries = read(output / case)
        rung, at, ends = alarms_of(records), collapsed_at(entries), (entries[0], entries[-1])
        knn = " to ".join(f"{100 * entry['knn']:.0f} %" for entry in ends)
        rank = " to ".join(f"{entry['rank']:.1f}" for entry in ends)
        said = ", ".join(f"{step} ({title})" for step, title in rung) or "none"
        print(
            f"| {case.replace('_', ' ')} | {entries[-1]['step']} | {knn} | {rank} / {entries[0]['dim']} | {at or 'never'} | {said} |"
        )
        if case in COLLAPSING:
            picture(case, records, entries, rung, at, pictures / f"{case}.png")


def picture(case, records, entries, rung, at, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3), layout="constrained", dpi=80)
    shown = [record for record in records if "rank_share" in record]
    steps = [record["step"] for record in shown]
    axes[0].plot(
        [record["step"] for record in records],
        [record["loss"] for record in records],
        color="#63686e",
    )
    axes[0].set_title("loss")
    for key, label, colour in (
        ("embedding_std", "spread", "#1f5fa8"),
        ("embedding_scale", "deviation before normalization", "#b07aa1"),
        ("rank_share", "rank share", "#c9762b"),
        ("positive_chance", "positive over chance", "#8a8a8a"),
    ):  # fmt: skip
        axes[1].plot(steps, [record.get(key) for record in shown], color=colour, label=label)
    axes[1].set_title("what the monitor sees")
    axes[1].set_ylim(0, 1.25)
    axes[1].legend(fontsize=7)
    axes[2].plot(
        [entry["step"] for entry in entries],
        [entry["knn"] for entry in entries],
        color="#2f8f5b",
        label="k-NN",
    )
    axes[2].plot(
        [entry["step"] for entry in entries],
        [entry["rank"] / entry["dim"] for entry in entries],
        color="#c8443c",
        label="rank / dim",
    )
    axes[2].set_title("what the oracle sees")
    axes[2].set_ylim(0, 1)
    axes[2].legend(fontsize=8)
    for ax in axes:
        ax.set_xlabel("step")
        for step, _ in rung[:1]:
            ax.axvline(step, color="#c8443c", linestyle="--", linewidth=1)
        if at is not None:
            ax.axvline(at, color="black", linewidth=1)
    figure.suptitle(
        f"{case.replace('_', ' ')}: alarm (dashed) at {rung[0][0] if rung else 'none'}, collapsed (solid) {f'from {at}' if at else 'never'}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[*COLLAPSING, *HEALTHY],
        choices=[*COLLAPSING, *HEALTHY],
        metavar="CASE",
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("runs/collapse"))
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="FOLDER",
        help="train nothing: print the table, and put the pictures there",
    )
    options = parser.parse_args()
    if options.draw is not None:
        draw(options.output, options.draw)
        return
    torch.set_num_threads(1)
    for case in options.cases:
        run(case, options.output, options.steps)


if __name__ == "__main__":
    main()
