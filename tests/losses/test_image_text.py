"""The image-text losses against their plain forms, with tiles of every size, on several ranks.

The losses get one scale and one bias for all pairs, expanded to one number per image.
"""

import math

import pytest
import torch
from conftest import run_ranks
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import image_text, sigmoid_image_text
from ssl_pretrain.losses.backend import Backend, use_backend
from ssl_pretrain.losses.contrastive import plain_image_text
from ssl_pretrain.losses.sigmoid import plain_sigmoid_image_text

pytestmark = pytest.mark.promise

PAIRS, DIM = 12, 5
# Names of the losses with a scale and a bias. Logits reach 100 in the last two.
CASES = {
    "clip": (1 / 0.07, 0.0),
    "siglip": (10.0, -10.0),
    "clip, large scale": (100.0, 0.0),
    "siglip, large scale": (100.0, 3.0),
}
TILES = [(512, 1024), (6, 4), (5, 7), (1, 1)]


def build_leaves(case: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return images, texts, scale and bias of the global batch. Lengths are not 1."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, PAIRS, DIM, dtype=torch.float64, generator=generator) * 3
    numbers = (torch.tensor(value, dtype=torch.float64) for value in CASES[case])
    return [x.to(dtype).requires_grad_() for x in (*z.unbind(), *numbers)]


def compute_loss(case: str, leaves: list[Tensor], plain: bool = False) -> Tensor:
    """Return the loss of this rank's pairs."""
    world = process_group.world_size()
    images, texts = (z.chunk(world)[process_group.rank()] for z in leaves[:2])
    scale, bias = (number.expand(len(images)) for number in leaves[2:])
    if case.startswith("clip"):
        # The logits of CLIP do not depend on a bias.
        return (plain_image_text if plain else image_text)(images, texts, scale)
    loss = plain_sigmoid_image_text if plain else sigmoid_image_text
    return loss(images, texts, scale, bias)


def loss_and_gradients(case: str, plain: bool = False) -> list[Tensor]:
    """Return the loss and the gradients of all leaves, averaged over ranks as DDP does."""
    leaves = build_leaves(case)
    loss = compute_loss(case, leaves, plain)
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    results = [loss.detach(), *gradients]
    return [collectives.reduce_sum(x) / process_group.world_size() for x in results]


def assert_equal(results: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for value, reference in zip(results, expected, strict=True):
        largest = reference.abs().max().item()
        torch.testing.assert_close(value, reference, rtol=0, atol=tolerance * max(largest, 1e-6))


def tiled_results() -> dict:
    """Return the results of this rank, by case and tile."""
    results = {}
    for case in CASES:
        for tile in TILES:
            with use_backend(Backend(*tile)):
                results[case, tile] = loss_and_gradients(case)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_tiles_and_ranks_equal_the_plain_form_in_value_and_gradient(world_size):
    expected = {case: loss_and_gradients(case, plain=True) for case in CASES}
    ranks = run_ranks(tiled_results, world_size=world_size) if world_size > 1 else [tiled_results()]
    for results in ranks:
        for (case, tile), values in results.items():
            try:
                assert_equal(values, expected[case])
            except AssertionError as error:
                raise AssertionError(f"{case}, tile {tile}") from error


def test_known_values():
    same = torch.eye(2, dtype=torch.float64)
    scale, bias = torch.full((2,), 3.0).double(), torch.full((2,), -1.0).double()
    # The logits are 3 for the pair of an image and 0 for the other text.
    assert image_text(same, same, scale).item() == pytest.approx(math.log1p(math.exp(-3)))
    # The logits are 2 and -1.
    expected = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))
    assert sigmoid_image_text(same, same, scale, bias).item() == pytest.approx(expected)


def test_equal_pairs_at_the_largest_scale_do_not_overflow():
    images = torch.eye(4, requires_grad=True)
    scale = torch.full((4,), 100.0)
    for loss in (
        image_text(images, images, scale),
        sigmoid_image_text(images, images, scale, torch.full((4,), -50.0)),
    ):
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert torch.autograd.grad(loss, images)[0].isfinite().all()


