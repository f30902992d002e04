"""Compare the views of SimCLR's and BYOL's recipes with their authors' functions.

    PYTHONPATH=. python tests/bench/authors_views.py --data imagenet_sample.zip

It prints the three tables of docs/departures.md:

1. Differences of each operation from the authors' (tests/views/authors.py) on the same images and
   random numbers, in gray levels of 255. One column is for torchvision's functions, which a crop
   uses by default, and one for the options of the two recipes.
2. Statistics of whole views: the luminance of the outermost 2 pixels over that of the whole view,
   and the detail, which is the mean absolute Laplacian of the luminance in [0, 1].
3. The mean area of a crop over the image's, and the Kolmogorov-Smirnov distance of the distribution
   of areas from the authors', over 100,000 boxes.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "views"))
import authors
from measure import DATA_FOLDER

from ssl_pretrain.config import load
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views import color, color_parameters, color_torch, crops, recipe
from ssl_pretrain.views.color_parameters import ColorParameters, draw_colors
from ssl_pretrain.views.crops import Box
from ssl_pretrain.views.recipe import Crop, blur_taps

ROOT = Path(__file__).resolve().parents[2]
TORCHVISION = {
    "contrast_mean": "gray",
    "saturation_mode": "blend",
    "blur_border": "reflect",
    "antialias": True,
    "crop_sampler": "torchvision",
}
TENSORFLOW = {
    "contrast_mean": "channel",
    "saturation_mode": "hsv",
    "blur_border": "zero",
    "antialias": False,
}
NO_NORMALIZATION = ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])  # mean 0, standard deviation 1
BORDER = 11  # width in pixels of the border where a blur of 23 taps reads beyond the edge
FRAME = 2  # width in pixels of the frame that a blur over black padding darkens most
SHAPES = ((375, 500), (500, 333), (224, 224))  # height and width of images in pixels
NUM_BOXES = 100_000  # boxes per distribution


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA_FOLDER / "imagenet_sample.zip")
    parser.add_argument(
        "--images", type=int, default=32, help="images for single operations (default: %(default)s)"
    )
    parser.add_argument(
        "--views", type=int, default=200, help="images for whole views (default: %(default)s)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(DataConfig(root=str(args.data), cache_dir=folder), "train")
        indices = np.linspace(0, len(source) - 1, args.views).astype(int).tolist()
        images = [np.ascontiguousarray(source.read(index)) for index in indices]
    subset = images[:: max(1, len(images) // args.images)][: args.images]
    torchvision_means, recipe_means = compare_operations(subset)
    frame, detail = compare_whole_views(images)
    distances = compare_areas()
    print(
        f"ratios: saturation_before={torchvision_means['saturation']:.2f} "
        f"saturation_after={recipe_means['saturation']:.4f} "
        f"contrast_before={torchvision_means['contrast']:.2f} "
        f"contrast_after={recipe_means['contrast']:.4f} "
        f"blur_border_before={torchvision_means['blur, outermost 11 pixels']:.2f} "
        f"blur_border_after={recipe_means['blur, outermost 11 pixels']:.4f} "
        f"resize_after_max={recipe_means['largest resize']:.2f} byol_frame={frame:.3f} "
        f"byol_detail_over_torchvision={detail:.2f} crop_area_ks={max(distances):.4f}"
    )


def compare_operations(images: list[np.ndarray]) -> tuple[dict[str, float], dict[str, float]]:
    """Print the first table and return the mean difference per operation.

    The first result is for torchvision's functions and the second for the options of the recipes.
    """
    resized = torch.stack(
        [
            crops.apply(to_tensor(image), Box(0, 0, *image.shape[:2], False), Crop(size=224))
            for image in images
        ]
    )
    floats = resized.permute(0, 2, 3, 1).numpy() / 255.0
    means: list[dict[str, float]] = [{}, {}]
    print(
        f"| operation, {len(images)} images | torchvision's: mean, max, share > 10 | "
        "the recipes': mean, max, share > 10 |"
    )
    print("|---|---|---|")
    for name, crop in {
        "contrast": Crop(size=224, jitter=1.0, contrast=0.8),
        "saturation": Crop(size=224, jitter=1.0, saturation=0.8),
        "blur, inside": Crop(size=224, blur=1.0, blur_kernel=23),
        "blur, outermost 11 pixels": Crop(size=224, blur=1.0, blur_kernel=23),
    }.items():
        parameters = draw_colors(crop, 0, 0, np.arange(len(images)), 0)
        expected = np.stack(
            [_apply_authors(name, floats[row], parameters, row, crop) for row in range(len(images))]
        )
        cells = []
        for mean, options in zip(means, (TORCHVISION, TENSORFLOW)):
            view = (
                color.apply(resized, parameters, replace(crop, **options), *NO_NORMALIZATION)
                .permute(0, 2, 3, 1)
                .numpy()
            )
            difference = 255 * np.abs(view - expected)
            if name.startswith("blur"):
                is_inside = np.zeros((224, 224), bool)
                is_inside[BORDER:-BORDER, BORDER:-BORDER] = True
                difference = difference[:, is_inside if name == "blur, inside" else ~is_inside]
            mean[name] = float(difference.mean())
            cells.append(_format_cell(difference))
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    for name, (low, high) in {
        "bicubic resize, box 1 to 2 times the view": (1, 2),
        "2 to 4 times": (2, 4),
    }.items():
        cells = []
        for mean, options in zip(means, (TORCHVISION, TENSORFLOW)):
            differences = []
            for number, image in enumerate(images):
                side = min(image.shape[:2])
                size = max(8, int(side / (low + (high - low) * (number + 0.5) / len(images))))
                crop = replace(Crop(size=size, interpolation="bicubic"), **options)
                box = Box(
                    (image.shape[0] - side) // 2, (image.shape[1] - side) // 2, side, side, False
                )
                region = image[box.top : box.top + side, box.left : box.left + side].astype(
                    np.float64
                )
                view = crops.apply(to_tensor(image), box, crop).permute(1, 2, 0).numpy()
                differences.append(
                    np.abs(view - authors.resize(region, size, "bicubic").clip(0, 255)).ravel()
                )
            difference = np.concatenate(differences)
            mean[name] = float(difference.mean())
            largest = max(mean.get("largest resize", 0.0), float(difference.max()))
            mean["largest resize"] = largest
            cells.append(_format_cell(difference))
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    return means[0], means[1]


def _apply_authors(
    name: str, image: np.ndarray, parameters: ColorParameters, row: int, crop: Crop
) -> np.ndarray:
    """Apply the authors' function, with a row's parameters, to a float image in [0, 1]."""
    if name == "contrast":
        factor = float(parameters.jitter_factors[row, color_parameters.CONTRAST])
        return authors.adjust_contrast(image, factor).clip(0, 1)
    if name == "saturation":
        factor = float(parameters.jitter_factors[row, color_parameters.SATURATION])
        return authors.adjust_saturation(image, factor)
    return authors.gaussian_blur(image, float(parameters.blur_sigma[row]), blur_taps(crop))


def _format_cell(difference: np.ndarray) -> str:
    """Format the mean, the maximum and the share above 10 levels."""
    return (
        f"{difference.mean():.3g}, {difference.max():.3g}, {100 * (difference > 10).mean():.1f} %"
    )


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Return an image (height, width, 3) as a tensor (3, height, width)."""
    return torch.from_numpy(image).permute(2, 0, 1)


