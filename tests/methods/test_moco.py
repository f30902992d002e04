"""MoCo v1 and v2 against their authors' arithmetic, facebookresearch/moco at 7397dfe1.

https://github.com/facebookresearch/moco/blob/7397dfe1/moco/builder.py
"""

import contract
import pytest
import torch
from conftest import run_ranks

from ssl_pretrain.distributed import process_group
from ssl_pretrain.methods.moco import Config, forward_shuffled
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress

METHOD = {"projector_dims": [8, 4], "queue_size": 72, "momentum": 0.9}
OPTIM = OptimConfig(
    name="sgd", base_lr=3.0, warmup_epochs=0.0, weight_decay=1e-4, exclude_by="none"
)
WITH_MICRO_BATCHES = {"shuffled_batch_norm": False}  # micro-batches cannot be combined with it


def plain_loss(method, images):
    queries = contract.unit_rows(method.projector(method.backbone(images.views[0])))
    with torch.no_grad():
        keys = contract.unit_rows(
            method.teacher.projector(method.teacher.backbone(images.views[1]))
        )
    losses = []
    for q, k in zip(queries, keys):
        logits = [(q @ k) / 0.2] + [(q @ row) / 0.2 for row in method.queue.rows]
        losses.append(-torch.log(torch.exp(logits[0]) / sum(torch.exp(logit) for logit in logits)))
    return sum(losses) / len(losses), torch.stack(keys)


def test_three_steps_are_the_authors():
    method = contract.build("moco")
    expected = contract.copy_method(method)
    batches = [contract.random_batch("moco", step) for step in range(3)]
    state = contract.train("moco", steps=3, precision="float64")["state"]
    velocity: dict[str, torch.Tensor] = {}
    for step, images in enumerate(batches):
        # The authors update the teacher, then compute the keys, then step the optimizer. At the
        # first step teacher and student are equal.
        with torch.no_grad():
            for name, p in expected.teacher.named_parameters():
                p.copy_(0.9 * p + 0.1 * expected.get_parameter(name))
        loss, keys = plain_loss(expected, images)
        trainable = [(name, p) for name, p in expected.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in trainable])
        angle = torch.tensor(torch.pi * step / contract.NUM_STEPS, dtype=torch.float64)
        lr = 3 * contract.ROWS / 256 * (1 + torch.cos(angle)) / 2
        with torch.no_grad():
            for (name, p), g in zip(trainable, gradients):
                velocity[name] = 0.9 * velocity.get(name, 0) + g + 1e-4 * p
                p.sub_(lr * velocity[name])
            expected.queue.rows[step * 24 : (step + 1) * 24] = keys
    # Our teacher has already been updated for the fourth step.
    for name, p in expected.teacher.named_parameters():
        p.data.copy_(0.9 * p + 0.1 * expected.get_parameter(name))
    expected.queue.filled.fill_(72)
    contract.assert_same(state, expected)
    assert state["queue.position"] == 0
    assert state["queue.filled"] == 72


class RankMarker(torch.nn.Module):
    """Module that returns each image's number and the rank that computed it."""

    def forward(self, x):
        numbers = x[:, 0, 0, 0]
        return torch.stack([numbers, torch.full_like(numbers, process_group.rank())], dim=1)


def _exchange():
    rank = process_group.rank()
    numbers = torch.arange(8) + 8 * rank
    return forward_shuffled(RankMarker(), numbers.double().view(-1, 1, 1, 1), numbers + 100)


def test_key_views_are_computed_on_other_ranks_and_return_in_order():
    results = run_ranks(_exchange, world_size=3)
    for rank, keys in enumerate(results):
        assert keys[:, 0].tolist() == list(range(8 * rank, 8 * rank + 8))
    ranks = torch.cat(results)[:, 1].long()
    assert torch.bincount(ranks).tolist() == [8, 8, 8]
    assert all(len(set(computing_ranks.tolist())) > 1 for computing_ranks in ranks.split(8))


def test_settings_that_cannot_be_combined_are_refused():
    class Run:
        global_batch_size, micro_batch_size = 256, 0

    with pytest.raises(ValueError) as error:
        Config(queue_size=1000).check(Run(), 8)
    assert str(error.value) == (
        "method.queue_size: 1000 is not a multiple of global_batch_size 256; "
        "the nearest multiples are 768 and 1024"
    )
    Config().check(Run(), 8)
    Run.micro_batch_size = 16
    with pytest.raises(ValueError) as error:
        Config().check(Run(), 8)
    assert str(error.value).startswith(
        "micro_batch_size: 16 cannot be combined with method.shuffled_batch_norm, which exchanges "
    )


def test_version_1_has_a_linear_head():
    v1 = contract.build("moco", projector_dims=[4])
    assert len(v1.projector) == 1
    assert v1.projector[0].bias is not None
    assert not any(isinstance(module, torch.nn.BatchNorm1d) for module in v1.modules())


def test_without_a_queue_the_negatives_are_the_batchs_other_keys():
    method, images = contract.build("moco", without_queue=True), contract.random_batch("moco")
    embeddings, targets = method(images), method.targets(images)
    queries, keys = contract.unit_rows(embeddings["queries"]), contract.unit_rows(targets["keys"])
    losses = []
    for q, k in zip(queries, keys):
        total = sum(torch.exp(q @ other / 0.2) for other in keys)
        losses.append(-torch.log(torch.exp(q @ k / 0.2) / total))
    expected = sum(losses) / len(images)
    torch.testing.assert_close(method.loss(embeddings, targets)[0], expected)
    assert method.couples == "embeddings"
    assert contract.build("moco").couples == "nothing"
    assert not any("queue" in key for key in method.state_dict())
    method.after_step(Progress(0, 20, 2), embeddings, targets)
