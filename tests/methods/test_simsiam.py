"""SimSiam against its authors' arithmetic, facebookresearch/simsiam at a7bc1772.

https://github.com/facebookresearch/simsiam/blob/a7bc1772/simsiam/builder.py
"""

import contract
import torch

from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 8, 8], "predictor_dim": 3}
OPTIM = OptimConfig(
    name="sgd",
    base_lr=1.0,
    warmup_epochs=0.0,
    weight_decay=1e-4,
    exclude_by="none",
    changes_every="epoch",
    constant_lr_names=["predictor"],
)


def plain_loss(method, images):
    """-(cos(p1, z2) + cos(p2, z1)) / 2, image by image. The z of each pair is detached."""
    z = [method.projector(method.backbone(view)) for view in images.views]
    p = [method.predictor(embeddings) for embeddings in z]
    cosines = []
    for i in range(len(images)):
        for predicted, target in ((p[0][i], z[1][i].detach()), (p[1][i], z[0][i].detach())):
            cosines.append((predicted * target).sum() / predicted.norm() / target.norm())
    return -sum(cosines) / len(images) / 2


def test_one_step_is_the_authors():
    method, images = contract.build("simsiam"), contract.random_batch("simsiam")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    contract.apply_plain_step(expected, OPTIM, plain_loss(expected, images), contract.ROWS / 256)
    contract.assert_same(method, expected)


def test_heads_have_the_authors_biases_and_the_last_norm_is_not_trained():
    method = contract.build("simsiam")
    assert method.projector[-1].weight is None
    assert method.predictor[-1].bias is not None
    assert method.predictor[0].bias is None


def test_without_stop_gradient_the_targets_are_trained_too():
    method = contract.build("simsiam", without_stop_gradient=True)
    images = contract.random_batch("simsiam")
    z_a, z_b = (method.projector(method.backbone(view)) for view in images.views)
    p_a, p_b = method.predictor(z_a), method.predictor(z_b)
    cosines = [
        (predicted * target).sum() / predicted.norm() / target.norm()
        for predicted, target in [*zip(p_a, z_b), *zip(p_b, z_a)]
    ]
    expected = -sum(cosines) / len(cosines)
    weights = list(method.backbone.parameters())
    ours = torch.autograd.grad(method.loss(method(images), {})[0], weights)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, weights))
    original = contract.build("simsiam")
    weights = list(original.backbone.parameters())
    original_gradients = torch.autograd.grad(original.loss(original(images), {})[0], weights)
    assert not torch.allclose(ours[0], original_gradients[0], rtol=0.01)


def test_without_predictor_each_view_is_compared_with_the_other_views_fixed_embedding():
    method = contract.build("simsiam", without_predictor=True)
    images = contract.random_batch("simsiam")
    z_a, z_b = (method.projector(method.backbone(view)) for view in images.views)
    cosines = [
        (predicted * target).sum() / predicted.norm() / target.norm()
        for predicted, target in [*zip(z_a, z_b.detach()), *zip(z_b, z_a.detach())]
    ]
    weights = list(method.backbone.parameters())
    ours = torch.autograd.grad(method.loss(method(images), {})[0], weights)
    torch.testing.assert_close(ours, torch.autograd.grad(-sum(cosines) / len(cosines), weights))
    assert not list(method.predictor.parameters())
