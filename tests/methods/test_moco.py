"""MoCo v1 and v2 against their authors' arithmetic, facebookresearch/moco at 7397dfe1.

https://github.com/facebookresearch/moco/blob/7397dfe146c7ca6bbb58e9c382498069178ba764/moco/builder.py
"""

from __future__ import annotations

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
IN_PARTS = {"shuffled_batch_norm": False}  # refused with parts


def plain_loss(method, images):
    queries = contract.unit(method.projector(method.backbone(images.views[0])))
    with torch.no_grad():
        keys = contract.unit(method.teacher.projector(method.teacher.backbone(images.views[1])))
    losses = []
    for q, k in zip(queries, keys):
        logits = [(q @ k) / 0.2] + [(q @ row) / 0.2 for row in method.queue.rows]
        losses.append(-torch.log(torch.exp(logits[0]) / sum(torch.exp(logit) for logit in logits)))
    return sum(losses) / len(losses), torch.stack(keys)


def test_three_steps_are_the_authors():
    method = contract.build("moco")
    expected = contract.twin(method)
    batches = [contract.batch("moco", step) for step in range(3)]
    stepped = contract.run("moco", steps=3, precision="float64")["state"]
    velocity: dict[str, torch.Tensor] = {}
    for step, images in enumerate(batches):
        with torch.no_grad():  # the authors': teacher, then keys, then the optimizer; nothing at the first step, as both are equal
            for name, p in expected.teacher.named_parameters():
                p.copy_(0.9 * p + 0.1 * expected.get_parameter(name))
        loss, keys = plain_loss(expected, images)
        named = [(name, p) for name, p in expected.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in named])
        lr = (
            3
            * contract.ROWS
            / 256
            * (
                1
                + torch.cos(torch.tensor(torch.pi * step / contract.NUM_STEPS, dtype=torch.float64))
            )
            / 2
        )
        with torch.no_grad():
            for (name, p), g in zip(named, gradients):
                velocity[name] = 0.9 * velocity.get(name, 0) + g + 1e-4 * p
                p.sub_(lr * velocity[name])
            expected.queue.rows[step * 24 : (step + 1) * 24] = keys
    for name, p in expected.teacher.named_parameters():
        p.data.copy_(
            0.9 * p + 0.1 * expected.get_parameter(name)
        )  # ours has moved for the fourth step already
    expected.queue.filled.fill_(72)
    contract.assert_same(stepped, expected)
    assert stepped["queue.position"] == 0 and stepped["queue.filled"] == 72


class Whoami(torch.nn.Module):
    """Marks each image with the rank that it was computed on."""

    def forward(self, x):
        return torch.stack(
            [x[:, 0, 0, 0], torch.full((len(x),), float(process_group.rank()), dtype=x.dtype)],
            dim=1,
        )


def _exchange():
    rank = process_group.rank()
    numbers = torch.arange(8) + 8 * rank
    return forward_shuffled(Whoami(), numbers.double().view(-1, 1, 1, 1), numbers + 100)


def test_key_views_are_computed_elsewhere_and_come_back():
    results = run_ranks(_exchange, world_size=3)
    for rank, keys in enumerate(results):
        assert keys[:, 0].tolist() == list(range(8 * rank, 8 * rank + 8))
    where = torch.cat(results)[:, 1].long()
    assert torch.bincount(where).tolist() == [8, 8, 8] and all(
        len(set(part.tolist())) > 1 for part in where.split(8)
    )


def test_what_the_recipe_cannot_have_is_refused():
    class Run:
        global_batch_size, micro_batch_size = 256, 0

    with pytest.raises(
        ValueError,
        match=r"^method.queue_size: 1000 is not a multiple of global_batch_size 256; the nearest that are 768 and 1024$",
    ):
        Config(queue_size=1000).check(Run(), 8)
    Config().check(Run(), 8)
    Run.micro_batch_size = 16
    with pytest.raises(
        ValueError,
        match=r"^micro_batch_size: 16 cannot be with method.shuffled_batch_norm, which exchanges key views",
    ):
        Config().check(Run(), 8)


def test_a_version_is_its_head():
    v1 = contract.build("moco", projector_dims=[4])
    assert (
        len(v1.projector) == 1
        and v1.projector[0].bias is not None
        and not any(isinstance(m, torch.nn.BatchNorm1d) for m in v1.modules())
    )


def test_without_its_queue_the_negatives_are_the_batchs_other_keys():
    method, images = contract.build("moco", without_queue=True), contract.batch("moco")
    embeddings, targets = method(images), method.targets(images)
    queries, keys = contract.unit(embeddings["queries"]), contract.unit(targets["keys"])
    expected = sum(
        -torch.log(torch.exp(q @ k / 0.2) / sum(torch.exp(q @ other / 0.2) for other in keys))
        for q, k in zip(queries, keys)
    )
    torch.testing.assert_close(method.loss(embeddings, targets)[0], expected / len(images))
    assert method.couples == "embeddings" and contract.build("moco").couples == "nothing"
    assert not any("queue" in key for key in method.state_dict())
    method.after_step(Progress(0, 20, 2), embeddings, targets)
