"""Attentive probes on a run's frozen patch tokens."""

import argparse
from typing import Any

from ssl_pretrain.eval import command_line
from ssl_pretrain.eval.attentive_protocols import ATTENTIVE_PROTOCOLS, CACHED, AttentiveOptions
from ssl_pretrain.eval.frozen import (
    cached_attentive,
    features,
    patch_tokens,
    published,
    published_attentive,
)
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import NON_NEGATIVE_FLOAT, POSITIVE_FLOAT, POSITIVE_INT

HELP = f"""Accuracy of attentive probes on frozen patch tokens.

A probe is one query that attends to the patch tokens of an image, and a linear layer. It measures
information in the patch tokens that the pooled features may not have.

--protocol cached, the default: the tokens of each image are computed once and kept in memory.
{len(CACHED.settings)} probes, one per learning rate and weight decay, are trained together on nine
tenths of the training images. The setting that is best on the last tenth is then trained on all
training images and tested once. Patches of raw pixels and a random backbone are evaluated, too.

--protocol {" | ".join(ATTENTIVE_PROTOCOLS)}:
the published protocols. Random crops and flips of the training images are embedded anew in every
step, and all settings are trained in the same pass.

The result is printed and saved to RUN/eval/attentive.json or RUN/eval/attentive_PROTOCOL.json. The
accuracy of every setting is saved next to it, in a file that ends in _grid.json.

    python -m ssl_pretrain.eval.attentive runs/dino
    python -m ssl_pretrain.eval.attentive runs/dino --protocol capi --epochs 10
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.attentive runs/imagenet --protocol vjepa
    # evaluate on images that have moved since training
    python -m ssl_pretrain.eval.attentive runs/dino data.root=/new/place"""

OPTIONS: dict[str, dict[str, Any]] = {
    "--protocol": {
        "choices": ["cached", *ATTENTIVE_PROTOCOLS],
        "default": "cached",
        "help": "protocol, described above (default: cached)",
    },
    "--epochs": {
        "type": POSITIVE_INT,
        "help": f"passes over the images (default: {CACHED.epochs} for cached, else the published"
        " length)",
    },
    "--rows": {
        "nargs": "+",
        "choices": features.ROWS,
        "help": "tokens to evaluate (default: all for cached, else pretrained)",
    },
    "--lrs": {
        "type": POSITIVE_FLOAT,
        "nargs": "+",
        "metavar": "LR",
        "help": "learning rates to try; capi's are for a batch of 256 (default: the protocol's)",
    },
    "--weight-decays": {
        "type": NON_NEGATIVE_FLOAT,
        "nargs": "+",
        "metavar": "WD",
        "help": "weight decays to try (default: the protocol's)",
    },
    "--batch-size": {
        "type": POSITIVE_INT,
        "help": "images per step on all ranks (default: the protocol's; capi has 128 per rank)",
    },
    "--feature": {
        "type": patch_tokens.sequence_name,
        "default": patch_tokens.PATCHES,
        "metavar": "NAME",
        "help": (
            "tokens to attend to: patches of the last layer (default), prefix (class token and"
            " registers) or last<n> (patches of the last n layers, concatenated)"
        ),
    },
    "--select": {
        "choices": list(published.SELECTIONS),
        "help": (
            "published protocols. held-out: select on held-out training images (default for several"
            " settings), published: train the only setting on all images (default for one), or"
            " test: select on the test images"
        ),
    },
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.attentive", HELP, OPTIONS),
        arguments,
        _evaluate,
    )


def _evaluate(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    return evaluate(
        run,
        options.protocol,
        options.epochs,
        options.rows,
        lrs=options.lrs,
        weight_decays=options.weight_decays,
        batch_size=options.batch_size,
        selection=options.select,
        feature=options.feature,
    )


def evaluate(
    run: Run,
    protocol: str = "cached",
    epochs: int | None = None,
    rows: list[str] | None = None,
    *,
    lrs: list[float] | None = None,
    weight_decays: list[float] | None = None,
    batch_size: int | None = None,
    selection: str | None = None,
    feature: str = patch_tokens.PATCHES,
) -> dict[str, Any]:
    """Train attentive probes on frozen patch tokens, cached or by a published protocol.

    Args:
        run: Run to evaluate.
        protocol: "cached", or a key of `ATTENTIVE_PROTOCOLS`.
        epochs: Passes over the images. Default: the protocol's.
        rows: Tokens to evaluate, from `features.ROWS`. Default: all for "cached", else pretrained.
        lrs: Learning rates to try. Default: the protocol's.
        weight_decays: Weight decays to try. Default: the protocol's.
        batch_size: Images per step on all ranks. Default: the protocol's.
        selection: "held-out", "published" or "test", for the published protocols.
        feature: Tokens to attend to, see `patch_tokens.TokenSequence`.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, there is no such protocol, or an option does not
            fit it.
    """
    if protocol not in ("cached", *ATTENTIVE_PROTOCOLS):
        raise ValueError(
            f"evaluate: attentive has no protocol {protocol!r}; choose one of: cached,"
            f" {', '.join(ATTENTIVE_PROTOCOLS)}"
        )
    options = AttentiveOptions(protocol, lrs, weight_decays, epochs, batch_size, selection, feature)
    arguments = {"rows": rows} if rows else {}  # each protocol has its default
    if protocol != "cached":
        return published_attentive.evaluate(run, options, **arguments)
    if selection is not None:
        raise ValueError(
            f"--select {selection}: --protocol cached selects on held-out training images; leave it"
            " out or give a published --protocol"
        )
    return cached_attentive.evaluate(run, options, **arguments)


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.attentive")
