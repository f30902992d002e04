"""The numbers of the published protocols, and the schedules that follow from them."""

import math

import pytest

from ssl_pretrain.eval import protocols


def test_linear_protocols_have_the_published_numbers():
    numbers = {
        name: (p.base_lr, p.batch_size, p.epochs, p.weight_decay, p.nesterov, p.milestones)
        for name, p in protocols.LINEAR_PROTOCOLS.items()
    }
    assert numbers == {
        "simclr": (0.1, 4096, 90, 1e-6, True, ()),
        "moco": (30.0, 256, 100, 0.0, False, (60, 80)),
        "dino": (0.001, 1024, 100, 0.0, False, ()),
        "swav": (0.3, 256, 100, 1e-6, False, ()),
        "vissl": (0.01, 256, 28, 5e-4, True, (8, 16, 24)),
        "vicreg": (0.02, 256, 100, 1e-6, False, ()),
        "simsiam": (0.1, 4096, 90, 0.0, False, ()),
        "moco_v3": (0.1, 1024, 90, 0.0, False, ()),
        "moco_v3_vit": (3.0, 1024, 90, 0.0, False, ()),
        "byol": (0.2, 4096, 80, 0.0, True, ()),
        "mae": (0.1, 16384, 90, 0.0, False, ()),
    }
    samplers = {"simclr": "tensorflow", "byol": "clipped", "mae": "clipped"}
    initial_distributions = {"vissl": "uniform", "byol": "truncated"}
    for name, protocol in protocols.LINEAR_PROTOCOLS.items():
        assert protocol.optimizer == {"simsiam": "larc", "mae": "lars"}.get(name, "sgd")
        assert protocol.trust_coefficient == 0.001
        assert protocol.normalizes_features == (name in ("vissl", "mae"))
        assert protocol.warmup_epochs == (10 if name == "mae" else 0)
        assert protocol.init == initial_distributions.get(name, "normal")
        assert protocol.crop_sampler == samplers.get(name, "torchvision")
        assert protocol.antialias == (name not in ("simclr", "byol"))


def test_learning_rates_follow_the_published_schedules():
    moco, simclr = protocols.LINEAR_PROTOCOLS["moco"], protocols.LINEAR_PROTOCOLS["simclr"]
    assert [round(moco.lr_factor(epoch), 6) for epoch in (0, 59.9, 60, 80)] == [1, 1, 0.1, 0.01]
    assert simclr.lr_factor(45.5) == pytest.approx((1 + math.cos(math.pi * 45.5 / 90)) / 2)


def test_the_batch_shrinks_if_an_epoch_would_have_few_steps():
    assert protocols.fitting_batch_size(4096, 1_281_167, 8) == 4096
    assert protocols.fitting_batch_size(4096, 1000, 1) == 64
    assert protocols.fitting_batch_size(4096, 1000, 3) == 63
