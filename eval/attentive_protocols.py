"""Protocols of the attentive probe, with the source of every number."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval.frozen.attentive_probes import Kind
from ssl_pretrain.eval.protocols import fitting_batch_size
from ssl_pretrain.eval.results import ACCURACY
from ssl_pretrain.views.recipe import Interpolation


@dataclass(frozen=True)
class ProbeSetting:
    """Learning rate and weight decay of one probe, and how they change."""

    lr: float  # at its peak, for the protocol's `lr_batch_size`
    weight_decay: float  # at the first step
    start_lr: float = 0.0  # at the start of the warm-up
    warmup: float = 0.0  # share of the steps with a rising learning rate
    final_weight_decay: float | None = None  # None keeps the first one

    @property
    def name(self) -> str:
        """Name in the result tables."""
        text = f"lr {self.lr:g}, wd {self.weight_decay:g}"
        if self.final_weight_decay is not None:
            text += f" to {self.final_weight_decay:g}"
        return text


def build_grid(
    lrs: tuple[float, ...], weight_decays: tuple[float, ...], template: ProbeSetting
) -> tuple[ProbeSetting, ...]:
    """Return all combinations, with the schedule of `template`."""
    pairs = itertools.product(lrs, weight_decays)
    return tuple(replace(template, lr=lr, weight_decay=decay) for lr, decay in pairs)


@dataclass(frozen=True)
class AttentiveProtocol:
    """Training of attentive probes on the patch tokens of a frozen backbone, by AdamW."""

    source: str
    kind: Kind
    settings: tuple[ProbeSetting, ...]
    batch_size: int
    epochs: int = 0  # unused if `num_steps` is set
    num_steps: int = 0
    batch_is_per_rank: bool = False
    lr_batch_size: int = 0  # batch of the learning rates; 0 does not scale them
    num_heads: int = 0  # 0: heads of 64 for "capi", as many as the backbone's for "jepa"
    num_blocks: int = 0  # blocks of self-attention before the query
    schedule: Literal["capi", "jepa"] = "capi"
    betas: tuple[float, float] = (0.9, 0.999)
    decayed: Literal["all", "not biases", "matrices"] = "not biases"
    clip_norm: float = 0.0
    # Views
    augmented: bool = False  # AutoAugment, and a rectangle erased with probability 0.25
    interpolation: Interpolation = "bicubic"
    test_interpolation: Interpolation = "bicubic"

    def undecayed(self, weights: Mapping[str, Tensor]) -> frozenset[str]:
        """Return the names of the weights without weight decay."""
        if self.decayed == "all":
            return frozenset()
        names = {name for name in weights if name.endswith("bias")}
        if self.decayed == "matrices":
            names |= {name for name in weights if "norm" in name}
        return frozenset(names)

    def rates(self, setting: ProbeSetting, step: int, num_steps: int) -> tuple[float, float]:
        """Return the learning rate and the weight decay of a step, counted from 0."""
        scale = self.batch_size / self.lr_batch_size if self.lr_batch_size else 1.0
        if self.schedule == "capi":
            num_warmup = round(setting.warmup * num_steps)
            if step < num_warmup:
                factor = step / max(1, num_warmup - 1)
            else:
                last = max(1, num_steps - num_warmup - 1)  # the last step has a rate of 0
                factor = _falling_cosine((step - num_warmup) / last)
            return scale * setting.lr * factor, setting.weight_decay
        done = step + 1
        num_warmup = int(setting.warmup * num_steps)
        if done < num_warmup:
            lr = setting.start_lr + done / num_warmup * (setting.lr - setting.start_lr)
        else:
            lr = setting.lr * _falling_cosine((done - num_warmup) / max(1, num_steps - num_warmup))
        decay = setting.weight_decay
        if setting.final_weight_decay is not None:
            final = setting.final_weight_decay
            decay = final + (decay - final) * _falling_cosine(done / num_steps)
        return scale * lr, decay


def _falling_cosine(fraction: float) -> float:
    return (1 + math.cos(math.pi * fraction)) / 2


CACHED = AttentiveProtocol(
    "ours: the probe of CAPI on tokens that are computed once",
    kind="capi", batch_size=256, epochs=20,
    settings=build_grid(
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 5e-2), ProbeSetting(0, 0, warmup=0.1)
    ),
    betas=(0.9, 0.95),
)  # fmt: skip
ATTENTIVE_PROTOCOLS = {
    "capi": AttentiveProtocol(
        "CAPI, eval_classification.py: facebookresearch/capi at 98b4fa17",
        kind="capi", batch_size=128, batch_is_per_rank=True, num_steps=12_500, lr_batch_size=256,
        settings=build_grid(
            (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2), (5e-4, 1e-3, 5e-2),
            ProbeSetting(0, 0, warmup=0.1),
        ),
        betas=(0.9, 0.95),
    ),
    "vjepa": AttentiveProtocol(
        "V-JEPA, vitl16_in1k.yaml: facebookresearch/jepa at 51c59d51",
        kind="jepa", batch_size=1024, epochs=20,
        settings=(ProbeSetting(1e-3, 1e-3, start_lr=1e-3, final_weight_decay=1e-6),),
        schedule="jepa", decayed="matrices", clip_norm=1.0, augmented=True,
        test_interpolation="bilinear",
    ),
    "vjepa2": AttentiveProtocol(
        "V-JEPA 2, configs/eval/vitl/in1k.yaml: facebookresearch/vjepa2 at c2963a47",
        kind="jepa", batch_size=1024, epochs=20, num_heads=16, num_blocks=3,
        settings=(
            ProbeSetting(1e-3, 1e-3, start_lr=1e-3, final_weight_decay=0.0),
            *build_grid(
                (5e-4, 1e-3, 1.5e-3, 2e-3), (8e-3, 4e-3, 2e-3, 1e-3, 5e-4),
                ProbeSetting(0, 0, start_lr=2e-4, warmup=0.25),
            ),
        ),
        schedule="jepa", decayed="all", augmented=True, test_interpolation="bilinear",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AttentiveOptions:
    """A protocol of the attentive probe and the values to change. None keeps the protocol's."""

    protocol_name: str = "cached"  # or a key of ATTENTIVE_PROTOCOLS
    lrs: list[float] | None = None  # at the protocol's `lr_batch_size`
    weight_decays: list[float] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    selection: str | None = None  # "held-out", "published" or "test"
    feature: str = "patches"  # name of the tokens, see `patch_tokens.TokenSequence`

    @property
    def suffix(self) -> str:
        """End of the result's name for other tokens than patches."""
        return "" if self.feature == "patches" else f"_{self.feature}"

    @property
    def measure(self) -> str:
        """Name of the numbers, with the name of the tokens unless they are patches."""
        return ACCURACY if self.feature == "patches" else f"{self.feature}, {ACCURACY}"

    @property
    def published_protocol(self) -> AttentiveProtocol:
        """The protocol without changes."""
        return {"cached": CACHED, **ATTENTIVE_PROTOCOLS}[self.protocol_name]

    def adapt_protocol(self, num_images: int) -> AttentiveProtocol:
        """Return the protocol with the changes and a batch size that fits the images.

        Raises:
            ValueError: If there are no epochs, or the batch size does not fit the images.
        """
        protocol, world_size = self.published_protocol, process_group.world_size()
        published = protocol.batch_size * (world_size if protocol.batch_is_per_rank else 1)
        batch_size = self.batch_size or fitting_batch_size(published, num_images, world_size)
        if (self.epochs is not None and self.epochs < 1) or not 1 <= batch_size <= num_images:
            epochs = protocol.epochs if self.epochs is None else self.epochs
            raise ValueError(
                f"--epochs {epochs}, --batch-size {batch_size}: give at least 1 epoch, and a"
                f" batch of 1 to {num_images} images"
            )
        if self.epochs is not None:
            protocol = replace(protocol, epochs=self.epochs, num_steps=0)
        return replace(protocol, batch_size=batch_size, settings=self._settings())

    def _settings(self) -> tuple[ProbeSetting, ...]:
        settings = self.published_protocol.settings
        if not self.lrs and not self.weight_decays:
            return settings
        lrs = self.lrs or list(dict.fromkeys(setting.lr for setting in settings))
        decays = self.weight_decays or list(
            dict.fromkeys(setting.weight_decay for setting in settings)
        )
        return build_grid(tuple(lrs), tuple(decays), settings[-1])

    def choose_selection(self, num_settings: int) -> str:
        """Return how the setting is selected. A single setting needs no held-out images.

        Raises:
            ValueError: If several settings are trained and none is to be selected.
        """
        if self.selection == "published" and num_settings > 1:
            raise ValueError(
                f"--select published: --protocol {self.protocol_name} has {num_settings} settings;"
                " name one with --lrs and --weight-decays, or give --select held-out"
            )
        return self.selection or ("published" if num_settings == 1 else "held-out")


