"""The loss of pairs of sentences in tiles, against the whole matrix and against plain loops."""

import math

import pytest
import torch

from ssl_pretrain.losses import info_nce, sentence_pairs
from ssl_pretrain.losses.backend import Backend, use_backend
from ssl_pretrain.losses.sentence_pairs import plain_sentence_pairs

WEIGHTS = (0.0, 0.75, -2.0, 30.0)


def random_leaves(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(11, 5, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for _ in range(count)
    ]


def loss_and_gradients(loss, leaves, **settings):
    value = loss(*leaves, **settings)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("count", [2, 3])
def test_tiles_equal_the_whole_matrix(count, weight, similarity):
    leaves = random_leaves(count)
    settings = {
        "temperature": 0.05,
        "similarity": similarity,
        "hard_negative_weight": weight if count == 3 else 0.0,
    }
    expected = loss_and_gradients(plain_sentence_pairs, leaves, **settings)
    with use_backend(Backend(4, 3)):
        results = loss_and_gradients(sentence_pairs, leaves, **settings)
    for result, value in zip(results, expected):
        torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-11)


def test_pairs_have_the_loss_of_info_nce():
    anchors, positives = random_leaves(2)
    expected = info_nce(anchors, positives, temperature=0.05)
    loss = sentence_pairs(anchors, positives, temperature=0.05)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_weight_counts_only_the_own_hard_negative():
    anchors, positives, negatives = (torch.eye(2) for _ in range(3))
    # The logits of an anchor: itself, the other positive, its own negative, the other negative.
    loss = sentence_pairs(
        anchors, positives, negatives, temperature=1.0, hard_negative_weight=math.log(3)
    )
    assert loss.item() == pytest.approx(math.log(math.e + 1 + 3 * math.e + 1) - 1)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_half_precision_is_as_exact_as_its_numbers(similarity):
    leaves = random_leaves(3, torch.bfloat16)
    settings = {"temperature": 0.05, "similarity": similarity, "hard_negative_weight": 0.5}
    exact = [z.detach().double().requires_grad_() for z in leaves]
    result = loss_and_gradients(sentence_pairs, leaves, **settings)
    expected = loss_and_gradients(plain_sentence_pairs, exact, **settings)
    assert result[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for gradient, value in zip(result[1:], expected[1:]):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), value, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (
            [torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 3)],
            {},
            "sentence_pairs: anchors, positives and hard_negatives must share one (local_batch, "
            "dim) shape, got (2, 3), (2, 3) and (4, 3)",
        ),
        (
            [torch.ones(2, 3)] * 2,
            {"temperature": 0.0},
            "sentence_pairs: temperature must be > 0, got 0.0",
        ),
        (
            [torch.ones(2, 3)] * 2,
            {"similarity": "l2"},
            "sentence_pairs: similarity must be cosine or dot, got 'l2'",
        ),
        (
            [torch.ones(1, 3)] * 2,
            {},
            "sentence_pairs: needs at least 2 images in the global batch, got 1, which has no "
            "negative",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, settings, message):
    with pytest.raises(ValueError) as error:
        sentence_pairs(*arguments, **{"temperature": 0.1, **settings})
    assert str(error.value) == message
