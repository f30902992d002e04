"""Write the features of images into an .npz file.

The file holds `features`, float32 (n, dim), and `names`, the n paths of the images. Read it with
numpy.load(FILE).

    python -m ssl_pretrain.command.embed_images runs/photos photos/ photos.npz
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl_pretrain import api
from ssl_pretrain.schema import NON_NEGATIVE_INT, POSITIVE_INT
from ssl_pretrain.system import exit_status, program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _build_parser().parse_args(arguments)
    try:
        if options.file.suffix != ".npz":
            raise ValueError(f"FILE: {options.file} is not an .npz; give a name that ends in .npz")
        backbone, transform = api.load_backbone(options.run, device=options.device)
        source = api.open_images(options.images, transform.pixel_format)
        features = api.embed(
            backbone,
            source,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
        )
        names = [source.name(index) for index in range(len(source))]
        options.file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(options.file, features=features, names=np.array(names))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_status.USER_ERROR
    print(f"{options.file}: features of {len(features):,} images, {features.shape[1]} numbers each")
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program.usage_name("python -m ssl_pretrain.command.embed_images"),
        description=__doc__,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run, or timm:<tag>")
    add(
        "images",
        metavar="IMAGES",
        help="a folder, a .zip, a list of files, or a file of arrays or a table",
    )
    add("file", metavar="FILE", type=Path, help="file to write, such as features.npz")
    add("--device", default="auto", help="cpu or cuda (default: cuda where available)")
    add("--batch-size", type=POSITIVE_INT, default=64, help="images per forward pass (default: 64)")
    add(
        "--num-workers",
        type=NON_NEGATIVE_INT,
        default=0,
        help="processes that read the images (default: 0, which reads in this process)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
