"""A run folder without training: a real config and checkpoint with weights of another seed."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_pretrain import config, rng
from ssl_pretrain.build import build_method
from ssl_pretrain.checkpoint.checkpoints import Checkpoints, RunFacts
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.checkpoint.manifest import MANIFEST_FILE, describe_files, to_json
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.eval.runs import Run, load_run
from ssl_pretrain.optim import optimizers as optim

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["backbone.stem=imagenet", "method.projector_dims=[16,8]", "data.num_workers=0"]


def make_run(folder: Path, *overrides: str, step: int = 7, weights_seed: int = 1) -> Path:
    """Write a run of configs/simclr_digits.yaml and return its folder.

    The checkpoint holds the weights that `weights_seed` gives. The config says seed 0.
    """
    file, values = REPOSITORY / "configs/simclr_digits.yaml", [*TINY, *overrides]
    run_config = config.load(file, [*TINY, f"output={folder}", "seed=0", *overrides])
    method = build_method(config.load(file, [*values, f"seed={weights_seed}"]))
    Checkpoints(
        folder,
        TrainingState(method, optim.build(run_config.optim, method)),
        run_config.checkpoint,
        RunFacts(last_step=1000, micro_batch_size=run_config.global_batch_size, data=""),
        config.to_dict(run_config),
        steps_per_epoch=5,
    ).save(step)
    (folder / "config.yaml").write_text(config.to_yaml(run_config))
    return folder


def load_in_float32(folder: Path) -> Run:
    """Load a run to evaluate it on the CPU in float32, for comparisons with small tolerances."""
    return load_run(folder, overrides=["parallel.precision=float32"], device="cpu")


def checkpoint_of(run: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return list_checkpoints(run)[-1]


def edit_manifest(run: Path, **entries: object) -> None:
    """Change entries of the newest manifest. Two underscores separate section and key."""
    path = checkpoint_of(run) / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    for key_path, value in entries.items():
        *sections, key = key_path.split("__")
        section = manifest
        for name in sections:
            section = section[name]
        section[key] = value
    path.write_text(to_json(manifest))


def renew_manifest(run: Path) -> None:
    """Update the checksums of the newest checkpoint after its tensors were changed."""
    folder = checkpoint_of(run)
    edit_manifest(run, files=describe_files(sorted(folder.glob("*.safetensors"))))


def write_images(root: Path, names: list[str], size: int = 12) -> Path:
    """Write one random image per name below `root` and return `root`."""
    shape = size, size, 3
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.uniform(0, 0, number, 0, rng.Purpose.CROP, size * size * 3).reshape(shape)
        Image.fromarray((pixels * 255).astype(np.uint8)).save(path)
    return root
