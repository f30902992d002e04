"""Write the features of images into a file.

RUN is the folder of a run or of an export, a file of weights with backbone.name=NAME, or timm:TAG.
IMAGES is anything that data.root takes: a folder, a .zip, tar shards, a .beton, arrays, a table, a
list of files. The ending of OUT chooses the format: .npz, .npy (with names in OUT.json), .parquet
or .safetensors. Each has the features, the names of the images, their labels if they have any, and
the network, weights, feature and transform as metadata.

A command that was stopped or killed continues where it was, from the folder OUT.job, and writes the
same file. The features of an image that cannot be read are NaN, and the image is named.

    python -m ssl_pretrain.eval.embed runs/photos photos/ photos.npz
    # the mean patch token of published weights, in half precision
    python -m ssl_pretrain.eval.embed timm:vit_small_patch16_224.augreg_in21k photos.zip out.npy
        --feature patch_mean --dtype float16
    # a table whose images are in the column `scan`
    python -m ssl_pretrain.eval.embed runs/scans scans.parquet scans.npy data.image_column=scan
"""

import argparse
import sys
from pathlib import Path

from ssl_pretrain.data.source_report import describe_counts
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.embedding import embedding_file, embedding_network
from ssl_pretrain.eval.embedding.embedding_job import JobOptions, embed_to_file
from ssl_pretrain.eval.embedding.feature_batches import check_feature
from ssl_pretrain.eval.frozen.named_features import POOLED
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

NETWORK_HELP = "folder of a run or an export, a weights file with backbone.name=NAME, or timm:<tag>"
FEATURE_HELP = (
    "pooled (default), or of the tokens: prefix (class token and registers), patch_mean, cls_mean"
    " (class token and mean patch), last<n> (class tokens of the last n layers), or patches (one"
    " vector per patch)"
)


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    options = _build_parser().parse_intermixed_args(arguments)
    embedding_file.check_path(options.out)
    check_feature(options.feature)
    try:
        with command_line.join_ranks(options.device) as options.device:
            _embed(options)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(130)


def _embed(options: argparse.Namespace) -> None:
    network = embedding_network.open_network(options.run, options.overrides, options.device)
    source, data = embedding_network.open_images(
        options.images, network.transform.pixel_format, options.overrides, options.split
    )
    extractor = network.extractor(options.feature)
    results.print_progress(f"{source.full_path}: {describe_counts(source)}")
    metadata = embed_to_file(
        extractor,
        source,
        options.out,
        network.provenance(options.feature),
        JobOptions(
            options.dtype,
            options.batch_size,
            options.num_workers,
            data.max_replaced,
            options.overwrite,
        ),
    )
    for reason in metadata["unreadable"].values():
        results.print_progress(f"unreadable, its features are NaN: {reason}")
    if not_finite := metadata.get("not_finite"):
        results.print_progress(
            f"not finite: the network computed NaN or infinite features of {len(not_finite):,}"
            f" readable images, such as {not_finite[0]}"
        )
    shape = " x ".join(f"{length:,}" for length in extractor.describe_shape())
    process_group.print_once(
        f"{options.out}: features of {metadata['count']:,} images, {shape} numbers each"
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        program.usage_name("python -m ssl_pretrain.eval.embed"), description=__doc__
    )
    add = parser.add_argument
    add("run", metavar="RUN", help=NETWORK_HELP)
    add("images", metavar="IMAGES", help="images, as data.root takes them; or digits, or cifar10")
    add("out", metavar="OUT", type=Path, help="file to write, such as features.npz")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="data.* settings of the images, such as data.label_column=none; evaluation.* settings"
        " of the transform; parallel.precision; backbone.* for a weights file",
    )
    add("--feature", default=POOLED, metavar="NAME", help=FEATURE_HELP)
    add("--split", choices=["train", "val"], default="train", help="split of a data set with two")
    add(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="type of the numbers in the file (default: float32)",
    )
    embedding_network.add_options(parser)
    add(
        "--overwrite",
        action="store_true",
        help="replace OUT, and discard an unfinished job with other settings",
    )
    return parser


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.embed")
