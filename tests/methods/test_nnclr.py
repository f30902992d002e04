"""NNCLR against the loss of its paper (no official code), as solo-learn computes it.

https://github.com/vturrisi/solo-learn/blob/9187ea39/solo/losses/nnclr.py
"""

import contract
import torch

from ssl_pretrain.losses.queues import nearest_neighbors
from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 8, 4], "predictor_dim": 6, "queue_size": 48, "temperature": 0.2}
OPTIM = OptimConfig(
    name="lars", base_lr=20.0, warmup_epochs=0.0, weight_decay=1e-6, momentum_convention="popular"
)


def plain_loss(method, images):
    z = [method.projector(method.backbone(view)) for view in images.views]
    p = [contract.unit_rows(method.predictor(embeddings)) for embeddings in z]
    loss = torch.zeros((), dtype=torch.float64)
    for source, other in ((0, 1), (1, 0)):
        for i, row in enumerate(contract.unit_rows(z[source].detach())):
            neighbor = method.queue.rows[(method.queue.rows @ row).argmax()]
            exps = [torch.exp(neighbor @ candidate / 0.2) for candidate in p[other]]
            loss = loss - torch.log(exps[i] / sum(exps)) / len(images) / 2
    return loss, torch.stack(contract.unit_rows(z[0].detach()))


def test_one_step_is_the_papers():
    method, images = contract.build("nnclr"), contract.random_batch("nnclr")
    # The rows were normalized in float32.
    method.queue.rows.copy_(torch.nn.functional.normalize(method.queue.rows))
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    loss, z = plain_loss(expected, images)
    contract.apply_plain_step(expected, OPTIM, loss, 20 * contract.ROWS / 256)
    expected.queue.rows[:24] = z
    expected.queue.position.fill_(24)
    expected.queue.filled.fill_(24)
    contract.assert_same(method, expected)


def test_the_nearest_neighbor_has_the_largest_cosine():
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    assert torch.equal(
        nearest_neighbors(torch.tensor([[5.0, 0.1], [2.0, 3.0]]), rows), rows[[0, 2]]
    )
