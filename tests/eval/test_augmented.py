"""eval.augmented: the published linear protocols are what torch's own optimizers make of them, on any number of ranks."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import run_ranks
from made_run import make_run
from torch import nn
from torch.nn import functional as F

from ssl_pretrain.eval import linear, protocols, runs
from ssl_pretrain.eval.frozen import evaluation_split, features, linear_heads, published_linear
from ssl_pretrain.eval.frozen.features import Feature
from ssl_pretrain.eval.frozen.linear_heads import Classifiers, FeatureNorm
from ssl_pretrain.eval.frozen.published_linear import Settings
from ssl_pretrain.models import backbones
from ssl_pretrain.models.backbones import BackboneConfig

STEPS = 4  # an epoch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made", "data.subset=200")


def by_torch(protocol, batches, lr, weight_decay, start):
    layer = nn.Linear(5, 3).double()
    norm = nn.BatchNorm1d(5).double() if protocol.batch_norm else nn.Identity()
    with torch.no_grad():
        layer.weight.copy_(start[:-1].T)
        layer.bias.copy_(start[-1])
    groups = [
        {
            "params": list(layer.parameters()),
            "weight_decay": 0.0 if protocol.trust else weight_decay,
        },
        {"params": list(norm.parameters()), "weight_decay": 0.0},  # VISSL's regularize_bn is false
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr,
        momentum=protocol.momentum,
        nesterov=protocol.nesterov,
    )
    if protocol.milestones:
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(protocol.milestones))
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, protocol.epochs * (1 if protocol.by_epoch else STEPS)
        )
    for step, (found, labels) in enumerate(batches):
        optimizer.zero_grad()
        F.cross_entropy(layer(norm(found)), labels).backward()
        if protocol.trust:
            larc(layer, protocol.trust, weight_decay)
        optimizer.step()
        if not protocol.by_epoch or (step + 1) % STEPS == 0:
            schedule.step()
    if protocol.batch_norm:  # what multiplies the normalized features
        with torch.no_grad():
            layer.bias += layer.weight @ norm.bias
            layer.weight *= norm.weight
    return torch.cat([layer.weight.T, layer.bias[None]]).detach(), norm


@torch.no_grad()
def larc(layer, trust, weight_decay):
    """apex.parallel.LARC, clip=False, around SGD."""
    for parameter in layer.parameters():
        norm, of_gradient = parameter.norm(), parameter.grad.norm()
        if norm != 0 and of_gradient != 0:
            parameter.grad += weight_decay * parameter
            parameter.grad *= trust * norm / (of_gradient + norm * weight_decay + 1e-8)


@pytest.mark.parametrize("name", protocols.LINEAR)
def test_each_protocol_is_what_torchs_optimizer_and_schedule_make_of_it(name):
    protocol = Settings(name, epochs=7, batch_size=16).protocol(1000)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            3 + torch.randn(16, 5, generator=generator).double(),
            torch.randint(3, (16,), generator=generator),
        )
        for _ in range(7 * STEPS)
    ]
    lrs, decays = [0.03, 0.3, 0.3], [0.0, protocol.weight_decay, 0.1]
    lrs = [
        lr * (300 if protocol.trust else 1) for lr in lrs
    ]  # so that a step adapted to 1 / 1,000 of the weights' norm is seen
    heads = Classifiers(
        5, 3, lrs, decays, like=batches[0][0], nesterov=protocol.nesterov, start=protocol.start, init_std=protocol.init_std,
        affine=protocol.batch_norm, trust=protocol.trust,
    )  # fmt: skip
    norm = FeatureNorm(5, batches[0][0]) if protocol.batch_norm else None
    start = heads.weights[:, 0].clone()
    for step, (found, labels) in enumerate(batches):
        heads.step(norm.train(found) if norm else found, labels, protocol.rate(step / STEPS))
    for head, lr, decay in zip(heads.weights.transpose(0, 1), lrs, decays):
        expected, their_norm = by_torch(protocol, batches, lr, decay, start)
        torch.testing.assert_close(head, expected)
        if norm:
            scale, shift = their_norm.weight.detach(), their_norm.bias.detach()
            assert (scale - 1).abs().max() > 0.01 and shift.abs().max() > 0.01  # trained
            torch.testing.assert_close(
                norm(batches[0][0]) * scale + shift, their_norm.eval()(batches[0][0]).detach()
            )


def test_first_weights_are_drawn_as_the_authors_draw_them():
    dim, classes = 64, 4000
    normal, uniform, truncated = (
        linear_heads.first_weights(dim, classes, start, 0.01)[:, 0]
        for start in ("normal", "uniform", "truncated")
    )
    assert normal[:-1].std().item() == pytest.approx(0.01, rel=0.01) and not normal[-1].any()
    assert uniform.abs().max().item() == pytest.approx(
        1 / 8, rel=1e-3
    )  # nn.Linear: below 1 / sqrt(inputs), biases too
    assert (
        uniform.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.01)
        and uniform[-1].std().item() > 0.07
    )
    assert (
        truncated[:-1].abs().max().item() == pytest.approx(2 / 8, rel=1e-3)
        and not truncated[-1].any()
    )
    assert truncated[:-1].std().item() == pytest.approx(
        0.8796 / 8, rel=0.01
    )  # a normal's deviation when cut at two
    assert not linear_heads.first_weights(dim, classes, "normal", 0.0).any()


def trained(path, name, **settings):
    """Weights of every classifier after two epochs, and what is chosen: on each rank."""
    run = runs.load_run(path, device="cpu")
    run.backbone.double()
    settings = Settings(name, epochs=2, batch_size=24, **settings)
    train, test = evaluation_split.labelled_parts(run, "a test")
    protocol, grid = settings.protocol(len(train)), settings.grid()
    one = published_linear._judged(
        "pretrained", DoubleInput(run.backbone), grid, protocol, 10, run.device
    )
    published_linear.train_all(
        [one],
        run,
        train.source,
        published_linear.train_views(run, protocol.interpolation),
        protocol,
    )
    return one.heads.weights, one.scores(test)[0]


class DoubleInput(nn.Module):
    """The backbone in float64, so that the number of images fed at once does not show."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.feature_dim = backbone, backbone.feature_dim

    def forward(self, images):
        return self.backbone(images.double())


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.full), 3])
@pytest.mark.parametrize("name", ["vissl"])
def test_ranks_train_what_one_process_trains(made, name, world_size):
    weights, reached = trained(made, name)
    assert weights.abs().max() > 0.01
    for others, on_rank in run_ranks(trained, made, name, world_size=world_size):
        torch.testing.assert_close(others, weights, rtol=1e-4, atol=1e-6)
        assert torch.equal(on_rank, reached)