def compare_whole_views(images: list[np.ndarray]) -> tuple[float, float]:
    """Print the second table and return two numbers for BYOL's first view.

    They are the border over the whole, and the detail over that of torchvision's functions.
    """
    print(
        "| whole views | border over whole, torchvision's | the recipe's | detail, torchvision's | "
        "the recipe's |"
    )
    print("|---|---|---|---|---|")
    result = (0.0, 0.0)
    for name in ("simclr", "byol"):
        config = load(ROOT / f"configs/{name}_imagenet.yaml", ["data.root=/data"])
        for number, crop in enumerate(recipe.crop_per_view(config.views)):
            frames, details = zip(
                *(
                    _measure_views(images, replace(crop, **options), number)
                    for options in (TORCHVISION, {})
                )
            )
            print(
                f"| {name}, view {number + 1} | {frames[0]:.3f} | {frames[1]:.3f} | "
                f"{details[0]:.4f} | {details[1]:.4f} |"
            )
            if name == "byol" and number == 0:
                result = frames[1], details[1] / details[0]
    return result


def _measure_views(images: list[np.ndarray], crop: Crop, number: int) -> tuple[float, float]:
    """Return the border over the whole and the detail, as means over four views of each image."""
    frames, details = [], []
    for epoch in range(4):
        parameters = draw_colors(crop, 0, epoch, np.arange(len(images)), number)
        boxes = [
            crops.draw_box(crop, 0, epoch, index, number, *image.shape[:2])
            for index, image in enumerate(images)
        ]
        region = torch.stack(
            [crops.apply(to_tensor(image), box, crop) for image, box in zip(images, boxes)]
        )
        views = color.apply(region, parameters, crop, *NO_NORMALIZATION)
        luminance = (views * torch.tensor(color_torch.LUMA)[:, None, None]).sum(1)
        interior = luminance[:, FRAME:-FRAME, FRAME:-FRAME]
        border = (luminance.sum((1, 2)) - interior.sum((1, 2))) / (
            luminance[0].numel() - interior[0].numel()
        )
        frames.append(border / luminance.mean((1, 2)).clamp_min(1e-3))
        neighbors = (
            luminance[:, 2:, 1:-1]
            + luminance[:, :-2, 1:-1]
            + luminance[:, 1:-1, 2:]
            + luminance[:, 1:-1, :-2]
        )
        details.append((neighbors - 4 * luminance[:, 1:-1, 1:-1]).abs().mean((1, 2)))
    return float(torch.cat(frames).mean()), float(torch.cat(details).mean())


