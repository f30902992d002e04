"""Our image-text losses and open_clip's on the same embeddings, as DDP averages their gradients.

open_clip's settings `local_loss` and `gather_with_grad` change the gradient on several ranks.
"""

import pytest
import torch
from conftest import run_ranks
from test_image_text import CASES, assert_equal, build_leaves, compute_loss
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group

pytest.importorskip("open_clip", reason="open_clip is optional")

CLIP_SETTINGS = [(local, with_grad) for local in (False, True) for with_grad in (False, True)]
SIGLIP_SETTINGS = ["bidir", "shift", "reduce", "gather"]


def their_loss(name: str, settings, leaves: list[Tensor]) -> Tensor:
    """Return open_clip's loss of this rank."""
    from open_clip.loss import ClipLoss, SigLipLoss

    rank, world = process_group.rank(), process_group.world_size()
    images, texts = (F.normalize(z.chunk(world)[rank], dim=1) for z in leaves[:2])
    if name == "CLIP":
        local, with_grad = settings
        loss = ClipLoss(local, with_grad, rank=rank, world_size=world)
        return loss(images, texts, leaves[2])
    loss = SigLipLoss(rank=rank, world_size=world, dist_impl=settings)
    return loss(images, texts, *leaves[2:])


def average(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return the loss and the gradients of all leaves, averaged over ranks."""
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    world = process_group.world_size()
    return [collectives.reduce_sum(x) / world for x in (loss.detach(), *gradients)]


def compare_on_this_rank() -> dict[tuple, tuple[list[Tensor], list[Tensor]]]:
    """Return our averages and theirs, by loss and settings."""
    results = {}
    for name, all_settings in (("CLIP", CLIP_SETTINGS), ("SigLIP", SIGLIP_SETTINGS)):
        for case in (case for case in CASES if case.startswith(name.lower())):
            for settings in all_settings:
                ours, theirs = build_leaves(case), build_leaves(case)
                our_average = average(compute_loss(case, ours), ours)
                their_average = average(their_loss(name, settings, theirs), theirs)
                results[case, settings] = our_average, their_average
    return results


@pytest.fixture(scope="module", params=[1, 2, 3])
def results(request):
    """Results of one rank by loss and settings, with the number of ranks."""
    if request.param == 1:
        return compare_on_this_rank(), 1
    return run_ranks(compare_on_this_rank, world_size=request.param)[0], request.param


def test_losses_and_gradients_are_equal_for_the_settings_with_the_true_gradient(results):
    for (_, settings), (ours, theirs) in results[0].items():
        if settings in (*SIGLIP_SETTINGS, (True, True), (False, True)):
            assert_equal(ours, theirs)


def test_without_gather_with_grad_the_embeddings_get_a_share_of_the_gradient(results):
    by_settings, num_ranks = results
    for (_, settings), (ours, theirs) in by_settings.items():
        if settings == (False, False):
            loss, *gradients = ours
            shares = [x / num_ranks for x in gradients[:2]] + gradients[2:]
            assert_equal([loss, *shares], theirs)


def test_local_loss_without_gather_with_grad_has_another_gradient_on_ranks(results):
    by_settings, num_ranks = results
    for (_, settings), (ours, theirs) in by_settings.items():
        if settings == (True, False):
            assert_equal([ours[0], ours[3]], [theirs[0], theirs[3]])  # the loss and the scale
            cosine = F.cosine_similarity(ours[1].flatten(), theirs[1].flatten(), dim=0)
            assert (cosine.item() < 0.99) == (num_ranks > 1)
