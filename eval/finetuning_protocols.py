"""Published protocols of fine-tuning, with the source of every number."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ssl_pretrain.models.timm_networks import architecture
from ssl_pretrain.models.tokens import is_transformer
from ssl_pretrain.views.recipe import Interpolation

NAMES = ("simclr", "deit", "mae")  # values of --protocol


@dataclass(frozen=True)
class FinetuningProtocol:
    """Training of the backbone and a classifier together from the pretrained weights."""

    source: str
    optimizer: Literal["sgd", "adamw"]  # SGD uses a Nesterov momentum of 0.9
    base_lr: float  # learning rate at a batch of `lr_batch_size`
    lr_batch_size: int
    batch_size: int
    epochs: float = 0.0  # unused if `num_steps` is set
    num_steps: int = 0
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0  # learning rate at the start of the warm-up
    min_lr: float = 0.0  # learning rate at the end of the cosine
    weight_decay: float = 0.0
    decays_norms_and_biases: bool = True
    layer_decay: float = 1.0  # ratio of a block's learning rate to the next block's
    mixup: float = 0.0  # parameter of the beta distribution
    cutmix: float = 0.0  # parameter of the beta distribution
    smoothing: float = 0.0  # label smoothing
    erasing: float = 0.0  # probability of erasing a rectangle
    randaugment: str = ""  # timm's name for a policy
    drop_path: float = 0.0  # rate of stochastic depth
    head_std: float = 0.02  # standard deviation of the classifier's weights; biases start at 0
    # The classifier reads the mean patch token after a new norm, not the pooled output.
    pools_patches: bool = False
    # The momentum of batch norm is at most 10 / steps_per_epoch, as in SimCLR.
    limits_batch_norm_momentum: bool = False
    interpolation: Interpolation = "bicubic"


def _mae_protocol(
    network: str, *, base_lr: float, epochs: int, layer_decay: float, drop_path: float
) -> FinetuningProtocol:
    """Return MAE's protocol with the numbers that differ between its networks."""
    return FinetuningProtocol(
        "MAE, main_finetune.py and the commands of its FINETUNE.md: facebookresearch/mae at"
        f" efb2a806; its numbers for {network}",
        "adamw", base_lr=base_lr, lr_batch_size=256, batch_size=1024, epochs=epochs,
        warmup_epochs=5, min_lr=1e-6, weight_decay=0.05, decays_norms_and_biases=False,
        layer_decay=layer_decay, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25,
        randaugment="rand-m9-mstd0.5-inc1", drop_path=drop_path, head_std=2e-5, pools_patches=True,
    )  # fmt: skip


SEMI_EPOCHS = {1: 60, 10: 30}  # epochs by percentage of labels (SimCLR, appendix B.5)

FINETUNING_PROTOCOLS = {
    "semi": FinetuningProtocol(
        "SimCLR (arXiv:2002.05709), appendix B.5: no regularization, no warm-up, 60 epochs for 1 %"
        " and 30 for 10 % of the labels",
        "sgd", base_lr=0.05, lr_batch_size=256, batch_size=4096, epochs=60,
        head_std=0.0,
    ),
    "simclr": FinetuningProtocol(
        "SimCLR (arXiv:2002.05709), appendix B.8.1: 20,000 steps; select the learning rate from"
        " --lrs of 1e-4 to 0.1 and the weight decay from --weight-decays of 0 and 1e-6 to 1e-3,"
        " both logarithmic",
        "sgd", base_lr=0.05, lr_batch_size=256, batch_size=256, num_steps=20_000,
        head_std=0.0, limits_batch_norm_momentum=True,
    ),
    "deit": FinetuningProtocol(
        "DeiT (arXiv:2012.12877), table 9 and main.py: facebookresearch/deit at 0282d2a1; epochs as"
        " MoCo v3 fine-tunes with it; without repeated augmentation",
        "adamw", base_lr=5e-4, lr_batch_size=512, batch_size=1024, epochs=150, warmup_epochs=5,
        warmup_lr=1e-6, min_lr=1e-5, weight_decay=0.05, decays_norms_and_biases=False, mixup=0.8,
        cutmix=1.0, smoothing=0.1, erasing=0.25, randaugment="rand-m9-mstd0.5-inc1",
        drop_path=0.1,
    ),
    "mae_vit_b": _mae_protocol(
        "ViT-B", base_lr=5e-4, epochs=100, layer_decay=0.65, drop_path=0.1
    ),
    "mae_vit_l": _mae_protocol(
        "ViT-L", base_lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.2
    ),
    "mae_vit_h": _mae_protocol(
        "ViT-H", base_lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.3
    ),
}  # fmt: skip

VIT_L_DIM, VIT_H_DIM = 1024, 1280  # token widths


def choose_protocol(name: str, backbone: nn.Module) -> FinetuningProtocol:
    """Return the published protocol of this name for a backbone.

    MAE's numbers depend on the network. Those for the largest of its networks whose tokens are not
    wider than the backbone's are used, and those for ViT-B if there is none.

    Raises:
        ValueError: If there is no such protocol, or it is MAE's and the backbone is not a ViT with
            a class token.
    """
    if name not in NAMES:
        raise ValueError(
            f"--protocol {name}: is not a protocol of fine-tuning; give one of: {', '.join(NAMES)}"
        )
    if name != "mae":
        return FINETUNING_PROTOCOLS[name]
    model: Any = backbone.model
    if not is_transformer(model) or model.cls_token is None:
        raise ValueError(
            f"--protocol mae: {architecture(model)} is not a ViT with a class token; give"
            " --protocol simclr or deit"
        )
    if model.embed_dim >= VIT_H_DIM:
        return FINETUNING_PROTOCOLS["mae_vit_h"]
    return FINETUNING_PROTOCOLS["mae_vit_l" if model.embed_dim >= VIT_L_DIM else "mae_vit_b"]