def test_opposite_pairs_at_the_largest_scale_do_not_overflow():
    images = torch.eye(4).repeat(3, 1).requires_grad_()
    texts = (-images.detach()).requires_grad_()
    scale, bias = torch.full((12,), 100.0), torch.zeros(12)
    clip, siglip = image_text(images, texts, scale), sigmoid_image_text(images, texts, scale, bias)
    assert clip.item() == pytest.approx(100 + math.log(9))  # nine other texts have a logit of 0
    # The positive pair costs 100, two equal texts next to nothing, and nine others ln 2 each.
    assert siglip.item() == pytest.approx(100 + 9 * math.log(2))
    for loss in (clip, siglip):
        gradients = torch.autograd.grad(loss, [images, texts])
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_float32_has_only_rounding_errors():
    for case in CASES:
        exact = [x.detach().float().double().requires_grad_() for x in build_leaves(case)]
        rounded = [x.detach().float().requires_grad_() for x in exact]
        loss, expected = compute_loss(case, rounded), compute_loss(case, exact, plain=True)
        values = torch.autograd.grad(loss, rounded, materialize_grads=True)
        references = torch.autograd.grad(expected, exact, materialize_grads=True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5), case
        assert_equal([x.double() for x in values], list(references), tolerance=1e-4)


def half_results(dtype: torch.dtype) -> dict:
    """Return this rank's loss and gradients for rounded embeddings, in `dtype` and in float32."""
    results = {}
    for case in CASES:
        rounded = build_leaves(case, dtype)
        for precision in (dtype, torch.float32):
            leaves = [
                *(x.detach().to(precision).requires_grad_() for x in rounded[:2]),
                *(x.detach().float().requires_grad_() for x in rounded[2:]),
            ]
            loss = compute_loss(case, leaves)
            results[case, precision] = [loss.detach(), *torch.autograd.grad(loss, leaves[:2])]
    return results


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_bit_for_bit(dtype, world_size):
    run = half_results
    for results in run_ranks(run, dtype, world_size=world_size) if world_size > 1 else [run(dtype)]:
        for case in CASES:
            loss, *gradients = results[case, dtype]
            expected_loss, *expected_gradients = results[case, torch.float32]
            assert torch.equal(loss, expected_loss), case
            for gradient, expected in zip(gradients, expected_gradients, strict=True):
                assert torch.equal(gradient, expected.to(dtype)), case


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_only_computed_if_they_are_needed(case):
    leaves = build_leaves(case)
    expected = torch.autograd.grad(compute_loss(case, leaves, True), leaves, materialize_grads=True)
    for index in range(len(leaves)):
        if case.startswith("clip") and index == 3:
            continue  # CLIP has no bias
        alone = [x.detach().requires_grad_(i == index) for i, x in enumerate(leaves)]
        (gradient,) = torch.autograd.grad(compute_loss(case, alone), [alone[index]])
        assert_equal([gradient], [expected[index]])
    with torch.no_grad():
        loss = compute_loss(case, leaves)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, compute_loss(case, leaves, True).detach())


def test_without_gradients_the_sigmoid_loss_computes_no_weights(monkeypatch):
    leaves, calls = build_leaves("siglip"), []
    for name in ("addmm_", "sigmoid_"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *x, call=original: calls.append(call) or call(*x))
    with torch.no_grad():
        compute_loss("siglip", leaves)
    assert not calls
    compute_loss("siglip", leaves)
    assert len(calls) == 3  # the weights and two weighted sums


def count_sent_texts() -> tuple[int, int]:
    """Return how many embeddings this rank gathers, and the number of its shifts."""
    gathered, shifts = [], []
    gather, shift = collectives._all_gather, collectives.shift_around_ring

    def count_gather(out, x, group=None):
        gathered.append(out.numel())
        return gather(out, x, group=group)

    def count_shift(x, group=None):
        shifts.append(x.shape)
        return shift(x, group)

    collectives._all_gather, collectives.shift_around_ring = count_gather, count_shift
    compute_loss("siglip", build_leaves("siglip")).backward()
    return len(gathered), len(shifts)


def test_the_texts_of_the_sigmoid_loss_are_shifted_and_never_gathered():
    # Texts are shifted twice on three ranks, and their gradients once more to arrive home.
    assert run_ranks(count_sent_texts, world_size=3) == [(0, 5)] * 3