def test_judges_digits_end_to_end(made, capsys):
    linear.main(
        [
            str(made),
            "--device",
            "cpu",
            "--protocol",
            "simclr",
            "--epochs",
            "2",
            "--rows",
            "random",
            "pretrained",
        ]
    )
    printed = capsys.readouterr().out
    found, grid = (
        json.loads((made / f"eval/{name}.json").read_text())
        for name in ("linear_simclr", "linear_simclr_grid")
    )
    rows = {row["features"]: row for row in found["rows"]}
    assert list(rows["pretrained"]["metrics"]) == ["published setting", "chosen on held-out images"]
    assert list(rows) == [
        "random, as built",
        "random, recalibrated",
        "random (better of two)",
        "pretrained",
    ]
    names = [f"lr {lr:g}, wd {decay:g}" for lr in (0.1, 0.01, 0.03, 0.3, 1) for decay in (1e-6, 0)]
    by_row = {row["features"]: row["metrics"] for row in grid["rows"]}
    assert [list(row) for row in by_row.values()] == [names] * 6
    chosen = rows["pretrained"]["notes"]["chosen on held-out images"].partition(", at")[0]
    assert by_row["pretrained, held-out images"][chosen] == max(
        by_row["pretrained, held-out images"].values()
    )
    assert (
        by_row["pretrained, test images"][chosen]
        == rows["pretrained"]["metrics"]["chosen on held-out images"]
    )
    assert (
        by_row["pretrained, test images"][names[0]]
        == rows["pretrained"]["metrics"]["published setting"]
    )
    about = found["protocol"]
    assert (
        about["selection"]
        == "on 20 training images held out, by accuracy; not trained on them afterwards"
    )
    assert "batch 16 (published: 4096, 180 images), 2 epochs (published: 90)" in about["classifier"]
    assert about["views"].endswith(
        "bicubic, tensorflow sampler, not antialiased, not flipped, as the run's own views are not"
    )
    assert (
        about["transform"].endswith("bicubic, nothing random")
        and "google-research/simclr" in printed
    )


def test_the_published_rate_is_scaled_by_the_batch(made):
    run = runs.load_run(made, device="cpu")
    protocol = Settings("moco", batch_size=64).protocol(200)
    one = published_linear._judged(
        "pretrained", Feature(run.backbone, "pooled"), [(30.0, 0.0)], protocol, 10, run.device
    )
    assert one.heads.lr.item() == 30.0 * 64 / 256


def test_a_choice_on_the_test_images_says_so(made, capsys):
    linear.main(
        [str(made), "--device", "cpu", "--protocol", "dino", "--epochs", "1", "--select", "test"]
    )
    printed = capsys.readouterr().out
    found = json.loads((made / "eval/linear_dino_test_selected.json").read_text())
    assert list(found["rows"][0]["metrics"]) == ["published setting", "chosen on the test images"]
    assert found["protocol"]["selection"].startswith(
        "ON THE TEST IMAGES, as in DINO's convention: an upper bound"
    )
    assert "chosen on the test images" in printed and "ON THE TEST IMAGES" in printed
    grid = json.loads((made / "eval/linear_dino_test_selected_grid.json").read_text())["rows"][0][
        "metrics"
    ]
    assert found["rows"][0]["metrics"]["chosen on the test images"] == max(grid.values())


