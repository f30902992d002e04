"""Loss of CPC: rows of patches are predicted from the rows before them."""

from collections.abc import Sequence

from torch import Tensor

from ssl_pretrain.distributed import collectives
from ssl_pretrain.losses.arguments import check_positive
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.losses.tiles import log_sum_exp


def cpc(
    predictions: Tensor, targets: Tensor, *, rows_ahead: Sequence[int], scale: float = 0.1
) -> Tensor:
    """InfoNCE loss of CPC v2: each prediction is matched with its patch among those of all images.

    Implements appendix A of Hénaff et al., ICML 2020 (arXiv:1905.09272). The candidates are the
    patches of all images of the global batch. Logits are inner products.

    Args:
        predictions: Shape (local_batch, directions, len(rows_ahead), dim, rows, columns). The entry
            at row i, in direction d and with ``rows_ahead[k]``, predicts row ``i + rows_ahead[k]``
            of ``orient(targets, d)``.
        targets: Embeddings of a grid of patches, shape (local_batch, dim, rows, columns). With more
            than 2 directions, the grid must be square.
        rows_ahead: Distances in rows from a prediction to its patch.
        scale: Factor of the predictions (dimensionless). The paper uses 0.1.

    Returns:
        Scalar mean over this rank's predictions, in nats, summed over ``rows_ahead`` and averaged
        over directions. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes do not match, a distance does not fit the grid, or the scale is
            not positive.

    Example:
        >>> predictions, targets = torch.zeros(2, 4, 1, 3, 5, 5), torch.randn(2, 3, 5, 5)
        >>> cpc(predictions, targets, rows_ahead=[2])  # ln(2 * 5 * 5)
        tensor(3.91...)
    """
    _check_grids(predictions, targets, rows_ahead)
    check_positive("cpc", scale=scale)
    predictions, grid = upcast(predictions), upcast(targets)
    candidates = collectives.gather(flatten_patches(grid))  # all patches of all images
    num_directions = predictions.shape[1]
    loss = predictions.new_zeros(())
    for direction in range(num_directions):
        for i, ahead in enumerate(rows_ahead):
            predicted = predictions[:, direction, i, :, :-ahead]
            queries = scale * flatten_patches(predicted)
            positives = flatten_patches(orient(grid, direction)[:, :, ahead:])
            positive_logits = (queries * positives).sum(1)
            loss = loss + (log_sum_exp(queries, candidates) - positive_logits).mean()
    return loss / num_directions


def flatten_patches(grid: Tensor) -> Tensor:
    """Flatten a grid of patches, (images, dim, height, width) -> (patches, dim)."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def orient(grid: Tensor, direction: int) -> Tensor:
    """Flip or transpose a grid of patches so that the rows to predict from come first.

    Args:
        grid: Shape (images, dim, rows, columns).
        direction: Side of the grid to predict from: the top (0), the bottom (1), the left (2) or
            the right (3).
    """
    orientations = grid, grid.flip(2), grid.transpose(2, 3), grid.flip(3).transpose(2, 3)
    return orientations[direction]


def _check_grids(predictions: Tensor, targets: Tensor, rows_ahead: Sequence[int]) -> None:
    """Raise ValueError unless the arguments of `cpc` match."""
    if targets.ndim != 4 or (targets.shape[2] != targets.shape[3] and predictions.shape[1] > 2):
        raise ValueError(
            f"cpc: targets must be (local_batch, dim, side, side), got {tuple(targets.shape)}"
        )
    images, *patch_shape = targets.shape
    expected = images, len(rows_ahead), *patch_shape
    if predictions.ndim != 6 or (len(predictions), *predictions.shape[2:]) != expected:
        raise ValueError(
            f"cpc: predictions must be ({images}, directions, "
            f"{', '.join(map(str, expected[1:]))}), got {tuple(predictions.shape)}"
        )
    if not 1 <= predictions.shape[1] <= 4:
        raise ValueError(
            f"cpc: predictions must have 1 to 4 directions, got {predictions.shape[1]}"
        )
    _, rows, columns = patch_shape
    if not all(1 <= ahead < rows for ahead in rows_ahead):
        raise ValueError(
            f"cpc: rows_ahead must be from 1 to {rows - 1} on a grid of {rows} x {columns} "
            f"patches, got {list(rows_ahead)}"
        )
