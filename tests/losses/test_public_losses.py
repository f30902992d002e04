"""The public losses in a loop that is not ours: on several ranks, under autocast, in 16 bits."""

import pytest
import torch
import torch.distributed as dist
from cases import CASES, loss_and_gradients, random_tensors, slice_images
from conftest import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_pretrain import losses
from ssl_pretrain.losses import nt_xent

pytestmark = pytest.mark.promise


def train_in_plain_pytorch():
    """Train as a user would, and return the weights."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    images = torch.randn(3, 2, 12, 8, dtype=torch.float64)  # steps, views, images, pixels
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    parallel = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for views in images:
        view_a, view_b = views.chunk(size, dim=1)[rank]
        z_a, z_b = parallel(torch.cat([view_a, view_b])).chunk(2)
        loss = nt_xent(z_a, z_b, temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}


def _run_everything():
    """Return each loss with its gradients, and the trained weights. One launch serves all tests."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tensors = slice_images(random_tensors(), rank, size)
    return {name: loss_and_gradients(name, tensors) for name in CASES}, train_in_plain_pytorch()


@pytest.fixture(scope="module")
def one_process():
    return _run_everything()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    return run_ranks(_run_everything, world_size=request.param)


def test_every_public_loss_is_tested():
    assert {name.split()[0] for name in CASES} == set(losses.__all__)


def test_ranks_agree_with_one_process_in_value_and_gradient(ranks, one_process):
    for name, (loss, gradients) in one_process[0].items():
        mean_loss = sum(rank[0][name][0] for rank in ranks) / len(ranks)
        torch.testing.assert_close(mean_loss, loss, rtol=1e-10, atol=1e-12, msg=name)
        assert gradients, name
        for key, gradient in gradients.items():
            by_rank = torch.cat([rank[0][name][1][key] for rank in ranks]) / len(ranks)
            torch.testing.assert_close(
                by_rank, gradient, rtol=1e-8, atol=1e-12, msg=f"{name}: gradient of {key}"
            )


def test_a_plain_training_loop_on_ranks_trains_the_weights_of_one_process(ranks, one_process):
    for _, weights in ranks:
        torch.testing.assert_close(weights, one_process[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["byol", "dino", "moco", "moco_v3", "negative_cosine", "nnclr", "simsiam"]
)
def test_no_gradient_flows_to_targets(name, one_process):
    gradients = one_process[0][name][1]
    assert not gradients.keys() & {"z_a", "z_b", "teacher_logits"}
    assert gradients


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_embeddings_in_16_bits_are_computed_in_float32(name, dtype, autocast):
    half = {key: _convert(x, dtype) for key, x in random_tensors().items()}
    loss, _ = loss_and_gradients(name, half, autocast)
    expected = CASES[name]({key: _convert(x, torch.float32) for key, x in half.items()})
    torch.testing.assert_close(loss.float(), expected, rtol=1e-5, atol=1e-6)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name):
    tensors = {key: _convert(x, torch.float32) for key, x in random_tensors().items()}
    expected, expected_gradients = loss_and_gradients(name, tensors)
    loss, gradients = loss_and_gradients(name, tensors, autocast=True)
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[key], x) for key, x in expected_gradients.items())


def _convert(x, dtype):
    return x.to(dtype) if x.is_floating_point() else x
