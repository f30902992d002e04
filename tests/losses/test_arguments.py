"""A wrong argument of a loss is a ValueError that names the loss, the argument and its value."""

import pytest
import torch

from ssl_pretrain import losses

Z, ONE = torch.ones(4, 3), torch.ones(1, 3)
PAIR = {"z_a": Z, "z_b": Z}
SINGLE = {"z_a": ONE, "z_b": ONE}
VIEWS = {"p_a": Z, "p_b": Z, "z_a": Z, "z_b": Z}
NARROW_QUEUE = torch.ones(5, 2)
LOGITS = {"student_logits": torch.zeros(4, 3, 7), "teacher_logits": torch.zeros(4, 2, 7)}
GRIDS = {"predictions": torch.zeros(4, 2, 1, 3, 5, 5), "targets": torch.zeros(4, 3, 5, 5)}
PIXELS = {
    "predictions": torch.zeros(2, 6, 12),
    "images": torch.zeros(2, 3, 4, 6),
    "masked": torch.zeros(2, 6, dtype=torch.bool),
}

WRONG_SHAPES = [
    ("nt_xent", {"temperature": 0.1}),
    ("temperature_free", {}),
    ("decoupled", {"temperature": 0.1}),
    ("debiased", {"temperature": 0.1, "tau_plus": 0.1}),
    ("hard_negative", {"temperature": 0.1, "tau_plus": 0.1, "beta": 1.0}),
    ("supervised_contrastive", {"temperature": 0.1, "labels": torch.arange(4)}),
    ("align_uniform", {}),
    ("barlow_twins", {}),
    ("n_pair", {}),
    ("pairwise", {}),
    ("triplet", {}),
    ("vicreg", {}),
]
SINGLE_IMAGES = [
    ("nt_xent", {"temperature": 0.1}, "negative"),
    ("temperature_free", {}, "negative"),
    ("decoupled", {"temperature": 0.1}, "negative"),
    ("debiased", {"temperature": 0.1, "tau_plus": 0.1}, "negative"),
    ("supervised_contrastive", {"temperature": 0.1, "labels": torch.zeros(1).long()}, "negative"),
    ("align_uniform", {}, "uniformity"),
    ("barlow_twins", {}, "correlation"),
    ("n_pair", {}, "negative"),
    ("pairwise", {}, "negative"),
    ("triplet", {}, "negative"),
    ("vicreg", {}, "variance"),
]
OTHERS = [
    ("nt_xent", PAIR | {"temperature": 0}, "temperature must be > 0, got 0"),
    (
        "info_nce",
        {"queries": Z, "keys": Z, "temperature": float("nan")},
        "temperature must be > 0, got nan",
    ),
    (
        "info_nce",
        {"queries": ONE, "keys": ONE, "temperature": 0.1},
        "needs at least 2 images in the global batch, got 1, which has no negative",
    ),
    (
        "info_nce",
        {"queries": Z, "keys": Z[:2], "temperature": 0.1},
        "queries and keys must share one (local_batch, dim) shape, got (4, 3) and (2, 3)",
    ),
    (
        "info_nce",
        {"queries": Z, "keys": Z, "temperature": 0.1, "queue": NARROW_QUEUE},
        "the queue must be (queue_size, 3), got (5, 2)",
    ),
    (
        "ijepa",
        {"predictions": torch.zeros(4, 2, 3, 5), "targets": torch.zeros(4, 2, 3, 6)},
        "predictions and targets must both be (local_batch, blocks, patches, dim), got "
        "(4, 2, 3, 5) and (4, 2, 3, 6)",
    ),
    (
        "ijepa",
        {
            "predictions": torch.zeros(4, 2, 3, 5),
            "targets": torch.zeros(4, 2, 3, 5),
            "valid": torch.ones(4, 2, dtype=torch.bool),
        },
        "valid must be (4, 2, 3), got (4, 2)",
    ),
    (
        "moco",
        {"queries": Z, "keys": Z, "temperature": 0.1, "queue": NARROW_QUEUE},
        "the queue must be (queue_size, 3), got (5, 2)",
    ),
    (
        "moco",
        {"queries": Z, "keys": Z, "temperature": -1.0, "queue": None},
        "temperature must be > 0, got -1.0",
    ),
    (
        "moco",
        {"queries": ONE, "keys": ONE, "temperature": 0.1, "queue": None},
        "needs at least 2 images in the global batch, got 1, which has no negative",
    ),
    (
        "moco_v3",
        VIEWS | {"z_b": Z[:2], "temperature": 0.1},
        "p_a, p_b, z_a and z_b must share one (local_batch, dim) shape, "
        "got (4, 3), (4, 3), (4, 3) and (2, 3)",
    ),
    ("moco_v3", VIEWS | {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    (
        "nnclr",
        VIEWS | {"queue": NARROW_QUEUE, "temperature": 0.1},
        "the queue must be (queue_size, 3), got (5, 2)",
    ),
    ("nnclr", VIEWS | {"queue": Z, "temperature": 0.0}, "temperature must be > 0, got 0.0"),
    (
        "supervised_contrastive",
        PAIR | {"labels": torch.zeros(3), "temperature": 0.1},
        "labels must be (4,), one per image, got (3,)",
    ),
    (
        "supervised_contrastive",
        PAIR | {"labels": torch.zeros(4), "temperature": 0.1},
        "labels must be integers, got torch.float32",
    ),
    ("decoupled", PAIR | {"temperature": 0.1, "sigma": 0.0}, "sigma must be > 0, got 0.0"),
    ("debiased", PAIR | {"temperature": 0.1, "tau_plus": 1}, "tau_plus must be in [0, 1), got 1"),
    (
        "hard_negative",
        PAIR | {"temperature": 0.1, "tau_plus": 0.1, "beta": -1},
        "beta must be >= 0, got -1",
    ),
    (
        "image_text",
        {"images": Z, "texts": Z, "logit_scale": torch.tensor(10.0)},
        "logit_scale must be (4,), one per image, got ()",
    ),
    (
        "image_text",
        {"images": Z, "texts": Z[:2], "logit_scale": torch.ones(4)},
        "images and texts must share one (local_batch, dim) shape, got (4, 3) and (2, 3)",
    ),
    (
        "image_text",
        {"images": ONE, "texts": ONE, "logit_scale": torch.ones(1)},
        "needs at least 2 images in the global batch, got 1, which has no negative",
    ),
    (
        "sigmoid_image_text",
        {"images": Z, "texts": Z[0], "logit_scale": torch.ones(4), "logit_bias": torch.ones(4)},
        "images and texts must share one (local_batch, dim) shape, got (4, 3) and (3,)",
    ),
    (
        "sigmoid_image_text",
        {"images": Z, "texts": Z, "logit_scale": torch.ones(1), "logit_bias": torch.ones(4)},
        "logit_scale must be (4,), one per image, got (1,)",
    ),
    (
        "sigmoid_image_text",
        {"images": Z, "texts": Z, "logit_scale": torch.ones(4), "logit_bias": torch.ones(4, 1)},
        "logit_bias must be (4,), one per image, got (4, 1)",
    ),
    (
        "byol",
        VIEWS | {"p_a": Z[0]},
        "p_a, p_b, z_a and z_b must share one (local_batch, dim) shape, "
        "got (3,), (4, 3), (4, 3) and (4, 3)",
    ),
    (
        "simsiam",
        VIEWS | {"p_b": torch.ones(4, 2)},
        "p_a, p_b, z_a and z_b must share one (local_batch, dim) shape, "
        "got (4, 3), (4, 2), (4, 3) and (4, 3)",
    ),
    (
        "negative_cosine",
        {"prediction": Z, "target": Z[:2]},
        "prediction and target must share one (local_batch, dim) shape, got (4, 3) and (2, 3)",
    ),
    (
        "dino",
        LOGITS | {"student_logits": Z, "center": torch.zeros(7)},
        "student_logits must be (local_batch, views, num_prototypes) with at least 2 views, "
        "got (4, 3)",
    ),
    (
        "dino",
        LOGITS | {"teacher_logits": torch.zeros(4, 3, 7), "center": torch.zeros(7)},
        "teacher_logits must be (4, 2, 7), got (4, 3, 7)",
    ),
    ("dino", LOGITS | {"center": torch.zeros(1, 7)}, "center must be (7,), got (1, 7)"),
    (
        "dino",
        LOGITS | {"center": torch.zeros(7), "teacher_temperature": 0},
        "teacher_temperature must be > 0, got 0",
    ),
    (
        "swav",
        {"scores": torch.zeros(4, 1, 7)},
        "scores must be (local_batch, views, num_prototypes) with at least 2 views, got (4, 1, 7)",
    ),
    (
        "swav",
        {"scores": torch.zeros(4, 2, 7), "queue_scores": torch.zeros(8, 7)},
        "queue_scores must be (rows, 2, 7), got (8, 7)",
    ),
    ("swav", {"scores": torch.zeros(4, 2, 7), "epsilon": 0.0}, "epsilon must be > 0, got 0.0"),
    ("sinkhorn", {"scores": torch.zeros(7)}, "scores must be (rows, num_prototypes), got (7,)"),
    (
        "sinkhorn",
        {"scores": Z, "num_iterations": 0},
        "num_iterations must be > 0, got 0",
    ),
    (
        "sigreg",
        {"z": Z[0], "step": 0},
        "z must be (local_batch, dim) or (local_batch, views, dim), got (3,)",
    ),
    ("sigreg", {"z": Z, "step": 0, "num_slices": 0}, "num_slices must be at least 1, got 0"),
    (
        "lejepa",
        {"z": torch.zeros(4, 1, 7), "step": 0},
        "z must be (local_batch, views, dim) with at least 2 views, got (4, 1, 7)",
    ),
    (
        "lejepa",
        {"z": torch.zeros(4, 3, 7), "step": 0, "num_global_views": 4},
        "num_global_views must be from 1 to 3, got 4",
    ),
    (
        "lejepa",
        {"z": torch.zeros(4, 3, 7), "step": 0, "num_slices": 0},
        "num_slices must be at least 1, got 0",
    ),
    (
        "lejepa",
        {"z": torch.zeros(4, 3, 7), "step": 0, "sigreg_weight": 1.5},
        "sigreg_weight must be in [0, 1], got 1.5",
    ),
    ("triplet", PAIR | {"margin": -0.1}, "margin must be >= 0, got -0.1"),
    ("triplet", PAIR | {"labels": Z}, "labels must be (4,), one per image, got (4, 3)"),
    ("pairwise", PAIR | {"margin": -0.1}, "margin must be >= 0, got -0.1"),
    ("n_pair", PAIR | {"length_weight": -1.0}, "length_weight must be >= 0, got -1.0"),
    ("align_uniform", PAIR | {"t": 0.0}, "t must be > 0, got 0.0"),
    (
        "cpc",
        GRIDS | {"targets": torch.zeros(4, 75), "rows_ahead": [1]},
        "targets must be (local_batch, dim, side, side), got (4, 75)",
    ),
    (
        "cpc",
        GRIDS | {"rows_ahead": [1, 2]},
        "predictions must be (4, directions, 2, 3, 5, 5), got (4, 2, 1, 3, 5, 5)",
    ),
    (
        "cpc",
        GRIDS | {"predictions": torch.zeros(4, 5, 1, 3, 5, 5), "rows_ahead": [1]},
        "predictions must have 1 to 4 directions, got 5",
    ),
    (
        "cpc",
        GRIDS | {"rows_ahead": [5]},
        "rows_ahead must be from 1 to 4 on a grid of 5 x 5 patches, got [5]",
    ),
    ("cpc", GRIDS | {"rows_ahead": [1], "scale": 0}, "scale must be > 0, got 0"),
    (
        "mae",
        PIXELS | {"images": torch.zeros(2, 4, 6)},
        "images must be (local_batch, C, height, width), got (2, 4, 6)",
    ),
    (
        "mae",
        PIXELS | {"predictions": torch.zeros(2, 4, 12)},
        "predictions must be (local_batch, patches, 3 * patch_size**2) for images of shape "
        "(2, 3, 4, 6), got (2, 4, 12)",
    ),
    (
        "mae",
        PIXELS | {"images": torch.zeros(2, 3, 4, 7)},
        "predictions must be (local_batch, patches, 3 * patch_size**2) for images of shape "
        "(2, 3, 4, 7), got (2, 6, 12)",
    ),
    (
        "mae",
        PIXELS | {"masked": torch.zeros(2, 7, dtype=torch.bool)},
        "masked must be (2, 6), got (2, 7)",
    ),
]


def _message(name, arguments):
    with pytest.raises(ValueError) as error:
        getattr(losses, name)(**arguments)
    return str(error.value)


@pytest.mark.parametrize(("name", "arguments"), WRONG_SHAPES)
def test_views_of_different_shapes_are_named(name, arguments):
    assert _message(name, {"z_a": Z, "z_b": Z[:2], **arguments}) == (
        f"{name}: z_a and z_b must share one (local_batch, dim) shape, got (4, 3) and (2, 3)"
    )


@pytest.mark.parametrize(("name", "arguments", "missing"), SINGLE_IMAGES)
def test_a_single_image_is_refused(name, arguments, missing):
    assert _message(name, SINGLE | arguments) == (
        f"{name}: needs at least 2 images in the global batch, got 1, which has no {missing}"
    )


@pytest.mark.parametrize(("name", "arguments", "message"), OTHERS)
def test_a_wrong_argument_is_named(name, arguments, message):
    assert _message(name, arguments) == f"{name}: {message}"
