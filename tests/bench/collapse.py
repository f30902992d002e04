"""Compare when the collapse alert is raised with when the run collapses, on digits.

PYTHONPATH=. .venv/bin/python tests/bench/collapse.py [--cases byol_without_predictor vicreg ...]
    [--steps 1000] [--output runs/health]
PYTHONPATH=. .venv/bin/python tests/bench/collapse.py --draw docs/results/health

The second command prints a table of the finished runs and draws them. An oracle that shares no code
with the monitor defines collapse: the k-NN accuracy of the backbone's features (scikit-learn) is
within 2 points of chance, or the effective rank of the embeddings (numpy's SVD) is under 2 % of
their dimension. A run collapses at the first step from which the oracle reports a collapse until
the end.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from ssl_pretrain import build, config, methods, train
from ssl_pretrain.monitoring import records
from ssl_pretrain.monitoring.collapse import CollapseMonitor, HealthConfig
from ssl_pretrain.monitoring.collapse_alerts import AlertHistory

Entry = dict[str, float]

YAML = """
method: {{name: {method}}}
backbone: {{name: test_resnet}}
data: {{source: digits, num_workers: 0}}
views:
  crops:
    global: {{count: 2, size: 16, scale: [0.3, 1.0], flip: 0.0, jitter: 0.8, brightness: 0.4,
             contrast: 0.4}}
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
    "lejepa_without_sigreg": ["method.name=lejepa", "method.sigreg_weight=0"],
}
COLLAPSING["vicreg_invariance_alone"] = [
    *COLLAPSING["vicreg_without_variance"],
    "method.covariance_weight=0",
]
HEALTHY = [
    name for name in methods.image_methods() if name not in ("cpc", "ijepa", "mae")
]  # two views
ORACLE_STEPS = 10  # steps between two measurements by the oracle
CHANCE = 0.1  # accuracy of guessing among ten digits
NUM_TRAIN = 1297  # digits that the oracle's k-NN is fitted to
CURVES = (
    ("embedding_std", "spread", "#1f5fa8"),
    ("embedding_scale", "deviation before normalization", "#b07aa1"),
    ("rank_share", "relative effective rank", "#c9762b"),
    ("positive_chance", "positive relative to chance", "#8a8a8a"),
)


