"""Every YAML in configs/ resumes bit for bit, with its own optimizer, precision and views.

Each run is the command `python -m ssl_pretrain.train`, on 1 and on 3 ranks.
`reduce_recipe` makes a recipe small enough for that.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
import yaml
from omegaconf import OmegaConf
from suites import quick_and_full

from ssl_pretrain import methods
from ssl_pretrain.data.config import TEXT_SOURCES
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel.execution import ParallelConfig

pytestmark = pytest.mark.promise

CONFIGS = Path(__file__).parents[1] / "configs"
BATCH = 24
STEPS = 3, 5  # steps before and after the stop
# Keys of methods that are widths of layers.
WIDTHS = (
    "projector_dims",
    "hidden_dim",
    "dim",
    "bottleneck_dim",
    "predictor_dim",
    "decoder_dim",
    "context_dim",
    "num_prototypes",
)


def list_recipes() -> dict[str, tuple[Path, list[str]]]:
    """Return the file and overrides of each recipe in configs/ and each run in configs/sweeps/."""
    files = sorted(CONFIGS.glob("*.yaml"))
    recipes: dict[str, tuple[Path, list[str]]] = {path.stem: (path, []) for path in files}
    for path in sorted((CONFIGS / "sweeps").glob("*.yaml")):
        study = yaml.safe_load(path.read_text())
        for run in study["runs"]:
            if "base" in run:  # a recipe that is tested already, as shipped
                continue
            overrides = study.get("set", []) + run["set"]
            recipes[f"{path.stem}: {run['name']}"] = (CONFIGS.parent / study["base"], overrides)
    return recipes


def reduce_recipe(path: Path, folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Write a small version of a recipe into the folder and return its path.

    The rules are the same for all recipes:

    - Data: 78 images of 3 classes in a folder, unless the recipe uses the digits.
    - CPU: one thread per rank, which also loads the images, because tests share the cores.
    - Network: timm's smallest ResNet, or a ViT of 2 blocks and 24 dimensions, with the recipe's
      arguments. No layer of a head is wider than 32.
    - Image size: global views have 32 pixels at most, others 16. Patches shrink by the same factor.
      Views with masks have 8 x 8 patches.
    - Texts: the names of the classes, or 78 sentences, pairs or triplets in a file. Their
      transformer has 2 blocks and 32 dimensions. A random BERT stands in for networks of the Hub.
    - Weights: random.
    - Batch: 24 images, 3 steps per epoch. Batch norm groups smaller than the batch have 8 images.
    - Length: at least 3 epochs.
    - Queue: 48 embeddings. Online k-NN: at most 20 neighbors.
    - Warm-up, queue, frozen prototypes and the like start or end after at most 2 epochs or steps,
      which is within the 8 steps of a test.

    Every other key keeps the recipe's value or its default. Nothing is sent to W&B.
    """
    recipe = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    values: Any = OmegaConf.to_container(recipe)
    defaults = asdict(methods.find(values["method"]["name"]).Config())
    method = values["method"] = defaults | values["method"]
    data = values["data"]
    if data["source"] in TEXT_SOURCES:
        num_texts = methods.find(method["name"]).Config(**method).num_texts
        path_of_texts = tiny.write_texts(folder / "texts.csv", num_texts)
        data |= {"source": "texts", "root": str(path_of_texts), "text_columns": []}
    elif data["source"] != "digits":
        data |= {"source": "folder", "root": str(tiny.write_images(folder / "images")), "subset": 0}
    data |= {"cache_dir": str(folder / "cache"), "num_workers": 0}
    if "text" in values:
        _reduce_texts(values)
    shrink = _reduce_images(values) if "views" in values else 1
    for name in method:
        if name in WIDTHS:
            method[name] = _clip(method[name], 32)
        elif name.endswith(("_steps", "_epoch")):
            method[name] = _clip(method[name], 2)
        elif name in ("patch_size", "stride"):
            method[name] //= shrink
        elif name == "predictor_heads":
            method[name] = 4
    if method.get("queue_size"):
        method["queue_size"] = 48
    parallel = values.setdefault("parallel", {})
    parallel["threads"] = 1
    if isinstance(parallel.get("bn_group_images"), int):
        parallel["bn_group_images"] = 8
    values["epochs"] = max(3, values["epochs"])  # 9 steps
    values["optim"]["warmup_epochs"] = min(1, values["optim"]["warmup_epochs"])
    online = values.setdefault("online", {})
    online["k"] = min(20, online.get("k", 20))
    values.setdefault("log", {})["wandb"] = "off"
    file = folder / path.name
    file.write_text(yaml.safe_dump(values | {"global_batch_size": BATCH}, sort_keys=False))
    return file


def _reduce_texts(values: dict[str, Any]) -> None:
    text, encoder = values["text"], values["text_encoder"]
    text |= {"tokenizer": "clip", "length": min(text["length"], 16)}
    if "views" in values:
        text["captions"] = "class_names"
    encoder |= {"width": 32, "layers": 2, "heads": 2}
    if encoder.get("name", "clip") != "clip":
        encoder["name"] = "bert"


