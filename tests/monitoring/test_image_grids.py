"""Pictures of views show their masks: hidden patches are gray, and targets have a color each."""

import pytest
import torch

from ssl_pretrain.monitoring.image_grids import BLUE, NUM_IMAGES, ORANGE, view_grid
from ssl_pretrain.views.batch import Batch, MaskSet
from ssl_pretrain.views.mask_recipe import Mask
from ssl_pretrain.views.recipe import Crop, ViewsConfig

PATCH = 8
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def draw_grid(*mask_sets):
    """Draw ten pairs of white views of 4 x 4 and 2 x 2 patches, and return the picture's cells."""
    config = ViewsConfig(
        {
            "global": Crop(count=1, size=32, mask=Mask("random", patch_size=PATCH)),
            "local": Crop(count=1, size=16),
        },
        MEAN,
        STD,
    )
    white = [(1 - mean) / std for mean, std in zip(MEAN, STD)]
    views = [torch.tensor(white).view(3, 1, 1).expand(10, 3, size, size) for size in (32, 16)]
    numbers = torch.arange(10)
    picture = view_grid(Batch(views, numbers, numbers, mask_sets), config)
    assert picture.shape[1] == NUM_IMAGES * 34 + 2
    return [cell[:, :, 2:] for cell in picture[:, 2:34].split(34, dim=2) if cell.shape[2] == 34]


def build_masks(name, *masks):
    indices = torch.tensor(masks).expand(10, -1, -1)
    return MaskSet(name, 0, indices, torch.ones_like(indices, dtype=torch.bool))


def patch_colors(cell):
    """Return the color in the middle of each of the 4 x 4 patches."""
    return cell[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].flatten(1).T


def test_views_without_masks_have_no_picture_of_masks():
    assert len(draw_grid()) == 2


@pytest.mark.parametrize(("name", "hidden_first"), [("visible", False), ("masked", True)])
def test_hidden_patches_are_gray(name, hidden_first):
    view, masks, local = draw_grid(build_masks(name, [0, 1, 5]))
    assert (view == 1).all() and (local == 1).all()
    colors = patch_colors(masks)
    chosen = torch.zeros(16, dtype=torch.bool)
    chosen[[0, 1, 5]] = True
    hidden = chosen if hidden_first else ~chosen
    assert (colors[~hidden] == 1).all()
    torch.testing.assert_close(colors[hidden], torch.full_like(colors[hidden], 0.575))


def test_each_target_has_a_color_and_a_frame_beside_the_context():
    context = build_masks("context", [12, 13])
    targets = build_masks("targets", [0, 1, 4, 5], [2, 3, 6, 7])
    masks = draw_grid(context, targets)[1]
    colors = patch_colors(masks)
    assert (colors[[12, 13]] == 1).all()
    torch.testing.assert_close(colors[[8, 14]], torch.full((2, 3), 0.575))
    for corner, rgb in ((0, BLUE), (2, ORANGE)):
        tinted = 0.6 + 0.4 * torch.tensor(rgb)
        torch.testing.assert_close(colors[[corner, corner + 5]], tinted.expand(2, 3))
        torch.testing.assert_close(masks[:, 0, corner * PATCH], torch.tensor(rgb))


def test_rectangular_views_are_in_tiles_that_hold_all_of_them():
    mask = Mask("random", patch_size=PATCH)
    crops = {
        "wide": Crop(count=1, size=[16, 40], mask=mask),
        "tall": Crop(count=1, size=[24, 16]),
    }
    white, numbers = [torch.ones(2, 3, 16, 40), torch.ones(2, 3, 24, 16)], torch.arange(2)
    visible = torch.tensor([[[0, 4, 7]]]).expand(2, 1, 3)  # of 2 x 5 patches
    masks = MaskSet("visible", 0, visible, torch.ones_like(visible, dtype=torch.bool))
    config = ViewsConfig(crops, [0.0] * 3, [1.0] * 3)
    picture = view_grid(Batch(white, numbers, numbers, (masks,)), config)
    assert picture.shape == (3, 2 * 26 + 2, 3 * 42 + 2)  # tiles of 24 x 40 and gaps of 2 pixels
    cell = picture[0, 2:18, 44:84]
    is_visible = cell[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH] == 1
    assert is_visible.tolist() == [
        [True, False, False, False, True],
        [False, False, True, False, False],
    ]
