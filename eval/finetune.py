r"""Accuracy of a run's whole network after fine-tuning on all labels.

--protocol simclr, the default: SGD for 20,000 steps on crops and flips (SimCLR, appendix B.8.1).
--protocol deit: AdamW with mixup, cutmix, RandAugment, erasing and stochastic depth, for a ViT
(DeiT, as in MoCo v3).
--protocol mae: the same augmentations, with smaller learning rates for lower blocks and a
classifier of the mean patch token, for a ViT with a class token. Learning rate, layer decay, epochs
and stochastic depth are those of MAE's ViT-B, ViT-L or ViT-H, by the width of the network.

If several --lrs or --weight-decays are given, those that are best on a held-out tenth of the
labeled images are used. The result is printed and saved to RUN/eval/finetune_PROTOCOL.json.

    python -m ssl_pretrain.eval.finetune runs/demo --epochs 10 --rows random pretrained
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.finetune runs/imagenet --lrs 0.003 0.01 0.03
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.finetune runs/dino_imagenet \
        --protocol deit --epochs 100 --layer-decay 0.65
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.finetune runs/mae_imagenet --protocol mae
"""

from typing import Any

import numpy as np

from ssl_pretrain.eval import command_line, finetuning_protocols
from ssl_pretrain.eval.finetuning import selection
from ssl_pretrain.eval.frozen.evaluation_split import labeled_splits
from ssl_pretrain.eval.runs import Run

OPTIONS: dict[str, dict[str, Any]] = {
    "--protocol": {
        "choices": list(finetuning_protocols.NAMES),
        "default": "simclr",
        "help": "published protocol, described above (default: simclr)",
    },
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser(
            "ssl_pretrain.eval.finetune", __doc__, OPTIONS | selection.FINETUNING_OPTIONS
        ),
        arguments,
        lambda run, options: evaluate(run, options.protocol, selection.finetuning_options(options)),
    )


def evaluate(run: Run, protocol_name: str, options: selection.FinetuningOptions) -> dict[str, Any]:
    """Fine-tune the network and return its accuracy in percent.

    Args:
        run: Run to evaluate.
        protocol_name: Name of a published protocol, "simclr", "deit" or "mae".
        options: Settings to try and other options of the command line.

    Returns:
        The content of RUN/eval/finetune_<protocol_name>.json.

    Raises:
        ValueError: If the images have no labels, the protocol does not fit the network, or an
            option is out of range for the images.
    """
    published_protocol = selection.without_color_augmentation(
        finetuning_protocols.choose_protocol(protocol_name, run.backbone),
        run.config.views.num_channels,
    )
    train, test = labeled_splits(run, "fine-tuning")
    column = selection.Column(
        np.arange(len(train)), selection.adapt_protocol(published_protocol, options, len(train))
    )
    return selection.evaluate_columns(
        run,
        f"finetune_{protocol_name}",
        {"all labels": column},
        train,
        test,
        options,
        {"source": published_protocol.source},
    )


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.finetune")
