"""SwAV against its authors' arithmetic, facebookresearch/swav at 06b1b7cb.

https://github.com/facebookresearch/swav/blob/06b1b7cb/main_swav.py
"""

import math

import contract
import pytest
import torch
from torch.nn.functional import normalize

from ssl_pretrain.losses import sinkhorn
from ssl_pretrain.methods.swav import Config
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress

VIEWS = (9, 9, 7, 7)
METHOD = {
    "hidden_dim": 8,
    "dim": 4,
    "num_prototypes": 7,
    "freeze_prototypes_steps": 1,
    "queue_size": 48,
    "queue_from_epoch": 1,
}
OPTIM = OptimConfig(
    name="larc", base_lr=20.0, warmup_epochs=0.0, weight_decay=1e-6, exclude_by="none"
)


def plain_sinkhorn(scores, epsilon=0.05):
    """Scale Q (prototypes x images) row by row and column by column three times."""
    q = [[math.exp(score / epsilon) for score in row] for row in scores.T]
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(3):
        q = [[x / sum(row) / len(q) for x in row] for row in q]
        columns = [sum(row[b] for row in q) for b in range(len(scores))]
        q = [[x / columns[b] / len(scores) for b, x in enumerate(row)] for row in q]
    return torch.tensor(q, dtype=torch.float64).T * len(scores)


def plain_loss(method, images):
    with torch.no_grad():
        weight = method.prototypes.weight
        weight.copy_(torch.stack(contract.unit_rows(weight)))
    n = len(images)
    by_size = images.views[:2], images.views[2:]
    features = torch.cat([method.backbone(torch.cat(views)) for views in by_size])
    z = torch.stack(contract.unit_rows(method.projector(features)))
    scores = (z @ method.prototypes.weight.T).split(n)
    loss = torch.zeros((), dtype=torch.float64)
    for assigned_view in (0, 1):
        rows = scores[assigned_view].detach()
        if method.queue.filled == len(method.queue.rows):
            past_rows = method.queue.rows[:, assigned_view] @ method.prototypes.weight.detach().T
            rows = torch.cat([rows, past_rows])
        q = plain_sinkhorn(rows)[:n]
        for view in range(4):
            if view != assigned_view:
                log_p = torch.log_softmax(scores[view] / 0.1, dim=1)
                loss = loss - sum((q[i] * log_p[i]).sum() for i in range(n)) / n / 3
    return loss / 2, z.detach()


@pytest.mark.parametrize("filled", [0, 48])
def test_one_step_is_the_authors(filled):
    method, images = contract.build("swav"), contract.random_batch("swav", 2)
    weight = method.prototypes.weight  # rounded to float32, so its rows are not exactly of length 1
    weight.data.copy_(normalize(weight))
    method.queue.filled.fill_(filled)
    rows = torch.randn(48, 2, 4, dtype=torch.float64)
    method.queue.rows.copy_(normalize(rows, dim=-1) if filled else torch.zeros_like(rows))
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images, step=2)  # the prototypes move, the queue is in use
    loss, z = plain_loss(expected, images)
    lr = 20 * contract.ROWS / 256 * (1 + math.cos(math.pi * 0.1)) / 2
    contract.apply_plain_step(expected, OPTIM, loss, lr)
    with torch.no_grad():
        # The authors normalize the prototypes before the next forward pass.
        weight = expected.prototypes.weight
        weight.copy_(torch.stack(contract.unit_rows(weight)))
        expected.queue.rows[:24] = torch.stack(z.split(24)[:2], dim=1)
        expected.queue.filled.fill_(max(filled, 24))
        expected.queue.position.fill_(24)
    contract.assert_same(method, expected)


def test_assignments_sum_to_one_and_share_the_prototypes_equally():
    scores = torch.randn(30, 5, dtype=torch.float64)
    q = sinkhorn(scores, torch.ones(30, dtype=torch.float64), epsilon=0.5, num_iterations=200)
    torch.testing.assert_close(q.sum(1), torch.ones(30, dtype=torch.float64))
    expected = torch.full((5,), 6.0, dtype=torch.float64)
    torch.testing.assert_close(q.sum(0), expected, rtol=1e-6, atol=1e-6)


def test_invalid_rows_do_not_change_the_assignments_of_the_others():
    scores = torch.randn(10, 5, dtype=torch.float64)
    valid = torch.tensor([1.0] * 6 + [0.0] * 4, dtype=torch.float64)
    expected = sinkhorn(scores[:6], valid[:6], epsilon=0.05, num_iterations=3)
    torch.testing.assert_close(
        sinkhorn(scores, valid, epsilon=0.05, num_iterations=3)[:6], expected
    )


def test_the_loss_of_a_collapse_is_the_log_of_the_number_of_prototypes():
    method = contract.build("swav", num_prototypes=7)
    scores = torch.zeros(6, 4, 7, dtype=torch.float64)
    assert method.loss({"scores": scores}, {})[0].item() == pytest.approx(math.log(7))


def test_prototypes_are_frozen_for_the_first_steps():
    method = contract.build("swav")
    assert method.frozen(Progress(0, 20, 2)) == ("prototypes",)
    assert method.frozen(Progress(1, 20, 2)) == ()


def test_a_queue_size_that_is_not_a_multiple_of_the_batch_size_is_refused():
    class Run:
        global_batch_size = 512

    with pytest.raises(ValueError) as error:
        Config(queue_size=3840).check(Run(), 1)
    assert str(error.value) == (
        "method.queue_size: 3840 is not a multiple of global_batch_size 512; "
        "the nearest multiples are 3584 and 4096"
    )
