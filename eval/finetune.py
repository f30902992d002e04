"""The whole network fine-tuned on all labels: `python -m ssl_pretrain.eval.finetune RUN`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import protocols, results, runs
from ssl_pretrain.eval.finetuning import selection
from ssl_pretrain.eval.finetuning.selection import Column, Settings
from ssl_pretrain.eval.frozen import evaluation_split, shards
from ssl_pretrain.eval.runs import Run

NAMES = ("simclr", "deit")
HELP = """Accuracy of the whole network, trained on all labelled images from a run's weights.

--protocol simclr, the default: SGD for 20,000 steps on crops and flips (SimCLR, appendix B.8.1). deit: AdamW with mixup,
cutmix, RandAugment, erasing and stochastic depth, for a ViT (DeiT, as MoCo v3 fine-tunes). --help says what can be set;
several --lrs or --weight-decays are chosen among on a tenth of the labelled images. The numbers and their protocol are
printed and kept in RUN/eval/finetune_PROTOCOL.json.

    python -m ssl_pretrain.eval.finetune runs/demo --epochs 10 --rows random pretrained
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.finetune runs/simclr_imagenet --lrs 0.003 0.01 0.03
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.finetune runs/dino_imagenet --protocol deit --epochs 100 --layer-decay 0.65"""


def main(arguments: list[str]) -> None:
    parser = runs.parser("ssl_pretrain.eval.finetune", HELP)
    parser.add_argument(
        "--protocol", choices=NAMES, default="simclr", help="see above (default: simclr)"
    )
    selection.add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    with shards.ranks(options.device) as device:
        run = runs.load_run(options.run, options.checkpoint, options.overrides, device)
        result = evaluate(run, options.protocol, selection.settings_of(options))
        if process_group.is_main():
            print(
                f"\n{results.text(result)}\n\n{result['seconds']:.0f} s; kept in {run.path / 'eval' / result['name']}.json"
            )


def evaluate(run: Run, name: str = "simclr", settings: Settings | None = None) -> dict[str, Any]:
    """Accuracy in percent after fine-tuning by a protocol; see HELP. Kept in RUN/eval/finetune_<name>.json.

    Raises:
        ValueError: the images have no labels, or a setting does not fit them.
    """
    settings = settings or Settings()
    train, test = evaluation_split.labelled_parts(run, "fine-tuning")
    published = protocols.TUNING[name]
    column = Column(np.arange(len(train)), selection.departing(published, settings, len(train)))
    about = {"source": published.source}
    return selection.evaluate(
        run, f"finetune_{name}", {"all labels": column}, train, test, settings, about
    )


if __name__ == "__main__":
    results.command(main, "ssl_pretrain.eval.finetune")