def _reduce_images(values: dict[str, Any]) -> int:
    """Shrink the views, the masks and the network, and return the factor of the views' size."""
    masks = [crop["mask"] for crop in values["views"]["crops"].values() if "mask" in crop]
    for mask in masks:
        mask |= {"patch_size": 4, "min_keep": 5, "context_patches": 0}
    backbone = values["backbone"]
    backbone["init"] = "random"  # nothing is downloaded
    if backbone["name"].startswith("vit"):
        size = {"depth": 2, "embed_dim": 24, "patch_size": 4 if masks else 8}
        backbone |= {"name": "test_vit", "args": {"num_heads": 6} | backbone.get("args", {}) | size}
    else:
        backbone["name"] = "test_resnet"
    crops = list(values["views"]["crops"].values())
    global_size = crops[0]["size"]
    shrink = max(1, global_size // 32)
    for crop in crops if shrink > 1 else []:
        crop |= {"size": 32 if crop["size"] == global_size else 16, "blur_kernel": 3}
    return shrink


def _clip(value: Any, limit: int) -> Any:
    return [min(entry, limit) for entry in value] if isinstance(value, list) else min(value, limit)


def choose_representatives() -> set[str]:
    """Return the first recipe of each optimizer and memory format."""
    first_names: dict[tuple[str, bool], str] = {}
    for name, (path, _) in list_recipes().items():
        values = yaml.safe_load(path.read_text())
        optimizer = values["optim"].get("name", OptimConfig.name)
        channels_last = values.get("parallel", {}).get(
            "channels_last", ParallelConfig.channels_last
        )
        first_names.setdefault((optimizer, channels_last), name)
    return set(first_names.values())


def differing_tensors(run: Path, reference: Path, ignore: str = "nothing") -> list[str]:
    """Return the names of the tensors, optimizer state included, whose bits differ in two runs.

    Names that contain `ignore` are left out.
    """
    tensors, reference_tensors = ranks.load_tensors(run), ranks.load_tensors(reference)
    assert tensors.keys() == reference_tensors.keys()
    assert any("::" in name for name in tensors), "the checkpoint lacks the optimizer's state"
    return [
        name
        for name, value in reference_tensors.items()
        if not torch.equal(tensors[name], value) and ignore not in name
    ]


def train_for(steps: int, path: Path, *arguments: str, size: int, fault: str = "") -> str:
    """Run the train command on `size` ranks for some steps and return its output."""
    stop = ("--stop-after", str(steps))
    statuses, output = ranks.run(path, *arguments, *stop, size=size, fault=fault)
    assert statuses == [0] * size, output
    return output


def assert_resumes(
    path: Path, folder: Path, steps: tuple[int, int], overrides: list[str], size: int
) -> None:
    """Compare an uninterrupted run with one that was stopped after `steps[0]` steps and resumed."""
    uninterrupted, stopped = folder / "uninterrupted", folder / "stopped"
    train_for(sum(steps), path, *overrides, f"output={uninterrupted}", size=size)
    for num_steps in steps:
        output = train_for(num_steps, path, *overrides, f"output={stopped}", size=size)
    assert f"resumed {stopped} after step {steps[0]}" in output
    assert differing_tensors(stopped, uninterrupted) == []


QUICK = choose_representatives()


def resume_cases() -> list:
    """Return every recipe on one and on three ranks.

    `make test` runs the representatives once, those of ImageNet on three ranks. The other cases are
    in the long suite.
    """
    cases = [(name, size) for name in list_recipes() for size in (1, 3)]
    return quick_and_full([(name, 3 if name.endswith("_imagenet") else 1) for name in QUICK], cases)


@pytest.mark.parametrize(("name", "size"), resume_cases())
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name, size, tmp_path):
    path, overrides = list_recipes()[name]
    assert_resumes(reduce_recipe(path, tmp_path, overrides), tmp_path, STEPS, [], size)


DIGITS = ["epochs=5", "online.knn_every_epochs=0", "log.wandb=off"]
OPTIMIZERS = {
    "sgd": ["optim.name=sgd", "optim.base_lr=0.1"],
    "lars": ["optim.name=lars", "optim.base_lr=1.0"],
    "adamw": [],
}
SIZES = {1: [], 3: ["global_batch_size=255"]}


@pytest.mark.full
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_demo_resumed_after_14_steps_has_the_same_bits_after_20(optimizer, size, tmp_path):
    """configs/simclr_digits.yaml is not reduced, except in epochs and evaluations."""
    overrides = DIGITS + OPTIMIZERS[optimizer] + SIZES[size]
    assert_resumes(CONFIGS / "simclr_digits.yaml", tmp_path, (14, 6), overrides, size)


ROLLBACK_CASES = quick_and_full([("sgd", 1)], itertools.product(OPTIMIZERS, SIZES))


@pytest.mark.parametrize(("optimizer", "size"), ROLLBACK_CASES)
def test_a_rollback_equals_a_skipped_step_bit_for_bit(optimizer, size, tmp_path):
    """Step 15 has NaN images. One run skips the step, the other rolls back to step 14."""
    overrides = [
        *DIGITS,
        *OPTIMIZERS[optimizer],
        *SIZES[size],
        "checkpoint.every_epochs=2.8",  # step 14, at 5 steps per epoch
        "log.every_steps=1",
    ]
    output = {}
    for kind, limit in (("skipped", 10), ("rolled back", 1)):
        path = tmp_path / kind / "digits.yaml"
        path.parent.mkdir()
        path.write_text((CONFIGS / "simclr_digits.yaml").read_text())
        run_overrides = [f"guard.max_skipped_steps={limit}", f"output={path.parent / 'run'}"]
        output[kind] = train_for(20, path, *overrides, *run_overrides, size=size, fault="nan@0:15")
    assert "Weights and optimizer were restored from step_00000014" in output["rolled back"]
    assert "were restored from" not in output["skipped"]
    # Only batch norm's counters differ, by the skipped batch. No computation uses them.
    rolled_back, skipped = tmp_path / "rolled back" / "run", tmp_path / "skipped" / "run"
    assert differing_tensors(rolled_back, skipped, ignore="num_batches_tracked") == []