def test_selecting_nothing_trains_the_published_setting_on_every_image(made):
    found = published_linear.evaluate(
        runs.load_run(made, device="cpu"), Settings("swav", epochs=1, select="published")
    )
    assert (
        list(found["rows"][0]["metrics"]) == ["published setting"] and not found["rows"][0]["notes"]
    )
    assert "200 images" in found["protocol"]["classifier"]


def test_the_last_blocks_class_tokens_are_what_hooks_see():
    backbone = backbones.build(BackboneConfig("test_vit"), 32).eval()
    tokens = []
    for block in backbone.model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pooled = backbone(images)
    last4, cls_mean = Feature(backbone, "last4"), Feature(backbone, "cls_mean")
    normed = [backbone.model.norm(each) for each in tokens]
    with torch.no_grad():
        torch.testing.assert_close(
            last4(images), torch.cat([each[:, 0] for each in normed[-4:]], dim=1)
        )
        torch.testing.assert_close(
            cls_mean(images), torch.cat([normed[-1][:, 0], normed[-1][:, 1:].mean(dim=1)], dim=1)
        )
        torch.testing.assert_close(last4(images)[:, -backbone.feature_dim :], pooled)
    assert (
        last4(images).shape[1] == last4.feature_dim and features.dinos_choice(backbone) == "last4"
    )
    wide = backbones.on_meta(BackboneConfig("vit_base_patch16_224"), 224)
    assert (
        features.dinos_choice(wide) == "cls_mean" and Feature(wide, "cls_mean").feature_dim == 1536
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "dino", "--feature", "last4"], "--feature last4: ResNet has no class token; give pooled"),
        (["--protocol", "moco", "--rows", "raw"], "--rows raw: the published protocols train on crops through a network; --protocol cached has a row of raw pixels"),
        (["--lrs", "1"], "--lrs is of a published --protocol; --protocol cached does not take it"),
        (["--select", "test"], "--select test is of a published --protocol; --protocol cached chooses on held-out training images"),
        (["--protocol", "moco", "--labels-per-class", "1"], "--labels-per-class is of --protocol cached; --protocol moco does not take it"),
        (["--protocol", "moco", "--select", "published", "--lrs", "1"], "--select published trains the published setting alone; leave out --lrs and --weight-decays"),
        (["--protocol", "moco", "--batch-size", "999"], "--epochs 100, --batch-size 999: give at least 1 epoch, and a batch of 1 to 180 images"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(made, arguments, message):
    with pytest.raises(ValueError) as error:
        linear.main([str(made), "--device", "cpu", *arguments])
    assert str(error.value) == message


def test_published_numbers_stay_published():
    table = {
        name: (p.base_lr, p.batch_size, p.epochs, p.weight_decay, p.nesterov, p.milestones)
        for name, p in protocols.LINEAR.items()
    }
    assert table == {
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
    }
    apart = {"simclr": "tensorflow", "byol": "clipped"}  # written for TensorFlow
    for name, protocol in protocols.LINEAR.items():
        assert protocol.trust == (0.001 if name == "simsiam" else 0.0)
        assert protocol.batch_norm == (name == "vissl")
        assert protocol.start == {"vissl": "uniform", "byol": "truncated"}.get(name, "normal")
        assert (protocol.crop_sampler, protocol.antialias) == (
            apart.get(name, "torchvision"),
            name not in apart,
        )
    moco, simclr = protocols.LINEAR["moco"], protocols.LINEAR["simclr"]
    assert [round(moco.rate(epoch), 6) for epoch in (0, 59.9, 60, 80)] == [1, 1, 0.1, 0.01]
    assert simclr.rate(45.5) == pytest.approx((1 + math.cos(math.pi * 45.5 / 90)) / 2)


def test_a_batch_that_makes_few_steps_becomes_smaller():
    assert protocols.batch_that_fits(4096, 1_281_167, 8) == 4096
    assert (
        protocols.batch_that_fits(4096, 1000, 1) == 64
        and protocols.batch_that_fits(4096, 1000, 3) == 63
    )


def test_accuracies_are_counted_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weights, found = (
        torch.randn(3, 6, 4, generator=generator),
        torch.randn(50, 5, generator=generator),
    )
    labels = torch.randint(4, (50,), generator=generator)
    padded = F.pad(found, (0, 1), value=1.0)
    expected = [(padded @ head).argmax(dim=1).eq(labels).double().mean() for head in weights]
    torch.testing.assert_close(
        linear_heads.accuracies(weights, found, labels), torch.stack(expected)
    )
