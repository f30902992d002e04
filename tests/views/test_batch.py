"""Batches are sliced and concatenated with their masks, and a mask becomes a grid."""

import pytest
import torch

from ssl_pretrain.views.batch import Batch, MaskSet, TextSet, blank_texts, concatenate


def build_masks(name="visible", view=0):
    indices = torch.tensor([[[3, 1]], [[0, 0]], [[0, 2]], [[2, 0]]])
    valid = torch.tensor([[[True, True]], [[True, False]], [[True, True]], [[True, False]]])
    return MaskSet(name, view, indices, valid)


def build_batch():
    numbers = torch.arange(4)
    views = [torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)]
    ids = torch.arange(12).view(4, 3)
    texts = (TextSet(ids, ids % 3 < 2), TextSet(ids + 1, ids > 0))
    return Batch(views, numbers, numbers, (build_masks(), build_masks("targets")), texts)


def test_a_grid_marks_the_valid_patches():
    grid = build_masks().as_grid(4)
    expected = [[0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]]
    assert grid.int().tolist() == expected


def test_padding_does_not_unmark_patch_0():
    masks = MaskSet("masked", 0, torch.tensor([[[0, 2, 0]]]), torch.tensor([[[True, True, False]]]))
    assert masks.as_grid(3).tolist() == [[True, False, True]]


def test_slices_carry_their_masks_and_concatenate_to_the_batch():
    batch = build_batch()
    slices = [batch.slice(k, 2) for k in range(2)]
    assert slices[1].masks[0].indices.tolist() == [[[0, 2]], [[2, 0]]]
    whole = concatenate(slices)
    assert torch.equal(whole.views[0], batch.views[0])
    for masks, expected in zip(whole.masks, batch.masks, strict=True):
        assert (masks.name, masks.view) == (expected.name, expected.view)
        assert torch.equal(masks.indices, expected.indices)
        assert torch.equal(masks.valid, expected.valid)


def test_slices_carry_their_texts_and_concatenate_to_the_batch():
    batch = build_batch()
    slices = [batch.slice(k, 2) for k in range(2)]
    assert slices[1].texts[1].ids.tolist() == [[7, 8, 9], [10, 11, 12]]
    for texts, expected in zip(concatenate(slices).texts, batch.texts, strict=True):
        assert torch.equal(texts.ids, expected.ids) and torch.equal(texts.valid, expected.valid)


def test_blank_texts_have_the_shapes_of_a_run():
    first, second = blank_texts([5, 7], 3, "cpu")
    assert (first.ids.shape, second.valid.shape) == ((3, 5), (3, 7))
    assert first.ids.dtype == torch.int64 and second.valid.all()


def test_masks_are_found_by_name():
    batch = build_batch()
    assert batch.masks_named("targets") == [batch.masks[1]]
    assert batch.masks_named("context") == []


def test_a_slice_must_be_even():
    with pytest.raises(ValueError, match="a batch of 4 images does not divide into 3 equal slices"):
        build_batch().slice(0, 3)
