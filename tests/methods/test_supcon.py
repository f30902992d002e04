"""SupCon against its authors' arithmetic, HobbitLong/SupContrast at 66a8fe53.

https://github.com/HobbitLong/SupContrast/blob/66a8fe53/losses.py
"""

import contract
import torch

from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 4]}
OPTIM = OptimConfig(
    name="sgd", base_lr=0.2, warmup_epochs=0.0, weight_decay=1e-4, exclude_by="none"
)


def plain_loss(method, images):
    """-tau / 0.07 * the mean over anchors of the mean over positives of their log softmax.

    The softmax leaves out the anchor itself.
    """
    z = contract.unit_rows(method.projector(method.backbone(torch.cat(images.views))))
    labels = images.labels.tolist() * 2
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(z)):
        exps = {j: torch.exp(z[i] @ z[j] / 0.1) for j in range(len(z)) if j != i}
        positives = [j for j in exps if labels[j] == labels[i]]
        log_softmax = [torch.log(exps[j] / sum(exps.values())) for j in positives]
        loss = loss - sum(log_softmax) / len(positives) / len(z)
    return loss * 0.1 / 0.07


def test_one_step_is_the_authors():
    method, images = contract.build("supcon"), contract.random_batch("supcon")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    contract.apply_plain_step(
        expected, OPTIM, plain_loss(expected, images), 0.2 * contract.ROWS / 256
    )
    contract.assert_same(method, expected)


def test_googles_head_has_no_last_bias_and_gets_unit_inputs():
    method = contract.build("supcon", last_bias=False, unit_features=True)
    norms = []
    method.projector.register_forward_pre_hook(
        lambda _, inputs: norms.append(inputs[0].norm(dim=1))
    )
    method(contract.random_batch("supcon"))
    torch.testing.assert_close(norms[0], torch.ones_like(norms[0]))
    assert method.projector[-1].bias is None


def test_supcon_needs_labels():
    assert contract.build("supcon").needs_labels