def compare_areas() -> list[float]:
    """Print the third table and return the distances of both samplers from the authors'."""
    print(
        "| image | mean area, torchvision | SimCLR | BYOL | KS of torchvision from SimCLR, BYOL | "
        "KS of ours from SimCLR, BYOL |"
    )
    print("|---|---|---|---|---|---|")
    distances = []
    for height, width in SHAPES:
        size = height * width
        sizes, numbers = np.full((NUM_BOXES, 2), [height, width]), np.arange(NUM_BOXES)
        ours = {
            name: _compute_area_shares(
                crops.draw_boxes(Crop(crop_sampler=name), 0, 0, numbers, 0, sizes), size
            )
            for name in crops.SAMPLERS
        }
        samplers = {"tensorflow": authors.simclr_boxes, "clipped": authors.byol_boxes}
        expected = {
            name: _compute_area_shares(draw(NUM_BOXES, height, width, seed=1), size)
            for name, draw in samplers.items()
        }
        torchvision_distances = [
            stats.ks_2samp(ours["torchvision"], theirs).statistic for theirs in expected.values()
        ]
        recipe_distances = [
            stats.ks_2samp(ours[name], theirs).statistic for name, theirs in expected.items()
        ]
        distances += recipe_distances
        means = " | ".join(f"{shares.mean():.3f}" for shares in ours.values())
        print(
            f"| {height}x{width} | {means} | "
            f"{torchvision_distances[0]:.3f}, {torchvision_distances[1]:.3f} | "
            f"{recipe_distances[0]:.4f}, {recipe_distances[1]:.4f} |"
        )
    return distances


def _compute_area_shares(boxes: np.ndarray, size: int) -> np.ndarray:
    """Return the area of each box as a share of an image of `size` pixels."""
    return boxes[:, 2] * boxes[:, 3] / size


if __name__ == "__main__":
    main()
