"""Features to embeddings: the heads that are thrown away after pretraining."""

from __future__ import annotations

from torch import nn


def mlp(
    in_dim: int,
    *dims: int,
    batch_norm: bool = True,
    last_batch_norm: bool = False,
    last_affine: bool = True,
    last_shift: bool = True,
    hidden_bias: bool = False,
    last_bias: bool = True,
    init_std: float | None = None,
) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between: (rows, in_dim) -> (rows, dims[-1]).

    Args:
        batch_norm: normalize the hidden layers; their Linear then has no bias, since the norm would remove it.
        hidden_bias: keep that bias all the same, as the authors of BYOL, SwAV and VICReg do.
        last_batch_norm: normalize the output too.
        last_affine: the output's norm has a scale and a shift.
        last_shift: the output's norm keeps its shift; False leaves scale alone (SimCLR: `center=False`).
        last_bias: the last Linear has a bias, where no norm follows it.
        init_std: normal initialization of every Linear's weight with this deviation; None keeps torch's.

    Raises:
        ValueError: no widths, or a width that is not positive.
    """
    if not dims or min(in_dim, *dims) < 1:
        raise ValueError(f"mlp: widths must be positive, got in_dim={in_dim}, dims={dims}")
    layers: list[nn.Module] = []
    for position, (width_in, width_out) in enumerate(zip((in_dim, *dims), dims)):
        last = position == len(dims) - 1
        normed = last_batch_norm if last else batch_norm
        layer = nn.Linear(
            width_in,
            width_out,
            bias=last_bias and not normed if last else hidden_bias or not normed,
        )
        if init_std is not None:
            nn.init.normal_(layer.weight, std=init_std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        layers.append(layer)
        if normed:
            layers.append(nn.BatchNorm1d(width_out, affine=not last or last_affine))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    if last_batch_norm and last_affine and not last_shift:
        norm = layers[-1]
        assert isinstance(norm, nn.BatchNorm1d), "the last layer is the norm"
        norm.register_parameter("bias", None)
    return nn.Sequential(*layers)
