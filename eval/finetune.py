"""The whole network fine-tuned on all labels: `python -m ssl_pretrain.eval.finetune RUN`."""

from typing import Any

import numpy as np

from ssl_pretrain.eval import command_line, protocols
from ssl_pretrain.eval.finetuning.selection import (
    TUNING_OPTIONS,
    Column,
    TuningOptions,
    adapt,
    evaluate_columns,
    options_from,
)
from ssl_pretrain.eval.frozen.evaluation_split import labeled_splits
from ssl_pretrain.eval.runs import Run

HELP = """Accuracy of the whole network, fine-tuned on all labels from a run's weights.

--protocol simclr, the default: SGD for 20,000 steps on crops and flips (SimCLR, appendix B.8.1).
--protocol deit: AdamW with mixup, cutmix, RandAugment, erasing and stochastic depth, for a ViT
(DeiT, as MoCo v3 fine-tunes). Of several --lrs or --weight-decays, the best on a tenth of the
labeled images is used. The result is printed and saved to RUN/eval/finetune_PROTOCOL.json.

    python -m ssl_pretrain.eval.finetune runs/demo --epochs 10 --rows random pretrained
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.finetune runs/imagenet --lrs 0.003 0.01 0.03
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.finetune runs/dino_imagenet \\
        --protocol deit --epochs 100 --layer-decay 0.65"""

OPTIONS: dict[str, dict[str, Any]] = {
    "--protocol": {
        "choices": ["simclr", "deit"],
        "default": "simclr",
        "help": "see above (default: simclr)",
    },
}


def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = command_line.parser("ssl_pretrain.eval.finetune", HELP, OPTIONS | TUNING_OPTIONS)
    command_line.evaluate_and_print(
        parser,
        arguments,
        lambda run, options: evaluate(run, options.protocol, options_from(options)),
    )


def evaluate(run: Run, protocol: str, options: TuningOptions) -> dict[str, Any]:
    """Measure the accuracy in percent after fine-tuning, for RUN/eval/finetune_<protocol>.json.

    Args:
        run: Run to evaluate.
        protocol: Name of a published protocol, "simclr" or "deit".
        options: Settings to try.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, or an option does not fit them.
    """
    train, test = labeled_splits(run, "fine-tuning")
    published = protocols.TUNING[protocol]
    adapted = adapt(published, options, len(train))
    columns = {"all labels": Column(np.arange(len(train)), adapted)}
    about = {"source": published.source}
    name = f"finetune_{protocol}"
    return evaluate_columns(run, name, columns, train, test, options, about)


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.finetune")
