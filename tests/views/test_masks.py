"""Masks follow their recipe, and do not depend on ranks, workers or the other images."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ssl_pretrain.methods.base import Method
from ssl_pretrain.schema.image_sizes import height_and_width
from ssl_pretrain.views import mask_recipe, masks, recipe
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.mask_recipe import Mask
from ssl_pretrain.views.recipe import Crop, ViewsConfig

pytestmark = pytest.mark.promise

SIDE = 14  # patches of 224 pixels
RECIPES = {
    "random": Mask("random"),
    "dinov2": Mask("blocks"),
    "dinov3": Mask("blocks", block_sampler="dinov3"),
    "ibot": Mask("blocks", block_sampler="ibot", min_patches=0),
    "multiblock": Mask("multiblock"),
    "multiblock_random": Mask("multiblock", context_trim="random"),
    "inverse_block": Mask("inverse_block", ratio=0.65),
}
every_recipe = pytest.mark.parametrize("mask", RECIPES.values(), ids=RECIPES.keys())


def build_views(mask: Mask, count: int = 2, size: int | list[int] = 224) -> ViewsConfig:
    return ViewsConfig({"global": Crop(count=count, size=size, mask=mask), "local": Crop(size=96)})


def draw(mask, indices=None, *, count=2, size=224, seed=0, epoch=0, step=0, first=0, total=None):
    indices = np.arange(12) if indices is None else indices
    return masks.draw(
        build_views(mask, count, size),
        masks.Position(
            seed=seed,
            epoch=epoch,
            step=step,
            indices=indices,
            first_slot=first,
            global_batch_size=total or len(indices),
        ),
    )


def draw_grids(mask, num_images, **options) -> list[np.ndarray]:
    """Return each set of masks as bool (images, masks per image, rows, columns)."""
    height, width = height_and_width(options.setdefault("size", 224))
    grid = height // mask.patch_size, width // mask.patch_size
    return [
        torch.stack(
            [mask_set.as_grid(math.prod(grid), k) for k in range(mask_set.indices.shape[1])], dim=1
        )
        .view(num_images, -1, *grid)
        .numpy()
        for mask_set in draw(mask, np.arange(num_images), **options)
    ]


def bounding_box(grid: np.ndarray) -> tuple[int, int]:
    rows, columns = np.flatnonzero(grid.any(1)), np.flatnonzero(grid.any(0))
    return np.ptp(rows) + 1, np.ptp(columns) + 1


@every_recipe
def test_the_recipes_are_accepted_and_have_the_shapes_of_blank_masks(mask):
    recipe.check(build_views(mask))
    blanks = masks.blank(build_views(mask), 12, "cpu")
    for mask_set, blank in zip(draw(mask), blanks, strict=True):
        assert (mask_set.name, mask_set.view) == (blank.name, blank.view)
        for tensor, expected in (
            (mask_set.indices, blank.indices),
            (mask_set.valid, blank.valid),
        ):
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
        assert blank.indices.max() < SIDE**2 and blank.valid.all()


@every_recipe
def test_patches_are_in_raster_order_and_padding_has_index_0(mask):
    for mask_set in draw(mask):
        indices, valid = mask_set.indices, mask_set.valid
        assert (indices[~valid] == 0).all()
        assert not (valid[..., 1:] & ~valid[..., :-1]).any()  # padding comes last
        increases = indices[..., 1:] > indices[..., :-1]
        assert increases[valid[..., 1:]].all()
        assert indices.max() < SIDE**2


@every_recipe
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_draw_the_masks_of_one_process(mask, world_size):
    images = np.random.default_rng(0).permutation(1000)[:12]
    local_size = 12 // world_size
    for step in (0, 7):
        whole = draw(mask, images, step=step, epoch=step)
        local = [
            draw(
                mask,
                images[rank * local_size : (rank + 1) * local_size],
                step=step,
                epoch=step,
                first=rank * local_size,
                total=12,
            )
            for rank in range(world_size)
        ]
        for mask_set, *parts in zip(whole, *local, strict=True):
            assert torch.equal(mask_set.indices, torch.cat([part.indices for part in parts]))
            assert torch.equal(mask_set.valid, torch.cat([part.valid for part in parts]))


@every_recipe
def test_masks_differ_between_views_images_epochs_and_seeds(mask):
    digests = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        for mask_set in draw(mask, np.arange(32), seed=seed, epoch=epoch, step=10 * epoch):
            digests.append((mask_set.name, mask_set.indices.numpy().tobytes()))
            assert len({row.numpy().tobytes() for row in mask_set.indices}) > 10
    assert len(set(digests)) == len(digests)


@every_recipe
def test_the_callers_random_state_does_not_matter(mask):
    np.random.seed(0)
    torch.manual_seed(0)
    first = draw(mask)
    np.random.seed(1)
    torch.manual_seed(1)
    for mask_set, other in zip(first, draw(mask), strict=True):
        assert torch.equal(mask_set.indices, other.indices)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("random", "abcd49f269f8c27b"),
        ("dinov2", "02ab0dcfff429d11"),
        ("dinov3", "d7bb12021618e936"),
        ("ibot", "4b3aab049721140b"),
        ("multiblock", "eef1daff8ffafce3"),
        ("multiblock_random", "6036b4fd17a36ef9"),
        ("inverse_block", "64d7e65741fd2c04"),
    ],
)
def test_the_masks_do_not_change(name, digest):
    sha256 = hashlib.sha256()
    for step in (0, 12345):
        for mask_set in draw(RECIPES[name], seed=5, epoch=step, step=step):
            sha256.update(mask_set.indices.numpy().tobytes())
    assert sha256.hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("ratio", "size", "expected"), [(0.75, 224, 49), (0.75, 96, 9), (0.9, 160, 9), (0.5, 48, 4)]
)
def test_random_masks_keep_as_many_patches_as_mae(ratio, size, expected):
    visible = draw(Mask("random", ratio=ratio), size=size)[0]
    assert visible.valid.all() and visible.indices.shape == (12, 1, expected)
    assert expected == int((size // 16) ** 2 * (1 - ratio))


def test_every_patch_is_visible_equally_often():
    visible = draw(Mask("random"), np.arange(20_000), count=1)[0]
    shares = np.bincount(visible.indices.flatten(), minlength=SIDE**2) / 20_000
    np.testing.assert_allclose(shares, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 20_000))


def test_dinov2_masks_half_of_the_views_of_the_global_batch_with_evenly_spread_ratios():
    first, second = draw_grids(RECIPES["dinov3"], 64)
    counts = sorted(np.concatenate([first, second]).sum((1, 2, 3)))
    ratios = np.linspace(0.1, 0.5, 65)[1:]
    assert counts == [0] * 64 + [int(SIDE**2 * ratio + 1e-9) for ratio in ratios]
    both = np.concatenate(draw_grids(RECIPES["dinov2"], 64)).sum((1, 2, 3))
    assert (both == 0).sum() == 64
    assert (np.sort(both)[64:] <= counts[64:]).all()


def test_the_probability_is_the_share_of_views_with_a_mask():
    for probability, expected in ((0.25, 32), (1.0, 128)):
        mask = Mask("blocks", probability=probability)
        both = np.concatenate(draw_grids(mask, 64)).sum((1, 2, 3))
        assert (both > 0).sum() == expected


def test_ibot_draws_each_view_independently():
    grids = np.concatenate(draw_grids(RECIPES["ibot"], 2000)).sum((1, 2, 3))
    masked = grids[grids > 0]
    assert abs(len(masked) / 4000 - 0.5) < 0.04
    assert masked.max() <= SIDE**2 // 2
    alone = draw(RECIPES["ibot"], np.array([7]), first=3, total=64)
    batch = draw(RECIPES["ibot"], np.arange(12))
    assert torch.equal(alone[1].indices[0], batch[1].indices[7])


def test_a_block_is_a_rectangle_in_range():
    mask = Mask("blocks", ratio_range=[0.2, 0.2], aspect=[1.0, 1.0], min_patches=30)
    grids = np.concatenate(draw_grids(mask, 200))
    sizes = {bounding_box(grid[0]) for grid in grids if grid.sum() in (25, 36)}
    assert sizes == {(5, 5), (6, 6)}


def test_targets_of_a_step_have_one_size_and_leave_out_the_last_row_and_column():
    sizes = set()
    for step in range(200):
        _, targets = draw_grids(RECIPES["multiblock"], 4, step=step, count=1)
        boxes = {bounding_box(grid) for image in targets for grid in image}
        assert len(boxes) == 1
        height, width = boxes.pop()
        assert (targets.sum((2, 3)) == height * width).all()
        assert not targets[:, :, -1].any() and not targets[..., -1].any()
        sizes.add((height, width))
    assert sizes == {(5, 6), (6, 5), (6, 6), (7, 5), (8, 5)}  # by the authors' formula


def test_a_context_has_no_patch_of_a_target():
    for step in range(20):
        context, targets = draw_grids(RECIPES["multiblock"], 64, step=step, count=1)
        assert not (context & targets).any()
        assert (context.sum((1, 2, 3)) > 10).all()


def test_contexts_are_trimmed_to_the_first_or_to_random_patches():
    untrimmed = draw_grids(Mask("multiblock", context_patches=169), 64, count=1)[0]
    first = draw_grids(Mask("multiblock", context_patches=30), 64, count=1)[0]
    any_patches = draw_grids(
        Mask("multiblock", context_patches=30, context_trim="random"), 64, count=1
    )[0]
    for whole, start, some in zip(untrimmed, first, any_patches, strict=True):
        expected = np.flatnonzero(whole)[:30]
        assert np.flatnonzero(start).tolist() == expected.tolist()
        assert some.sum() == len(expected) and not (some & ~whole).any()
    assert any_patches[:, 0, SIDE // 2 :].sum() > 2 * first[:, 0, SIDE // 2 :].sum()


def test_targets_stay_in_a_context_that_would_be_too_small():
    mask = Mask("multiblock", target_scale=[0.8, 0.8], aspect=[1.0, 1.0], min_keep=100)
    context, targets = draw_grids(mask, 16, count=1, size=224)
    recipe.check(build_views(mask))
    whole = draw_grids(Mask(**vars(mask) | {"context_patches": 169}), 16, count=1)[0]
    assert (whole.sum((1, 2, 3)) > 100).all()
    assert (whole & targets).any() and context.any()


def test_the_visible_patches_of_capi_are_one_block():
    mask = Mask("inverse_block", ratio=0.65, roll=False)
    for grid in draw_grids(mask, 100, count=1)[0]:
        height, width = bounding_box(grid[0])
        assert grid.sum() == SIDE**2 - int(SIDE**2 * 0.65) == 69
        assert height * width - width < 69 <= height * width
    rolled = draw_grids(RECIPES["inverse_block"], 100, count=1)[0]
    assert any(bounding_box(grid[0])[0] == SIDE for grid in rolled)


WIDE, TALL = [64, 256], [256, 96]  # 4 x 16 and 16 x 6 patches
RECTANGLE_RECIPES = {
    **RECIPES,
    "multiblock": Mask("multiblock", min_keep=4),
    "multiblock_random": Mask("multiblock", min_keep=4, context_trim="random"),
}


@pytest.mark.parametrize("size", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("mask", RECTANGLE_RECIPES.values(), ids=RECTANGLE_RECIPES.keys())
def test_masks_of_rectangles_have_the_shapes_of_blank_masks_and_reach_all_patches(mask, size):
    views = build_views(mask, size=size)
    recipe.check(views)
    for mask_set, blank in zip(draw(mask, size=size), masks.blank(views, 12, "cpu"), strict=True):
        assert mask_set.indices.shape == blank.indices.shape
    is_reached = draw_grids(mask, 3000, size=size, count=1)[0].any((0, 1))
    if mask.kind == "multiblock":  # the place of a context excludes the last row and column
        is_reached = is_reached[:-1, :-1]
    # Trimmed contexts are the first patches, and so lack the last rows of a tall view.
    assert is_reached.all() or (mask.kind == "multiblock" and mask.context_trim == "first")


@pytest.mark.parametrize(
    ("size", "aspect", "box"), [(WIDE, 1 / 3, (2, 6)), (TALL, 3.0, (8, 3))], ids=["wide", "tall"]
)
def test_blocks_of_rectangles_are_longer_than_the_shorter_side(size, aspect, box):
    num_patches = size[0] * size[1] // 16**2
    share = math.prod(box) / num_patches
    mask = Mask(
        "blocks",
        probability=1.0,
        ratio_range=[share, share],
        aspect=[aspect, aspect],
        min_patches=math.prod(box),  # a single block takes the whole share
    )
    recipe.check(build_views(mask, size=size))
    places = set()
    for grid in np.concatenate(draw_grids(mask, 500, size=size))[:, 0]:
        assert bounding_box(grid) == box and grid.sum() == math.prod(box)
        places.add(int(grid.argmax()))
    rows, columns = size[0] // 16, size[1] // 16
    assert len(places) == (rows - box[0] + 1) * (columns - box[1] + 1)


@pytest.mark.parametrize("size", [WIDE, TALL], ids=["wide", "tall"])
def test_targets_and_contexts_of_rectangles_have_the_sizes_of_the_authors_formula(size):
    rows, columns = size[0] // 16, size[1] // 16
    mask = Mask("multiblock", min_keep=0, context_patches=rows * columns // 2)
    expected = set()
    for u in np.linspace(0, 1, 2001):  # I-JEPA's _sample_block_size, at 52c1ae95
        area, ratio = int(rows * columns * (0.15 + u * 0.05)), 0.75 + u * 0.75
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        expected.add((min(height, rows - 1), min(width, columns - 1)))
    sizes = set()
    for step in range(200):
        _, targets = draw_grids(mask, 4, size=size, step=step, count=1)
        boxes = {bounding_box(grid) for image in targets for grid in image}
        assert len(boxes) == 1
        sizes |= boxes
    assert sizes == expected
    # A context of the view's shape covers the share of the area that context_scale states.
    low, high = mask_recipe.context_areas(mask, mask_recipe.Grid(rows, columns))
    assert 0.6 * rows * columns < low <= high == (rows - 1) * (columns - 1)


@pytest.mark.parametrize("size", [WIDE, TALL], ids=["wide", "tall"])
def test_the_visible_patches_of_capi_are_one_block_of_a_rectangle(size):
    mask = Mask("inverse_block", ratio=0.65, roll=False, aspect=[0.1, 10.0])
    num_patches, lengths = size[0] * size[1] // 16**2, set()
    for grid in draw_grids(mask, 200, size=size, count=1)[0]:
        height, width = bounding_box(grid[0])
        count = num_patches - int(num_patches * 0.65)
        assert grid.sum() == count and height * width - width < count <= height * width
        lengths |= {height, width}
    assert max(lengths) > min(size) // 16  # the block uses the longer side


@pytest.mark.parametrize(
    ("mask", "size", "message"),
    [
        (
            Mask("random"),
            [64, 100],
            "patch_size: 16 does not divide the view's 64x100 pixels; give the backbone's patch "
            "size, and views.crops.*.size as a multiple of it",
        ),
        (
            Mask("inverse_block", ratio=0.25),
            WIDE,
            "aspect: [] has no block of 48 patches that fits in a view of 4 x 16 patches; give a "
            "range that contains 0.25",
        ),
        (
            Mask("blocks", aspect=[3.0, 4.0], min_patches=20),
            WIDE,
            "aspect: [3, 4] has no block of 20 to 31 patches that fits in a view of 4 x 16 "
            "patches; give a range that contains 0.25, or smaller patches",
        ),
        (
            Mask("random"),
            100,
            "patch_size: 16 does not divide the view's 100 pixels; give the backbone's patch size, "
            "and views.crops.*.size as a multiple of it",
        ),
        (
            Mask("random", ratio=0.999),
            224,
            "ratio: 0.999 leaves 0 of the view's 196 patches visible; give a ratio that masks some "
            "patches and leaves others, or smaller patches",
        ),
        (
            Mask("inverse_block", ratio=0.001),
            224,
            "ratio: 0.001 leaves 196 of the view's 196 patches visible; give a ratio that masks "
            "some patches and leaves others, or smaller patches",
        ),
        (
            Mask("inverse_block", ratio=0.25, aspect=[2.0, 3.0]),
            224,
            "aspect: [2.0, 3.0] has no block of 147 patches that fits in a view of 14 x 14 "
            "patches; give a range that contains 1",
        ),
        (
            Mask("blocks", aspect=[3.0]),
            224,
            "aspect: [3.0] is not a range; give [low, high] with 0 < low <= high",
        ),
        (
            Mask("blocks", ratio_range=[0.5, 1.5]),
            224,
            "ratio_range: [0.5, 1.5] is not a range; give [low, high] with 0 < low <= high <= 1",
        ),
        (
            Mask("blocks"),
            16,
            "ratio_range: [0.1, 0.5] masks none of the view's 1 patches; give a higher range, or "
            "smaller patches",
        ),
        (
            Mask("blocks", ratio_range=[0.01, 0.0625]),  # a share below 1 of 16 patches
            64,
            "ratio_range: [0.01, 0.0625] masks none of the view's 16 patches; give a higher range, "
            "or smaller patches",
        ),
        (
            Mask("blocks", ratio_range=[1.0, 1.0], block_sampler="dinov3"),
            16,
            "patch_size: 16 makes a view of 1 x 1 patches, in which no block fits; give smaller "
            "patches",
        ),
        (
            Mask("blocks"),
            32,
            "min_patches: 4 is more than 1, the area of the largest block in a view of 2 x 2 "
            "patches; give 1, or a higher views.crops.global.mask.ratio_range",
        ),
        (
            Mask("blocks", min_patches=150),
            224,
            "min_patches: 150 is more than 97, the area of the largest block in a view of 14 x 14 "
            "patches; give 1 to 97, or a higher views.crops.global.mask.ratio_range",
        ),
        (
            Mask("blocks", block_sampler="ibot", min_patches=0, ratio_range=[0.05, 0.05]),
            224,
            "min_patches: 0 stands for 16, which is more than 9, the area of the largest block in "
            "a view of 14 x 14 patches; give 1 to 9, or a higher "
            "views.crops.global.mask.ratio_range",
        ),
        (
            Mask("blocks", block_sampler="ibot", aspect=[10.0, 20.0]),
            64,
            "aspect: [10, 20] has no block of 4 to 7 patches that fits in a view of 4 x 4 patches; "
            "give a range that contains 1, or smaller patches",
        ),
        (
            Mask("multiblock"),
            96,
            "min_keep: 10 patches are not less than a target of 4 patches, the smallest in a view "
            "of 6 x 6 patches; give at most 3, or a larger views.crops.global.mask.target_scale",
        ),
        (
            Mask("multiblock"),
            16,
            "min_keep: 10 patches are not less than a target of 0 patches, the smallest in a view "
            "of 1 x 1 patches; give a larger views.crops.global.mask.target_scale",
        ),
        (
            Mask("multiblock", context_scale=[0.01, 0.1], target_scale=[0.1, 0.1]),
            224,
            "min_keep: 10 patches are not less than a context of 1 patches, the smallest in a view "
            "of 14 x 14 patches; give at most 0, or a larger views.crops.global.mask.context_scale",
        ),
        (
            Mask("multiblock", context_patches=170),
            224,
            "context_patches: 170 is more than the 169 patches of the largest context; give at "
            "most 169, or 0 for a quarter of the view",
        ),
        (
            Mask("grid"),
            224,
            "kind: 'grid' is not known; choose one of: none, random, blocks, multiblock, "
            "inverse_block",
        ),
        (
            Mask("random", ratio=1.0),
            224,
            "ratio: 1.0 is out of range; give a finite number > 0 and < 1",
        ),
    ],
)
def test_bad_masks_are_refused_with_key_value_and_remedy(mask, size, message):
    views = ViewsConfig({"global": Crop(size=size, mask=mask)})
    with pytest.raises(ValueError) as error:
        recipe.check(views)
    assert str(error.value) == f"views.crops.global.mask.{message}"


@pytest.mark.parametrize(
    ("mask", "views_per_image", "batch", "problem"),
    [
        (Mask("blocks"), 1, 1, "probability 0.5 masks 0.5 of a step's 1 views"),
        (
            Mask("blocks", probability=0.03, block_sampler="dinov3"),
            2,
            16,
            "probability 0.03 masks 0.96 of a step's 32 views",
        ),
    ],
)
def test_a_batch_without_any_masked_view_is_refused(mask, views_per_image, batch, problem):
    views = build_views(mask, views_per_image)
    with pytest.raises(ValueError) as error:
        recipe.check_batch(views, batch)
    assert str(error.value) == (
        f"global_batch_size: {batch} with views.crops.global.mask.{problem}, which is rounded down "
        f"to none; give {batch + 1} or more, or a higher probability"
    )
    for size, is_masked in ((batch, False), (batch + 1, True)):
        grids = draw_grids(mask, size, count=views_per_image)
        assert bool(np.concatenate(grids).any()) == is_masked
    recipe.check_batch(views, batch + 1)
    recipe.check_batch(build_views(Mask("blocks", block_sampler="ibot"), views_per_image), 1)


def test_views_without_masks_have_none():
    views = ViewsConfig({"global": Crop()})
    assert masks.blank(views, 2, "cpu") == ()
    assert draw(Mask()) == ()


def test_a_method_without_its_masks_names_the_key():
    method = Method(SimpleNamespace(name="mae"), nn.Identity())
    numbers = torch.arange(12)
    batch = Batch([torch.zeros(12, 3, 224, 224)] * 2, numbers, numbers, draw(RECIPES["dinov2"]))
    assert [mask_set.view for mask_set in method.masks(batch, "masked")] == [0, 1]
    with pytest.raises(ValueError) as error:
        method.masks(batch, "visible")
    assert str(error.value) == (
        "mae: needs the masks 'visible', which no view has; "
        "set views.crops.*.mask.kind to random or inverse_block"
    )
