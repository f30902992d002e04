"""CPC v2 against its paper's appendix (no official code), patch by patch."""

import math
import re
from dataclasses import replace

import contract
import pytest
import torch

from ssl_pretrain.losses.patch_prediction import orient
from ssl_pretrain.optim.optimizers import OptimConfig

VIEWS = (20,)
HAS_PAIR = False
METHOD = {
    "patch_size": 8,
    "stride": 4,
    "context_dim": 4,
    "num_blocks": 2,
    "num_directions": 2,
    "rows_ahead": [1, 2],
    "target_dim": 3,
    "scale": 0.5,
}
OPTIM = OptimConfig(
    name="adam",
    base_lr=0.01,
    lr_scaling="none",
    warmup_epochs=0.0,
    weight_decay=1e-5,
    exclude_by="none",
)


def plain_loss(method, images, columns=4):
    """Mean cross entropy of each prediction over the 4 x columns patches of all images."""
    view, n = images.views[0], len(images)
    positions = [(i, j) for i in range(4) for j in range(columns)]
    patches = [view[:, :, 4 * i : 4 * i + 8, 4 * j : 4 * j + 8] for i, j in positions]
    features = method.backbone(torch.cat(patches))
    grid = torch.stack(features.split(n), dim=2).view(n, 6, 4, columns)
    targets = method.project(grid)
    all_targets = torch.stack([targets[b, :, i, j] for b in range(n) for i, j in positions])
    loss = torch.zeros((), dtype=torch.float64)
    for direction, context in enumerate(method.contexts):
        flip = (lambda x: x) if direction == 0 else (lambda x: x.flip(2))
        for rows_ahead, predictions in zip((1, 2), context(flip(grid)).unbind(1)):
            terms = []
            for b in range(n):
                for i in range(4 - rows_ahead):
                    for j in range(columns):
                        scaled_prediction = 0.5 * predictions[b, :, i, j]
                        positive = scaled_prediction @ flip(targets)[b, :, i + rows_ahead, j]
                        terms.append(torch.logsumexp(all_targets @ scaled_prediction, 0) - positive)
            loss = loss + sum(terms) / len(terms) / 2
    return loss


def test_one_step_is_the_papers():
    method, images = contract.build("cpc"), contract.random_batch("cpc", rows=6)
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    contract.apply_plain_step(expected, OPTIM, plain_loss(expected, images), 0.01)
    contract.assert_same(method, expected)


def wide_batch():
    batch = contract.random_batch("cpc", rows=6)
    return replace(batch, views=[torch.cat([batch.views[0], batch.views[0].flip(2)[..., :8]], 3)])


def test_one_step_on_rectangles_is_the_papers():
    method, images = contract.build("cpc"), wide_batch()
    assert images.views[0].shape[2:] == (20, 28)
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    loss = plain_loss(expected, images, columns=6)
    contract.apply_plain_step(expected, OPTIM, loss, 0.01)
    contract.assert_same(method, expected)


def test_four_directions_need_as_many_rows_as_columns():
    with pytest.raises(ValueError) as error:
        contract.build("cpc", num_directions=4)(wide_batch())
    assert str(error.value) == (
        "method.num_directions: 4 predicts rows and columns, which have different lengths in a "
        "grid of 4 x 6 patches; give 2 or 1 to predict rows only, or square views"
    )


@pytest.mark.parametrize("row", range(4))
def test_a_prediction_sees_its_own_row_and_those_before(row):
    context = contract.build("cpc").contexts[0]
    grid = torch.randn(1, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    context(grid)[0][:, :, row].sum().backward()
    is_seen = grid.grad.abs().sum((0, 1, 3)) > 0
    assert is_seen[row]
    assert not is_seen[row + 1 :].any()


def test_each_direction_orients_the_grid():
    grid = torch.arange(9.0).view(1, 1, 3, 3)  # row by row
    first_rows = [orient(grid, direction)[0, 0, 0].tolist() for direction in range(4)]
    assert first_rows == [[0, 1, 2], [6, 7, 8], [0, 3, 6], [2, 5, 8]]


def test_the_loss_of_a_guess_is_the_log_of_the_number_of_patches():
    method = contract.build("cpc")
    zeros = {
        "targets": torch.zeros(5, 48, dtype=torch.float64),
        "predictions": torch.zeros(5, 2, 2, 3, 4, 4, dtype=torch.float64),
    }
    assert method.loss(zeros, {})[0].item() == pytest.approx(2 * math.log(5 * 16))


def test_a_grid_that_is_too_small_is_refused():
    message = (
        "method.rows_ahead: [1, 4] does not fit a grid of 4 x 4 patches; give smaller distances, "
        "or lower method.stride or method.patch_size"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        contract.build("cpc", rows_ahead=[1, 4])(contract.random_batch("cpc"))
