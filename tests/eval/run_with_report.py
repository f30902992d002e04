"""A run with everything that a report shows: metrics, alerts, pictures, new and old results."""

import json
from pathlib import Path

import torch
from torchvision.utils import save_image
from untrained_run import make_run

from ssl_pretrain.eval import report, results, runs
from ssl_pretrain.eval.results import Row

CHECKPOINT = {"checkpoint": "step_00000007", "step": 7, "network": "student"}
PROTOCOL = {
    "network": "n",
    "images": "digits: 1297 training, 500 test images, 10 classes",
    "k": 20,
    "temperature": 0.07,
}


def write_metrics(run, num_steps=40):
    """Write one record per step, k-NN every five steps, and a truncated line at the end."""
    lines = []
    for step in range(1, num_steps + 1):
        record = {"step": step, "epoch": step / 5, "loss": 10 / step, "lr": 0.1}
        record |= {"images_per_second": 100 + step, "time": 1000.0 + step}
        if step % 5 == 0:
            record["knn"] = step / 100
        lines.append(json.dumps(record))
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 41, "loss": NaN, "epo']) + "\n")


def write_monitors(run):
    """Write the files of the monitors at steps 5 and 40, and an evaluation of step 3."""
    alert = {"title": "collapse", "text": "moved <together>", "time": 1.0}
    (run / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    spectrum = {"spectrum_index": [1, 2, 4], "spectrum": [1.0, 0.1, 0.01]}
    curves = spectrum | {"deviations": [0.5, 1.0]}
    lines = [json.dumps({"step": step, "epoch": step / 5} | curves) + "\n" for step in (5, 40)]
    (run / "plots.jsonl").write_text("".join(lines))
    (run / "neighbors").mkdir()
    for step in (5, 40):
        save_image(torch.rand(3, 30, 40), run / "neighbors" / f"step_{step:08d}.png")
    earlier = json.loads((run / "eval" / "knn.json").read_text()) | {"step": 3}
    (run / "eval" / "step_00000003").mkdir()
    (run / "eval" / "step_00000003" / "knn.json").write_text(json.dumps(earlier))
    (run / "views.json").write_text(json.dumps([["10x10 pixels at (0, 0), flipped", "gray"]] * 8))


def save_results(run, columns=("clean", "shifted 1", "shifted 2")):
    rows = [
        Row(name, dict.fromkeys(columns, 50.0 + i))
        for i, name in enumerate(["raw pixels", "random, as built", "pretrained"])
    ]
    protocol = PROTOCOL | {"shifts": "by four"}
    results.save(run, "knn", protocol, results.with_better_random_row(rows), CHECKPOINT, 1.0)
    rows = [Row(row.features, {"1 per class": 30.0}, {"1 per class": 2.5}) for row in rows]
    protocol = PROTOCOL | {"few labels": "ten draws"}
    results.save(run, "linear", protocol, results.with_better_random_row(rows), CHECKPOINT, 1.0)


def make_run_with_report(run: Path) -> Path:
    make_run(run)
    write_metrics(run)
    save_results(run)
    write_monitors(run)
    save_image(torch.rand(3, 2 + 8 * 18, 2 + 2 * 18), run / "views.png")
    report.write(runs.load_run(run, device="cpu"))
    return run
