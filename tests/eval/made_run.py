"""A run folder made by hand: real config, real checkpoint, untrained weights of another seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_pretrain import config, rng
from ssl_pretrain.build import build_method
from ssl_pretrain.checkpoint.checkpoints import Checkpoints
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.checkpoint.manifest import MANIFEST, describe_files, to_json
from ssl_pretrain.checkpoint.run_facts import RunFacts
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.optim import optimizers as optim

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["backbone.stem=imagenet", "method.projector_dims=[16,8]", "data.num_workers=0"]


def make_run(folder: Path, *overrides: str, step: int = 7, weights_seed: int = 1) -> Path:
    """A run of configs/simclr_digits.yaml whose checkpoint holds the weights that `weights_seed` gives; the config says seed 0."""
    written = config.load(
        REPOSITORY / "configs/simclr_digits.yaml", [*TINY, f"output={folder}", "seed=0", *overrides]
    )
    seeded = config.load(
        REPOSITORY / "configs/simclr_digits.yaml", [*TINY, *overrides, f"seed={weights_seed}"]
    )
    method = build_method(seeded)
    Checkpoints(
        folder,
        TrainingState(method, optim.build(written.optim, method)),
        written.checkpoint,
        RunFacts(last_step=1000, micro_batch_size=written.global_batch_size, data=""),
        config.to_dict(written),
        steps_per_epoch=5,
    ).save(step)
    (folder / "config.yaml").write_text(config.to_yaml(written))
    return folder


def checkpoint_of(run: Path) -> Path:
    return list_checkpoints(run)[-1]


def edit_manifest(run: Path, **entries: object) -> None:
    path = checkpoint_of(run) / MANIFEST
    manifest = json.loads(path.read_text())
    for dotted, value in entries.items():
        *sections, key = dotted.split("__")
        place = manifest
        for section in sections:
            place = place[section]
        place[key] = value
    path.write_text(to_json(manifest))


def describe_again(run: Path) -> None:
    """Make the newest checkpoint whole again after its tensors were changed."""
    folder = checkpoint_of(run)
    edit_manifest(run, files=describe_files(sorted(folder.glob("*.safetensors"))))


def write_images(root: Path, names: list[str], size: int = 12) -> Path:
    """One random image for each name below `root`."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.uniform(0, 0, number, 0, rng.Purpose.CROP, size * size * 3).reshape(
            size, size, 3
        )
        Image.fromarray((pixels * 255).astype(np.uint8)).save(path)
    return root
