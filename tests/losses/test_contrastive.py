"""Every contrastive loss against slow references, with tiles of every size and several ranks."""

import math

import pytest
import torch
from conftest import run_ranks
from references import BETA, NAMES, SIGMA, TAU_PLUS, slow_loss
from torch.nn import functional as F

from ssl_pretrain import losses
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import (
    debiased,
    decoupled,
    hard_negative,
    image_text,
    info_nce,
    nt_xent,
    supervised_contrastive,
)
from ssl_pretrain.losses.backend import Backend, use_backend
from ssl_pretrain.losses.contrastive import plain_nt_xent

pytestmark = pytest.mark.promise

# The low temperature gives logits up to 50, for which the maximum has to be subtracted.
HIGH_TEMPERATURE, LOW_TEMPERATURE = 0.2, 0.02


def random_embeddings(rows: int = 12, dim: int = 5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, rows, dim, dtype=torch.float64, generator=generator).unbind()


def _build_labels(rows: int):
    """Return shuffled labels of classes of different sizes, from one image to half of them."""
    labels = torch.tensor([7] * (rows // 2) + [0] + [3, 5] * rows)[:rows]
    return labels[torch.randperm(rows, generator=torch.Generator().manual_seed(2))]


def _build_queue(dim: int = 5):
    generator = torch.Generator().manual_seed(3)
    return F.normalize(torch.randn(30, dim, dtype=torch.float64, generator=generator), dim=1)


def product_loss(name, z_a, z_b, labels, queue, temperature):
    if name == "info_nce_queue":
        return info_nce(z_a, z_b, temperature=temperature, queue=queue)
    if name == "supervised_contrastive":
        return supervised_contrastive(z_a, z_b, labels, temperature=temperature)
    if name == "temperature_free":
        return losses.temperature_free(z_a, z_b)
    if name == "decoupled_weighted":
        return decoupled(z_a, z_b, temperature=temperature, sigma=SIGMA)
    if name == "debiased":
        return debiased(z_a, z_b, temperature=temperature, tau_plus=TAU_PLUS)
    if name == "hard_negative":
        return hard_negative(z_a, z_b, temperature=temperature, tau_plus=TAU_PLUS, beta=BETA)
    if name == "image_text":
        return image_text(z_a, z_b, torch.full((len(z_a),), 1 / temperature, dtype=z_a.dtype))
    return getattr(losses, name)(z_a, z_b, temperature=temperature)


def _loss_and_gradients(function, name, z_a, z_b, temperature, dtype=torch.float64):
    z_a, z_b = (z.to(dtype).clone().requires_grad_() for z in (z_a, z_b))
    loss = function(name, z_a, z_b, _build_labels(len(z_a)), _build_queue().to(dtype), temperature)
    return [loss.detach(), *torch.autograd.grad(loss, [z_a, z_b])]


def relative_error(value, reference):
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


# One tile, tiles that divide 24 rows, tiles that do not, and single pairs.
@pytest.mark.parametrize("tile", [(512, 512), (6, 6), (5, 7), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_each_loss_equals_its_equation_in_value_and_gradient(name, tile):
    for temperature in (HIGH_TEMPERATURE, LOW_TEMPERATURE):
        expected = _loss_and_gradients(slow_loss, name, *random_embeddings(), temperature)
        with use_backend(Backend(*tile)):
            values = _loss_and_gradients(product_loss, name, *random_embeddings(), temperature)
        for value, reference in zip(values, expected):
            assert relative_error(value, reference) < 1e-10, temperature


def test_nt_xent_equals_its_plain_form():
    for temperature in (HIGH_TEMPERATURE, LOW_TEMPERATURE):
        z_a, z_b = (z.requires_grad_() for z in random_embeddings())
        losses = [f(z_a, z_b, temperature=temperature) for f in (nt_xent, plain_nt_xent)]
        fast_gradients, plain_gradients = (torch.autograd.grad(loss, [z_a, z_b]) for loss in losses)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fast_gradients, plain_gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_float32_has_only_rounding_errors(name):
    for temperature in (HIGH_TEMPERATURE, LOW_TEMPERATURE):
        # The reference gets the same rounded numbers, so that only the loss's error is measured.
        rounded = [z.float().double() for z in random_embeddings()]
        expected = _loss_and_gradients(slow_loss, name, *rounded, temperature)
        values = _loss_and_gradients(product_loss, name, *rounded, temperature, torch.float32)
        for value, reference in zip(values, expected):
            assert relative_error(value, reference) < 1e-5, temperature


def test_autocast_changes_nothing():
    z_a, z_b = (z.float() for z in random_embeddings())
    expected = _loss_and_gradients(
        product_loss, "nt_xent", z_a, z_b, HIGH_TEMPERATURE, torch.float32
    )
    with torch.autocast("cpu", torch.bfloat16):
        with_autocast = _loss_and_gradients(
            product_loss, "nt_xent", z_a, z_b, HIGH_TEMPERATURE, torch.float32
        )
    assert all(torch.equal(value, reference) for value, reference in zip(with_autocast, expected))


def _losses_and_weight_gradients(z_a, z_b, tile):
    """Return each loss and its gradient for a shared linear layer, by name and temperature.

    Both are averaged over ranks, as DDP does.
    """
    with use_backend(Backend(*tile)):
        return _compute_results(z_a, z_b)


def _compute_results(z_a, z_b):
    rank, world = process_group.rank(), process_group.world_size()
    local = slice(rank * len(z_a) // world, (rank + 1) * len(z_a) // world)
    labels, results = _build_labels(len(z_a)), {}
    for name in NAMES:
        for temperature in (HIGH_TEMPERATURE, LOW_TEMPERATURE):
            weight = torch.eye(5, 5, dtype=torch.float64).add(0.1).requires_grad_()
            a, b = z_a[local] @ weight, z_b[local] @ weight
            loss = product_loss(name, a, b, labels[local], _build_queue(), temperature)
            loss.backward()
            assert weight.grad is not None
            sums = [collectives.reduce_sum(value) for value in (loss.detach(), weight.grad)]
            results[name, temperature] = [value / world for value in sums]
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(world_size):
    default_tile = (512, 1024)
    one_process = _losses_and_weight_gradients(*random_embeddings(), default_tile)
    for tile in (default_tile, (3, 5)):
        for results in run_ranks(
            _losses_and_weight_gradients, *random_embeddings(), tile, world_size=world_size
        ):
            for key, (loss, gradient) in results.items():
                assert relative_error(loss, one_process[key][0]) < 1e-10, key
                assert relative_error(gradient, one_process[key][1]) < 1e-10, key


def _count_sent_numbers(z_a, z_b):
    """Count the numbers that this rank sends to others in one loss, forward and backward."""
    counts = {"forward": 0, "backward": 0}
    gather, phase = collectives._all_gather, "forward"

    def counting_gather(out, x, group=None):
        counts[phase] += x.numel()
        return gather(out, x, group=group)

    collectives._all_gather = counting_gather
    collectives._reduce_scatter = None  # the symmetric form must not call it
    rows = len(z_a) // 2
    local = slice(process_group.rank() * rows, (process_group.rank() + 1) * rows)
    a, b = (z[local].clone().requires_grad_() for z in (z_a, z_b))
    loss = nt_xent(a, b, temperature=HIGH_TEMPERATURE)
    phase = "backward"
    loss.backward()
    return counts


def test_embeddings_are_sent_once_and_only_three_numbers_per_row_come_back():
    rows, dim = 6, 5
    for counts in run_ranks(_count_sent_numbers, *random_embeddings(2 * rows, dim), world_size=2):
        assert counts == {"forward": 2 * rows * dim, "backward": 2 * rows * 3}


def _half_and_float32_results(dtype):
    """Return each loss and its gradients for rounded embeddings, in `dtype` and in float32."""
    rank, world = process_group.rank(), process_group.world_size()
    z_a, z_b = (z.to(dtype).chunk(world)[rank] for z in random_embeddings())
    labels, queue = _build_labels(12).chunk(world)[rank], _build_queue().float()
    results = {}
    for name in NAMES:
        results[name] = []
        for precision in (dtype, torch.float32):
            a, b = (z.to(precision).clone().requires_grad_() for z in (z_a, z_b))
            loss = product_loss(name, a, b, labels, queue, HIGH_TEMPERATURE)
            results[name].append([loss.detach(), *torch.autograd.grad(loss, [a, b])])
    return results


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_tiles_compute_half_precision_in_float32_bit_for_bit(dtype, world_size):
    run = _half_and_float32_results
    ranks = run_ranks(run, dtype, world_size=world_size) if world_size > 1 else [run(dtype)]
    for results in ranks:
        for name, ((loss, *gradients), (expected_loss, *expected_gradients)) in results.items():
            assert torch.equal(loss, expected_loss), name
            for gradient, expected in zip(gradients, expected_gradients):
                assert gradient.dtype == dtype
                assert torch.equal(gradient, expected.to(dtype)), name


def _find_sent_dtypes(z_a, z_b):
    """Return the data types of the matrices that a rank sends and receives, by loss."""
    dtypes = {name: {"gather": [], "reduce": []} for name in ("nt_xent", "image_text")}
    gather, reduce = collectives._all_gather, collectives._reduce_scatter

    def record_gather(out, x, group=None):
        kinds["gather"] += [x.dtype] if x.shape[1:] == z_a.shape[1:] else []
        return gather(out, x, group=group)

    def record_reduce(out, x, group=None):
        kinds["reduce"].append(x.dtype)
        return reduce(out, x, group=group)

    collectives._all_gather, collectives._reduce_scatter = record_gather, record_reduce
    for name in dtypes:
        kinds = dtypes[name]
        a, b = (z.clone().requires_grad_() for z in (z_a, z_b))
        product_loss(name, a, b, None, None, HIGH_TEMPERATURE).backward()
    return dtypes


def test_ranks_send_embeddings_in_half_precision_and_gradients_in_float32():
    z_a, z_b = (z.bfloat16() for z in random_embeddings())
    for dtypes in run_ranks(_find_sent_dtypes, z_a, z_b, world_size=2):
        assert dtypes == {
            "nt_xent": {"gather": [torch.bfloat16], "reduce": []},
            "image_text": {"gather": [torch.bfloat16], "reduce": [torch.float32]},
        }


def test_a_learned_logit_scale_gets_the_gradient_of_the_equation():
    z_a, z_b = random_embeddings(6)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    value = torch.autograd.grad(image_text(z_a, z_b, scale.expand(6)), scale)[0]
    reference = torch.autograd.grad(
        slow_loss("image_text", z_a, z_b, None, None, 1 / scale), scale
    )[0]
    assert relative_error(value, reference) < 1e-10


def test_keys_without_a_graph_are_constants():
    z_a, z_b = random_embeddings()
    queries = z_a.clone().requires_grad_()
    losses = (
        info_nce(queries, z_b, temperature=0.5),
        slow_loss("info_nce", queries, z_b, None, None, 0.5),
    )
    value, reference = (torch.autograd.grad(loss, queries)[0] for loss in losses)
    assert relative_error(value, reference) < 1e-10


def test_the_loss_of_a_collapse_is_the_log_of_the_number_of_candidates():
    collapsed = torch.ones(8, 4)
    assert nt_xent(collapsed, collapsed, temperature=0.1).item() == pytest.approx(
        math.log(2 * 8 - 1)
    )
    assert decoupled(collapsed, collapsed, temperature=0.1).item() == pytest.approx(
        math.log(2 * 8 - 2)
    )
    assert info_nce(collapsed, collapsed, temperature=0.1).item() == pytest.approx(math.log(8))
    queue = F.normalize(torch.ones(30, 4))
    with_queue = info_nce(collapsed, collapsed, temperature=0.1, queue=queue)
    assert with_queue.item() == pytest.approx(math.log(31))


def test_without_prior_or_labels_the_weighted_forms_are_nt_xent():
    z_a, z_b = random_embeddings()
    expected = nt_xent(z_a, z_b, temperature=HIGH_TEMPERATURE)
    without_prior = debiased(z_a, z_b, temperature=HIGH_TEMPERATURE, tau_plus=0.0)
    without_labels = supervised_contrastive(
        z_a, z_b, torch.arange(12), temperature=HIGH_TEMPERATURE
    )
    torch.testing.assert_close(without_prior, expected)
    torch.testing.assert_close(without_labels, expected)


def test_the_scale_of_embeddings_and_the_order_of_images_do_not_matter():
    z_a, z_b = random_embeddings()
    loss = nt_xent(z_a, z_b, temperature=0.2)
    order = torch.randperm(len(z_a), generator=torch.Generator().manual_seed(1))
    rescaled = nt_xent(3 * z_a[order], 0.1 * z_b[order], temperature=0.2)
    torch.testing.assert_close(rescaled, loss)
