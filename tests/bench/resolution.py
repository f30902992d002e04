"""Measure the size and the pixel error of smaller stored images, for docs/results/loading.md.

    PYTHONPATH=. python tests/bench/resolution.py

All numbers are for imagenet_sample.zip. The pixel error compares a view cut from the file with
the same view cut from the original. Pillow resizes both with antialiased bilinear interpolation,
because its boxes may begin between pixels. The error is the root mean square over views, in gray
levels. A view is enlarged if its box has fewer pixels than the view along at least one side.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from measure import DATA_FOLDER
from PIL import Image

from ssl_pretrain.data.beton import beton_writer
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.beton.encoder import EncodingSettings
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views import crops
from ssl_pretrain.views.recipe import Crop

VIEWS = {
    "224, SimCLR (area 0.08 to 1)": Crop(size=224, scale=[0.08, 1.0]),
    "224, DINO (0.25 to 1)": Crop(size=224, scale=[0.25, 1.0]),
    "96, local (0.05 to 0.25)": Crop(size=96, scale=[0.05, 0.25]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA_FOLDER,
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[0, 500, 400, 256])
    parser.add_argument("--images", type=int, default=600, help="images for pixel errors")
    args = parser.parse_args()
    print(
        "| max side | KB per image | ImageNet | unchanged | "
        + " | ".join(f"{name}: error, enlarged" for name in VIEWS)
        + " |"
    )
    print("|---" * (4 + len(VIEWS)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        originals = open_source(
            DataConfig(root=str(args.data / "imagenet_sample.zip"), cache_dir=folder), "train"
        )
        for side in args.sides:
            path = Path(folder) / f"{side}.beton"
            manifest = beton_writer.write(
                originals, path, EncodingSettings(max_side=side), num_workers=1
            )
            stored = open_source(DataConfig(root=str(path)), "train")
            assert isinstance(stored, Beton)
            bytes_per_image = float(stored.samples.length.mean())  # without the file's tables
            cells = []
            for crop in VIEWS.values():
                errors, enlarged = [], []
                for index in np.linspace(0, len(stored) - 1, args.images).astype(int).tolist():
                    error, is_enlarged = compare(
                        originals.read(index), stored.read(index), crop, index
                    )
                    errors.append(error)
                    enlarged.append(is_enlarged)
                cells.append(f"{np.sqrt(np.mean(errors)):.1f}, {100 * np.mean(enlarged):.0f} %")
            max_side = str(side) if side else "none"
            row = [
                max_side,
                f"{bytes_per_image / 1e3:.0f}",
                f"{bytes_per_image * 1281167 / 1e9:.0f} GB",
            ]
            row += [f"{manifest.num_unchanged} of 600", *cells]
            print(f"| {' | '.join(row)} |", flush=True)


def compare(original: np.ndarray, stored: np.ndarray, crop: Crop, index: int) -> tuple[float, bool]:
    """Return the mean squared difference of one view, and whether its box is enlarged."""
    box = crops.draw_box(crop, 0, 0, index, 0, *stored.shape[:2])
    scale_y, scale_x = original.shape[0] / stored.shape[0], original.shape[1] / stored.shape[1]

    def cut_view(image: np.ndarray, scale_y: float, scale_x: float) -> np.ndarray:
        region = (
            box.left * scale_x,
            box.top * scale_y,
            (box.left + box.width) * scale_x,
            (box.top + box.height) * scale_y,
        )
        picture = Image.fromarray(np.ascontiguousarray(image))
        size = (crop.size, crop.size)
        return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, region), np.float32)

    error = np.square(cut_view(stored, 1, 1) - cut_view(original, scale_y, scale_x)).mean()
    return float(error), min(box.height, box.width) < crop.size


if __name__ == "__main__":
    main()