def describe_attentive_training(
    protocol: AttentiveProtocol, published: AttentiveProtocol, num_heads: int, num_images: int
) -> str:
    """Describe the probes and their training, as an entry of the saved protocol."""
    blocks = f"{protocol.num_blocks} blocks of self-attention, then " if protocol.num_blocks else ""
    layers = "attention" if protocol.kind == "capi" else "norm, attention, MLP"
    batch = f"batch {protocol.batch_size}"
    published_batch = published.batch_size
    if published.batch_is_per_rank:
        published_batch *= process_group.world_size()
    if protocol.batch_size != published_batch:
        batch += f" (published: {published_batch}, {num_images:,} images)"
    length = (
        f"{protocol.num_steps or protocol.epochs} {'steps' if protocol.num_steps else 'epochs'}"
    )
    if (protocol.num_steps, protocol.epochs) != (published.num_steps, published.epochs):
        unit = "steps" if published.num_steps else "epochs"
        length += f" (published: {published.num_steps or published.epochs} {unit})"
    warmup = protocol.settings[-1].warmup
    entries = [
        f"{blocks}one query, {layers} with {num_heads} heads, linear layer",
        f"AdamW with betas {protocol.betas[0]:g} and {protocol.betas[1]:g}",
        f"learning rates times {protocol.batch_size / protocol.lr_batch_size:g} for this batch"
        if protocol.lr_batch_size
        else "",
        batch,
        length,
        "cosine to 0 by steps",
        f"warm-up over the first {warmup:.0%} of the steps" if warmup else "",
        {
            "all": "weight decay on all weights",
            "not biases": "weight decay not on biases",
            "matrices": "weight decay on matrices only",
        }[protocol.decayed],
        f"gradients clipped to a norm of {protocol.clip_norm:g}" if protocol.clip_norm else "",
    ]
    return ", ".join(filter(None, entries))
