"""The walk that replaces autograd's engine computes the engine's gradients."""

import graph_backward
import pytest
import torch
from small_methods import build_method, random_batch
from suites import quick_and_full
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssl_pretrain import methods

NUM_IMAGES = 8


def gradients(name: str) -> dict[str, torch.Tensor]:
    """Return the gradients of two backward passes, which accumulate."""
    method, batch = build_method(name), random_batch(name, NUM_IMAGES)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            embeddings, targets = method(batch), method.targets(batch)
        method.loss(embeddings, targets).loss.backward()
    return {
        name: parameter.grad
        for name, parameter in method.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("name", quick_and_full(["simclr", "byol", "dino", "cpc"], methods.names()))
def test_gradients_equal_the_engines(name):
    expected = gradients(name)
    with graph_backward.replace_engine():
        walked = gradients(name)
    assert walked.keys() == expected.keys()
    for parameter, gradient in expected.items():
        # Only the order in which three or more gradients are added may differ.
        torch.testing.assert_close(walked[parameter], gradient, rtol=1e-4, atol=1e-6)


def test_gradients_of_embeddings_equal_the_engines():
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    unused = torch.randn(3, requires_grad=True)

    def compute():
        loss = (x.exp() * y + x).sum()
        return torch.autograd.grad(loss, [x, unused, y], allow_unused=True)

    expected = compute()
    with graph_backward.replace_engine():
        walked = compute()
    assert walked[1] is expected[1] is None and x.grad is None
    assert torch.equal(walked[0], expected[0]) and torch.equal(walked[2], expected[2])


def test_two_roots_may_be_outputs_of_one_node():
    weight = torch.randn(4, requires_grad=True)

    def compute():
        weight.grad = None
        torch.autograd.backward((weight * 3).chunk(2), [torch.ones(2), 2 * torch.ones(2)])
        return weight.grad.tolist()

    with graph_backward.replace_engine():
        walked = compute()
    assert walked == compute() == [3, 3, 6, 6]


def test_a_checkpointed_block_is_recomputed_once():
    calls = []
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    block[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 4)
    with graph_backward.replace_engine():
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(calls) == 2
    walked = block[0].weight.grad.clone()
    block.zero_grad()
    block(x).sum().backward()
    assert torch.equal(walked, block[0].weight.grad)


def test_an_unused_output_of_a_function_has_a_gradient_of_zero():
    class Split(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x * factor, x + 1

        @staticmethod
        def backward(ctx, first, second):
            return first * ctx.factor + second, None

    x = torch.ones(3, requires_grad=True)
    with graph_backward.replace_engine():
        Split.apply(x, 5.0)[0].sum().backward()
    assert x.grad.tolist() == [5.0] * 3
