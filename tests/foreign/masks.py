"""Compare the masks with those of the authors' generators, by two-sample Kolmogorov-Smirnov tests.

    AUTHORS_CODE=FOLDER PYTHONPATH=. python tests/foreign/masks.py

prints the table of docs/masks.md. FOLDER contains clones named mae, ijepa, ibot, dinov2, dinov3 and
capi. A statistic is the largest distance between the two distribution functions of a property. Two
samples of 20,000 from the same distribution differ by more than 0.0136 in 5 % of all cases.
"""

import importlib.util
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import torch

from ssl_pretrain.views import masks
from ssl_pretrain.views.mask_recipe import Mask
from ssl_pretrain.views.recipe import Crop, ViewsConfig

AUTHORS = Path(os.environ.get("AUTHORS_CODE", "."))
NUM_DRAWS = 20_000
SIDES = (14, 16)  # 224 pixels in patches of 16 and 14
BATCH = 500  # images per step of the samplers that spread the masked shares over a batch
LIMIT = 0.02

Grids = dict[str, np.ndarray]  # masks by name, bool (draws, masks per draw, side, side)


def import_file(name: str, path: str, *missing: str) -> ModuleType:
    """Import a file of the authors, with placeholders for packages that its masks do not need."""
    for package in missing:
        sys.modules.setdefault(package, MagicMock())
    spec = importlib.util.spec_from_file_location(name, AUTHORS / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_grids(indices: torch.Tensor, side: int) -> np.ndarray:
    """Return masks with equal numbers of patches, int64 (draws, masks, patches), as grids."""
    grid = torch.zeros(*indices.shape[:2], side * side, dtype=torch.bool)
    return grid.scatter_(2, indices, True).view(*indices.shape[:2], side, side).numpy()


def authors_mae(side: int) -> Grids:
    sys.path.insert(0, str(AUTHORS / "mae"))  # it imports its own package `util`
    draw = import_file("models_mae", "mae/models_mae.py").MaskedAutoencoderViT.random_masking
    _, removed, _ = draw(None, torch.zeros(NUM_DRAWS, side * side, 1), 0.75)
    return {"visible": (removed == 0).view(-1, 1, side, side).numpy()}


def build_ijepa_collator(side: int) -> Callable[[list[torch.Tensor]], tuple]:
    module = import_file("multiblock", "ijepa/src/masks/multiblock.py")
    module.logger.disabled = True
    return module.MaskCollator(
        input_size=(side, side),
        patch_size=1,
        pred_mask_scale=(0.15, 0.2),
        enc_mask_scale=(0.85, 1.0),
        aspect_ratio=(0.75, 1.5),
        nenc=1,
        npred=4,
        min_keep=10,
    )


def authors_ijepa(side: int) -> Grids:
    collate, contexts, targets = build_ijepa_collator(side), [], []
    for _ in range(NUM_DRAWS):
        _, context, target = collate([torch.zeros(1)])
        contexts.append(to_grids(torch.stack(context, 1), side))
        targets.append(to_grids(torch.stack(target, 1), side))
    return {"context": np.concatenate(contexts), "targets": np.concatenate(targets)}


def authors_ibot(side: int) -> Grids:
    dataset_type = import_file("ibot_loader", "ibot/loader.py").ImageFolderMask
    dataset = dataset_type.__new__(dataset_type)
    dataset.samples, dataset.loader, dataset.target_transform = [("", 0)], str, None
    dataset.transform = lambda _: [torch.zeros(3, side, side)]
    dataset.psz, dataset.pred_ratio, dataset.pred_ratio_var = 1, [0.0, 0.3], [0.0, 0.2]
    dataset.log_aspect_ratio, dataset.pred_shape = (math.log(0.3), -math.log(0.3)), "block"
    return {"masked": np.stack([np.stack(dataset[0][2]) for _ in range(NUM_DRAWS)])}


def authors_dino(version: str, side: int) -> Grids:
    folder = f"{version}/{version}/data"
    generator = import_file(f"masking_{version}", f"{folder}/masking.py").MaskingGenerator(
        input_size=(side, side), max_num_patches=0.5 * side * side
    )
    collate = import_file(f"collate_{version}", f"{folder}/collate.py").collate_data_and_cast
    crop = torch.zeros(1)
    samples = [({"global_crops": [crop, crop], "local_crops": [crop]}, None)] * BATCH
    grids = [
        collate(samples, (0.1, 0.5), 0.5, torch.float32, side * side, generator)["collated_masks"]
        for _ in range(NUM_DRAWS // BATCH)
    ]
    return {"masked": torch.cat(grids).view(-1, 1, side, side).numpy()}


def authors_capi(side: int) -> Grids:
    module = import_file(
        "capi_data", "capi/data.py", "datasets", "datasets.formatting", "jaxtyping"
    )
    draw, num_masked = module.InverseBlockMasking((side, side)), int(side * side * 0.65)
    return {"visible": ~np.stack([draw(num_masked)[None] for _ in range(NUM_DRAWS)])}


def draw_ours(mask: Mask, side: int, count: int = 1, batch: int = BATCH) -> Grids:
    """Draw the masks of NUM_DRAWS images in steps of `batch` images."""
    views = ViewsConfig({"global": Crop(count=count, size=side * mask.patch_size, mask=mask)})
    grids: dict[str, list[np.ndarray]] = {}
    for step in range(NUM_DRAWS // batch):
        mask_sets = masks.draw(
            views,
            masks.Position(
                seed=0,
                epoch=0,
                step=step,
                indices=np.arange(step * batch, (step + 1) * batch),
                first_slot=0,
                global_batch_size=batch,
            ),
        )
        for mask_set in mask_sets:
            every_mask = [
                mask_set.as_grid(side * side, k) for k in range(mask_set.indices.shape[1])
            ]
            stacked = torch.stack(every_mask, 1).view(batch, -1, side, side).numpy()
            grids.setdefault(mask_set.name, []).append(stacked)
    return {name: np.concatenate(parts) for name, parts in grids.items()}


def extents(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return height and width of the bounding box of each mask that is not empty."""
    flat = grids[grids.any((2, 3))]
    return tuple(
        lines.shape[1] - lines.argmax(1) - lines[:, ::-1].argmax(1)
        for lines in (flat.any(2), flat.any(1))
    )


def border_length(grids: np.ndarray) -> np.ndarray:
    """Return how many pairs of neighbors each mask separates. Few large blocks have few."""
    return (grids[..., 1:, :] != grids[..., :-1, :]).sum((1, 2, 3)) + (
        grids[..., 1:] != grids[..., :-1]
    ).sum((1, 2, 3))


def properties(name: str, grids: np.ndarray) -> dict[str, np.ndarray]:
    """Return samples of the properties of a set of masks."""
    height, width = extents(grids)
    rows, columns = (grids.sum((0, 1, axis)) for axis in (3, 2))
    samples = {
        "patches": grids[:, 0].sum((1, 2)),
        "height": height,
        "width": width,
        "height / width": height / width,
        "border": border_length(grids),
        "row": np.repeat(np.arange(len(rows)), rows),
        "column": np.repeat(np.arange(len(columns)), columns),
    }
    if name == "targets":
        counts = grids.sum(1)
        samples["overlap"] = np.maximum(counts - 1, 0).sum((1, 2))
    return samples


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest distance between the distribution functions of two samples."""
    values = np.unique(np.concatenate([a, b]))
    shares = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def compare_contexts(num_batches: int = 100) -> None:
    """Print the lengths of I-JEPA's contexts, and the share of their patches in the upper half."""
    print("| grid | contexts | patches: mean, smallest, largest | in the upper half |")
    print("|---|---|---|---:|")
    for side in SIDES:
        torch.manual_seed(side)
        for batch in (128, 256):
            collate = build_ijepa_collator(side)
            contexts = [collate([torch.zeros(1)] * batch)[1][0] for _ in range(num_batches)]
            lengths = [indices.shape[1] for indices in contexts]
            upper = np.mean([(indices < side // 2 * side).float().mean() for indices in contexts])
            label = f"the authors', {batch} images per rank"
            numbers = f"{np.mean(lengths):.1f}, {min(lengths)}, {max(lengths)}"
            print(f"| {side} x {side} | {label} | {numbers} | {100 * upper:.0f} % |")
        for label, options in (
            ("uncut", {"context_patches": side**2}),
            ("here, `context_trim: first`", {}),
            ("here, `context_trim: random`", {"context_trim": "random"}),
        ):
            grids = draw_ours(Mask("multiblock", **options), side, batch=100)["context"]
            lengths = grids.sum((1, 2, 3))
            upper = grids[:, :, : side // 2].sum() / grids.sum()
            numbers = f"{lengths.mean():.1f}, {lengths.min()}, {lengths.max()}"
            print(f"| {side} x {side} | {label} | {numbers} | {100 * upper:.0f} % |")


GENERATORS: dict[str, tuple[Callable[[int], Grids], Callable[[int], Grids]]] = {
    "MAE": (authors_mae, lambda side: draw_ours(Mask("random"), side)),
    "I-JEPA": (
        authors_ijepa,
        lambda side: draw_ours(Mask("multiblock", context_patches=side**2), side, batch=1),
    ),
    "iBOT": (
        authors_ibot,
        lambda side: draw_ours(Mask("blocks", block_sampler="ibot", min_patches=0), side),
    ),
    "DINOv2": (
        lambda side: authors_dino("dinov2", side),
        lambda side: draw_ours(Mask("blocks"), side, count=2),
    ),
    "DINOv3": (
        lambda side: authors_dino("dinov3", side),
        lambda side: draw_ours(Mask("blocks", block_sampler="dinov3"), side, count=2),
    ),
    "CAPI": (authors_capi, lambda side: draw_ours(Mask("inverse_block", ratio=0.65), side)),
}
COLUMNS = ("patches", "height", "width", "height / width", "border", "overlap", "row", "column")


def main() -> None:
    """Print the table, and exit with an error if a distance is above the limit."""
    largest = 0.0
    print(f"| masks | grid | patches per mask: authors, here | {' | '.join(COLUMNS)} |")
    print("|---|---|---|" + "---:|" * len(COLUMNS))
    for generator, (draw_authors, draw_here) in GENERATORS.items():
        for side in SIDES:
            random.seed(side)
            np.random.seed(side)
            torch.manual_seed(side)
            authors, ours = draw_authors(side), draw_here(side)
            for name in authors:
                theirs, here = (properties(name, grids[name]) for grids in (authors, ours))
                distances = {key: distance(theirs[key], here[key]) for key in theirs}
                largest = max(largest, *distances.values())
                means = ", ".join(f"{x['patches'].mean():.2f}" for x in (theirs, here))
                cells = [f"{distances[key]:.4f}" if key in distances else "" for key in COLUMNS]
                label = f"{generator}, {name}"
                print(f"| {label} | {side} x {side} | {means} | {' | '.join(cells)} |", flush=True)
    print(f"\nlargest distance: {largest:.4f}\n")
    compare_contexts()
    sys.exit(largest > LIMIT)


if __name__ == "__main__":
    main()
