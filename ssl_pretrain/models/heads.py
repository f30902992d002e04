"""Heads that map features to embeddings, discarded after pretraining."""

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
    """Build linear layers with ReLU between them, (rows, in_dim) -> (rows, dims[-1]).

    Args:
        in_dim: Width of the input.
        dims: Widths of the layers.
        batch_norm: Normalize the hidden layers. Their Linear then has no bias, which the norm would
            remove.
        last_batch_norm: Normalize the output too.
        last_affine: Give the output's norm a scale and a shift.
        last_shift: Give the output's norm a shift. False leaves the scale alone, as SimCLR's
            `center=False`.
        hidden_bias: Give hidden layers a bias before their norm, as the authors of BYOL, SwAV and
            VICReg do.
        last_bias: Give the last Linear a bias if no norm follows it.
        init_std: Standard deviation of every Linear's initial weights. None for torch's default.

    Raises:
        ValueError: There are no widths, or one is not positive.
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
