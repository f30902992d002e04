"""A run of SimCSE that takes seconds: pairs of sentences, whose second texts repeat some words."""

from pathlib import Path

import yaml

from ssl_pretrain import train
from ssl_pretrain.eval.trained_run import TrainedRun, load_sentence_run

WORDS = ("red", "green", "blue", "black", "white", "small", "big", "old", "new", "warm", "cold")
NOUNS = ("cat", "dog", "car", "house", "tree", "boat", "lamp", "road")
SETTINGS = {
    "method": {"name": "simcse", "texts": "pairs", "projector": "none"},
    "data": {"source": "texts", "num_workers": 0},
    "text": {"length": 12},
    "text_encoder": {"name": "bert", "width": 16, "layers": 1, "heads": 2, "pool": "mean"},
    "optim": {"name": "adamw", "base_lr": 0.003, "lr_scaling": "none", "warmup_epochs": 0},
    "parallel": {"threads": 1, "precision": "float32"},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 50, "wandb": "off"},
    "global_batch_size": 44,
    "epochs": 2,
    "seed": 3,
}


def write_pairs(folder: Path) -> Path:
    """Write train.tsv and dev.tsv with a description and a sentence about the same thing."""
    folder.mkdir(parents=True)
    pairs = [
        (f"a {word} {noun}", f"the {noun} is {word} today") for word in WORDS for noun in NOUNS
    ]
    for name, rows in (("train", pairs[::2]), ("dev", pairs[1::2])):
        lines = "".join(f"{first}\t{second}\n" for first, second in (("sent0", "sent1"), *rows))
        (folder / f"{name}.tsv").write_text(lines)
    return folder


def train_run(folder: Path, *overrides: str) -> TrainedRun:
    """Train on the pairs and open the run on the CPU.

    Args:
        folder: Folder of the texts and of the run.
        overrides: key=value settings.
    """
    root, output, path = folder / "texts", folder / "run", folder / "sentences.yaml"
    if not root.exists():
        write_pairs(root)
    path.write_text(yaml.safe_dump(SETTINGS))
    paths = [f"data.root={root}", f"data.cache_dir={folder / 'cache'}", f"output={output}"]
    assert train.main([str(path), *paths, *overrides]) == 0
    return load_sentence_run(output, device="cpu")
