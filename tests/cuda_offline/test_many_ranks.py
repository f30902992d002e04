"""A step of one rank among 64, whose collectives send nothing.

Host waits and mixed devices raise an error. Collectives and bytes equal the committed table, and
the formulas of docs/scaling.md where these describe the method.
"""

from fractions import Fraction

import fake_step
import pytest
import tables
import torch
from fake_cuda import DEVICE
from fake_ranks import NUM_RANKS, pretend_ranks, traffic_per_step
from host_waits import HostWaitError
from suites import quick_and_full
from traffic import predict_bytes

from ssl_pretrain.parallel import batch_norm

STEMS = quick_and_full(
    [f"{name}_cifar10" for name in ("simclr", "moco", "byol", "vicreg", "swav", "dino", "cpc")],
    [*fake_step.SMALL, *fake_step.IMAGENET],
)
# Dimension of an embedding, and calls of the networks per step.
CONTRASTIVE = {
    "simclr_cifar10": (128, 1),
    "moco_v3_cifar10": (256, 2),
    "moco_v3_vit_imagenet": (256, 2),
    "simclr_imagenet": (128, 1),
    "moco_v3_imagenet": (256, 2),
}


@pytest.mark.parametrize("stem", STEMS)
def test_a_step_never_waits_and_sends_the_bytes_of_the_table(stem):
    traffic = traffic_per_step(stem)  # raises an error if the host waits
    tables.skip_unless_version("collectives")
    assert tables.read("collectives").get(stem) == tables.format_traffic(traffic), tables.REMEDY


@pytest.mark.parametrize(
    "stem", quick_and_full(["simclr_cifar10", "moco_v3_cifar10"], [*CONTRASTIVE])
)
def test_bytes_equal_the_formulas(stem):
    dim, calls = CONTRASTIVE[stem]
    run = fake_step.load(stem, "parallel.activation_checkpointing=none")
    with pretend_ranks(NUM_RANKS):
        stepper, batch = fake_step.build(run)
        sent = fake_step.count_traffic(stepper, batch).sent
        expected = predict_bytes(
            stepper.method,
            "ddp",
            dim=dim,
            rows=len(batch),
            calls=calls,
            itemsize=4,
            embedding_itemsize=2,
        )
    assert dict(sent) == {kind: num_bytes for kind, num_bytes in expected.items() if num_bytes}


def test_micro_batches_send_the_gradients_once():
    run = fake_step.load("simclr_cifar10", "parallel.bn_group_images=256")
    with pretend_ranks(NUM_RANKS):
        stepper, batch = fake_step.build(run, num_micro_batches=2)
        sent = fake_step.count_traffic(stepper, batch).sent
        trained = sum(p.numel() for p in stepper.method.parameters() if p.requires_grad)
    assert sent["gradients"] == Fraction(2 * (NUM_RANKS - 1) * trained * 4, NUM_RANKS)


def test_a_mask_in_a_batch_norm_over_ranks_is_found(monkeypatch):
    """The fault of torch's SyncBatchNorm, which waited three times in each layer."""
    original = batch_norm.GroupBatchNorm._normalize_across_ranks

    def normalize(norm, x):
        counts = torch.ones(NUM_RANKS, device=DEVICE)
        counts[counts >= 1]
        return original(norm, x)

    monkeypatch.setattr(batch_norm.GroupBatchNorm, "_normalize_across_ranks", normalize)
    with pretend_ranks(NUM_RANKS), pytest.raises(HostWaitError, match="boolean mask"):
        fake_step.take_step(*fake_step.build(fake_step.load("simclr_cifar10")))