class MonitorWithOracle(CollapseMonitor):
    """Collapse monitor that also runs the oracle and writes oracle.jsonl."""

    folder: Path

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        images, self.labels = load_digits(return_X_y=True)
        pixels = torch.from_numpy(images.reshape(-1, 1, 8, 8) / 16).float()
        pixels = torch.nn.functional.interpolate(pixels, 16, mode="bilinear")
        self.pixels = pixels.expand(-1, 3, -1, -1)

    def measure(self, step, embeddings, targets):
        if step % ORACLE_STEPS == 0:
            with (self.folder / "oracle.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **self.run_oracle(embeddings)}) + "\n")
        return super().measure(step, embeddings, targets)

    @torch.no_grad()
    def run_oracle(self, embeddings):
        backbone = self.method.get_submodule(self.method.evaluated_module)
        training = backbone.training
        features = backbone.eval()(self.pixels).numpy()
        backbone.train(training)
        unit_features = features / np.maximum(
            np.linalg.norm(features, axis=1, keepdims=True), 1e-12
        )
        classifier = KNeighborsClassifier(20).fit(
            unit_features[:NUM_TRAIN], self.labels[:NUM_TRAIN]
        )
        name = next(name for name in ("z_a", "queries", "p_a", "z") if name in embeddings)
        z = (embeddings["z"][:, 0] if name == "z" else embeddings[name]).double().numpy()
        return {
            "knn": classifier.score(unit_features[NUM_TRAIN:], self.labels[NUM_TRAIN:]),
            "rank": effective_rank(z),
            "rank_centered": effective_rank(z - z.mean(0)),
            "dim": z.shape[1],
        }


def effective_rank(z: np.ndarray) -> float:
    values = np.linalg.svd(z, compute_uv=False)
    shares = values[values > 0] / max(values.sum(), 1e-300)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def is_collapsed(entry: Entry) -> bool:
    return entry["knn"] <= CHANCE + 0.02 or entry["rank"] < 0.02 * entry["dim"]


def find_collapse_step(entries: list[Entry]) -> int | None:
    """Return the first step from which the oracle reports a collapse at every entry."""
    healthy_indices = [index for index, entry in enumerate(entries) if not is_collapsed(entry)]
    first_index = healthy_indices[-1] + 1 if healthy_indices else 0
    return int(entries[first_index]["step"]) if first_index < len(entries) else None


def train_case(case: str, output: Path, num_steps: int) -> None:
    folder = output / case
    folder.mkdir(parents=True, exist_ok=True)
    name = COLLAPSING[case][0].partition("=")[2] if case in COLLAPSING else case
    (folder / "run.yaml").write_text(YAML.format(method=name))
    method = methods.find(name)
    overrides = [
        *COLLAPSING.get(case, []),
        *(f"method.{key}={value}" for key, value in method.SMALL_CONFIG.items()),
        f"output={folder}",
        *(key for key in getattr(method, "PRESET_OVERRIDES", []) if key.startswith("method.")),
    ]
    if name == "moco":
        overrides.append("parallel.bn_group_images=32")
    if name in ("moco", "nnclr"):
        overrides.append("method.queue_size=1024")
    MonitorWithOracle.folder = folder
    (folder / "oracle.jsonl").unlink(missing_ok=True)
    build.CollapseMonitor = MonitorWithOracle
    train.train(config.load(folder / "run.yaml", overrides), torch.device("cpu"), num_steps)


def find_alerts(entries: list[Entry]) -> list[tuple[int, str]]:
    """Return the alerts at the default interval, given records with measurements every 10 steps."""
    history, every_steps = AlertHistory([]), HealthConfig().every_steps
    return [
        (entry["step"], alert.title)
        for entry in entries
        if entry["step"] % every_steps == 0
        for alert in history.update(entry["step"], entry)
    ]


def draw(output: Path, figures: Path) -> None:
    """Print a table of the finished runs and plot those that collapse."""
    columns = ["run", "steps", "k-NN, first and last", "effective rank / dim, first and last"]
    columns += ["collapsed from step", "alert at step"]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for case in [*COLLAPSING, *HEALTHY]:
        folder, name = output / case, case.replace("_", " ")
        if not (folder / "oracle.jsonl").exists():
            continue
        metrics = records.read(folder / "metrics.jsonl")
        entries = records.read(folder / "oracle.jsonl")
        alerts, collapse_step = find_alerts(metrics), find_collapse_step(entries)
        knn = " to ".join(f"{100 * entry['knn']:.0f} %" for entry in (entries[0], entries[-1]))
        rank = " to ".join(f"{entry['rank']:.1f}" for entry in (entries[0], entries[-1]))
        titles = ", ".join(f"{step} ({title})" for step, title in alerts) or "none"
        last_step, dim = entries[-1]["step"], entries[0]["dim"]
        print(
            f"| {name} | {last_step} | {knn} | {rank} / {dim} | {collapse_step or 'never'} "
            f"| {titles} |"
        )
        if case in COLLAPSING:
            alert_step = alerts[0][0] if alerts else None
            path = figures / f"{case}.png"
            plot(name, metrics, entries, alert_step, collapse_step, path)


def plot(
    name: str,
    metrics: list[Entry],
    entries: list[Entry],
    alert_step: int | None,
    collapse_step: int | None,
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axes, monitor_axes, oracle_axes) = pyplot.subplots(
        1, 3, figsize=(11, 3.6), layout="constrained", dpi=80
    )
    steps = [record["step"] for record in metrics]
    loss_axes.plot(steps, [record["loss"] for record in metrics], color="#63686e")
    loss_axes.set_title("loss")
    measurements = [record for record in metrics if "rank_share" in record]
    steps = [record["step"] for record in measurements]
    for key, label, color in CURVES:
        monitor_axes.plot(
            steps, [record.get(key) for record in measurements], color=color, label=label
        )
    monitor_axes.set_title("metrics of the monitor")
    monitor_axes.set_ylim(0, 1.25)
    steps = [entry["step"] for entry in entries]
    oracle_axes.plot(steps, [entry["knn"] for entry in entries], color="#2f8f5b", label="k-NN")
    ranks = [entry["rank"] / entry["dim"] for entry in entries]
    oracle_axes.plot(steps, ranks, color="#c8443c", label="rank / dim")
    oracle_axes.set_title("the oracle")
    oracle_axes.set_ylim(0, 1)
    for axes in (monitor_axes, oracle_axes):
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for axes in (loss_axes, monitor_axes, oracle_axes):
        axes.set_xlabel("step")
        if alert_step is not None:
            axes.axvline(alert_step, color="#c8443c", linestyle="--", linewidth=1)
        if collapse_step is not None:
            axes.axvline(collapse_step, color="black", linewidth=1)
    alert_text = "no alert" if alert_step is None else f"first alert at step {alert_step} (dashed)"
    collapse_text = (
        "the oracle reports no collapse"
        if collapse_step is None
        else f"collapsed from step {collapse_step} (solid)"
    )
    figure.suptitle(f"{name}: {alert_text}, {collapse_text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = [*COLLAPSING, *HEALTHY]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases, metavar="CASE")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("runs/health"))
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="FOLDER",
        help="print the table and draw the figures into FOLDER, without training",
    )
    options = parser.parse_args()
    if options.draw is not None:
        draw(options.output, options.draw)
        return
    torch.set_num_threads(1)
    for case in options.cases:
        train_case(case, options.output, options.steps)


if __name__ == "__main__":
    main()
