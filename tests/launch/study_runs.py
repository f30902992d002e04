"""Results of runs of a study that were never trained."""

import json
from pathlib import Path

from ssl_pretrain.eval import results, spectrum

CHECKPOINT = {"checkpoint": "step_00000007", "step": 7, "network": "student"}


def save_results(run: Path, accuracy: float, spectrum_number: float) -> None:
    """Save the files of a finished run.

    Args:
        run: Folder of the run.
        accuracy: Accuracy of the linear classifier and of k-NN.
        spectrum_number: Every number of the spectrum, and the effective rank during training.
    """
    for name, column in (("linear", "all labels"), ("knn", "clean")):
        accuracies = {"raw pixels": 90.0, results.BETTER_RANDOM: 80.0, "pretrained": accuracy}
        rows = [results.Row(features, {column: value}) for features, value in accuracies.items()]
        results.save(run, name, {}, rows, CHECKPOINT, 1.0)
    numbers = {
        f"{features}, {measure}": spectrum_number
        for features in ("embeddings", "features")
        for measure in ("top-5 of all", "rank", "variance")
    }
    rows = [
        results.Row("random, as built", dict.fromkeys(numbers, 20.0)),
        results.Row("pretrained", numbers),
    ]
    results.save(run, "spectrum", {}, rows, CHECKPOINT, 1.0)
    path = spectrum.eigenvalues_path(run, "spectrum", CHECKPOINT["checkpoint"])
    eigenvalues = [0.5, 0.01, 0.0001 * (spectrum_number - 29), 0.0]
    spectrum.save_eigenvalues(
        path,
        {
            (network, vectors): eigenvalues
            for network in ("random, as built", "pretrained")
            for vectors in ("embeddings", "features")
        },
    )
    records = [
        {
            "step": step,
            "epoch": step,
            "time": 60.0 * step,
            "rankme": spectrum_number,
            "knn": 0.1 * step,
        }
        for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
