"""The published linear protocols equal torch's optimizers and schedules, on any number of ranks."""

import json
import math
from functools import partial

import pytest
import torch
from conftest import run_ranks
from mae_schedule import mae_lr
from torch import nn
from torch.nn import functional as F
from untrained_run import make_run

from ssl_pretrain.eval import linear, protocols, runs, training_views
from ssl_pretrain.eval.frozen import (
    evaluation_split,
    linear_heads,
    named_features,
    published_linear,
)
from ssl_pretrain.eval.frozen.linear_heads import FeatureNorm, LinearHeads
from ssl_pretrain.eval.frozen.named_features import Feature
from ssl_pretrain.eval.frozen.published_linear import ProbedNetwork
from ssl_pretrain.eval.protocols import LinearOptions
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig

STEPS_PER_EPOCH = 4


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", "data.subset=200")


def load(path):
    return runs.load_run(path, device="cpu")


def read_result(path, name):
    return json.loads((path / f"eval/{name}.json").read_text())


def train_with_torch(protocol, batches, lr, weight_decay, initial_weights):
    layer = nn.Linear(5, 3).double()
    norm = nn.Identity()
    if protocol.normalizes_features:
        norm = nn.BatchNorm1d(5, eps=protocol.norm_eps, affine=protocol.norm_is_affine).double()
    with torch.no_grad():
        layer.weight.copy_(initial_weights[:-1].T)
        layer.bias.copy_(initial_weights[-1])
    sgd_decay = weight_decay if protocol.optimizer == "sgd" else 0.0
    groups = [{"params": list(layer.parameters()), "weight_decay": sgd_decay}]
    if list(norm.parameters()):  # VISSL's regularize_bn is false
        groups.append({"params": list(norm.parameters()), "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr, momentum=protocol.momentum, nesterov=protocol.nesterov)
    if protocol.milestones:
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(protocol.milestones))
    elif protocol.warmup_epochs:
        factor = partial(mae_lr, warmup_epochs=protocol.warmup_epochs, epochs=protocol.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: factor(step / STEPS_PER_EPOCH)
        )
    else:
        length = protocol.epochs * (STEPS_PER_EPOCH if protocol.lr_changes_every_step else 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
    for step, (values, labels) in enumerate(batches):
        optimizer.zero_grad()
        F.cross_entropy(layer(norm(values)), labels).backward()
        if protocol.optimizer == "larc":
            apply_larc(layer, protocol.trust_coefficient, weight_decay)
        if protocol.optimizer == "lars":
            apply_lars(layer.weight, protocol.trust_coefficient, weight_decay)
        optimizer.step()
        if protocol.lr_changes_every_step or (step + 1) % STEPS_PER_EPOCH == 0:
            schedule.step()
    if list(norm.parameters()):
        # Fold scale and shift into the layer, as `LinearHeads.weights` does.
        with torch.no_grad():
            layer.bias += layer.weight @ norm.bias
            layer.weight *= norm.weight
    return torch.cat([layer.weight.T, layer.bias[None]]).detach(), norm


@torch.no_grad()
def apply_larc(layer, larc_coefficient, weight_decay):
    """Change the gradients as apex.parallel.LARC does with clip=False."""
    for parameter in layer.parameters():
        norm, gradient_norm = parameter.norm(), parameter.grad.norm()
        if norm != 0 and gradient_norm != 0:
            parameter.grad += weight_decay * parameter
            parameter.grad *= larc_coefficient * norm / (gradient_norm + norm * weight_decay + 1e-8)


@torch.no_grad()
def apply_lars(weight, trust_coefficient, weight_decay):
    """Change the gradient as LARS in facebookresearch/mae does. It leaves biases as they are."""
    weight.grad += weight_decay * weight
    if weight.norm() > 0 and weight.grad.norm() > 0:
        weight.grad *= trust_coefficient * weight.norm() / weight.grad.norm()


@pytest.mark.parametrize("name", protocols.LINEAR_PROTOCOLS)
def test_a_protocol_equals_torchs_optimizer_and_schedule(name):
    protocol = LinearOptions(name, epochs=7, batch_size=16).adapt_protocol(1000)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            3 + torch.randn(16, 5, generator=generator).double(),
            torch.randint(3, (16,), generator=generator),
        )
        for _ in range(7 * STEPS_PER_EPOCH)
    ]
    # LARC and LARS scale a step to 1 / 1,000 of the weights' norm, which small rates would hide.
    lrs = [lr * (1 if protocol.optimizer == "sgd" else 300) for lr in (0.03, 0.3, 0.3)]
    decays = [0.0, protocol.weight_decay, 0.1]
    heads = LinearHeads(
        5,
        3,
        lrs,
        decays,
        like=batches[0][0],
        nesterov=protocol.nesterov,
        init=protocol.init,
        init_std=protocol.init_std,
        affine=protocol.normalizes_features and protocol.norm_is_affine,
        optimizer=protocol.optimizer,
        trust_coefficient=protocol.trust_coefficient,
    )
    norm = None
    if protocol.normalizes_features:
        norm = FeatureNorm(5, batches[0][0], protocol.norm_eps)
    initial_weights = heads.weights[:, 0].clone()
    for step, (values, labels) in enumerate(batches):
        values = norm.normalize_batch(values) if norm else values
        heads.step(values, labels, protocol.lr_factor(step / STEPS_PER_EPOCH))
    for head, lr, decay in zip(heads.weights.transpose(0, 1), lrs, decays):
        expected, torch_norm = train_with_torch(protocol, batches, lr, decay, initial_weights)
        torch.testing.assert_close(head, expected)
        if norm and not protocol.norm_is_affine:
            torch.testing.assert_close(norm(batches[0][0]), torch_norm.eval()(batches[0][0]))
        elif norm:
            scale, shift = torch_norm.weight.detach(), torch_norm.bias.detach()
            assert (scale - 1).abs().max() > 0.01  # scale and shift are trained
            assert shift.abs().max() > 0.01
            ours, theirs = norm(batches[0][0]), torch_norm.eval()(batches[0][0]).detach()
            torch.testing.assert_close(ours * scale + shift, theirs)


def test_initial_weights_have_the_authors_distributions():
    dim, classes = 64, 4000
    normal, uniform, truncated = (
        linear_heads.initial_weights(dim, classes, init, 0.01)[:, 0]
        for init in ("normal", "uniform", "truncated")
    )
    assert normal[:-1].std().item() == pytest.approx(0.01, rel=0.01)
    assert not normal[-1].any()
    # nn.Linear draws weights and biases uniformly between -1 / sqrt(inputs) and 1 / sqrt(inputs).
    assert uniform.abs().max().item() == pytest.approx(1 / 8, rel=1e-3)
    assert uniform.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.01)
    assert uniform[-1].std().item() > 0.07
    # Haiku truncates a normal distribution at two standard deviations, which multiplies its
    # standard deviation by 0.8796.
    assert truncated[:-1].abs().max().item() == pytest.approx(2 / 8, rel=1e-3)
    assert truncated[:-1].std().item() == pytest.approx(0.8796 / 8, rel=0.01)
    assert not truncated[-1].any()
    assert not linear_heads.initial_weights(dim, classes, "normal", 0.0).any()


class Float64Backbone(nn.Module):
    """The backbone in float64, whose features hardly depend on the micro-batch size."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.feature_dim = backbone, backbone.feature_dim

    def forward(self, images):
        return self.backbone(images.double())


def train_and_score(path, name):
    """Return the weights of every head after two epochs, and their accuracies, on one rank."""
    run = load(path)
    run.backbone.double()
    options = LinearOptions(name, epochs=2, batch_size=24)
    train, test = evaluation_split.labeled_splits(run, "a test")
    protocol, feature = options.adapt_protocol(len(train)), Float64Backbone(run.backbone)
    network = ProbedNetwork("pretrained", feature, options.grid(), protocol, 10, run.device)
    view = training_views.build_train_view(run, protocol.interpolation)
    published_linear.train_heads([network], run, train.source, view, protocol)
    return network.heads.weights, network.scores(test)[0]


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.full), 3])
def test_ranks_agree_with_one_process(run_folder, world_size):
    weights, accuracies = train_and_score(run_folder, "vissl")
    assert weights.abs().max() > 0.01
    for rank_result in run_ranks(train_and_score, run_folder, "vissl", world_size=world_size):
        torch.testing.assert_close(rank_result[0], weights, rtol=1e-4, atol=1e-6)
        assert torch.equal(rank_result[1], accuracies)


def test_digits_end_to_end(run_folder, capsys):
    options = "--device cpu --protocol simclr --epochs 2 --rows random pretrained --verbose"
    linear.main([str(run_folder), *options.split()])
    assert "google-research/simclr" in capsys.readouterr().out
    result = read_result(run_folder, "linear_simclr")
    rows = {row["features"]: row for row in result["rows"]}
    random = ["random, as built", "random, recalibrated", "random (better of two)"]
    assert list(rows) == [*random, "pretrained"]
    metrics = rows["pretrained"]["metrics"]
    assert list(metrics) == ["published setting", "chosen on held-out images"]
    names = [f"lr {lr:g}, wd {decay:g}" for lr in (0.1, 0.01, 0.03, 0.3, 1) for decay in (1e-6, 0)]
    grid_rows = read_result(run_folder, "linear_simclr_grid")["rows"]
    grid = {row["features"]: row["metrics"] for row in grid_rows}
    assert [list(row) for row in grid.values()] == [names] * 6
    held_out, test = grid["pretrained, held-out images"], grid["pretrained, test images"]
    note = rows["pretrained"]["notes"]["chosen on held-out images"]
    selected = note.partition(", at")[0]
    assert held_out[selected] == max(held_out.values())
    assert test[selected] == metrics["chosen on held-out images"]
    assert test[names[0]] == metrics["published setting"]
    protocol = result["protocol"]
    assert protocol["selection"] == (
        "by accuracy on 20 held-out training images, which the final heads are not trained on"
    )
    changes = "batch 16 (published: 4096, 180 images), 2 epochs (published: 90)"
    assert changes in protocol["classifier"]
    assert protocol["views"].endswith(
        "bicubic, tensorflow sampler, not antialiased, not flipped, like the views of the"
        " pretraining"
    )
    assert protocol["transform"].endswith("bicubic, nothing random")


def test_the_published_learning_rate_is_scaled_by_the_batch_size(run_folder):
    run = load(run_folder)
    protocol = LinearOptions("moco", batch_size=64).adapt_protocol(200)
    feature = Feature(run.backbone, "pooled")
    network = ProbedNetwork("pretrained", feature, [(30.0, 0.0)], protocol, 10, run.device)
    assert network.heads.lrs.item() == 30.0 * 64 / 256


def test_a_selection_on_the_test_images_is_labeled_as_such(run_folder, capsys):
    options = "--device cpu --protocol dino --epochs 1 --select test --verbose"
    linear.main([str(run_folder), *options.split()])
    output = capsys.readouterr().out
    assert "chosen on the test images" in output
    assert "ON THE TEST IMAGES" in output
    result = read_result(run_folder, "linear_dino_test_selected")
    metrics = result["rows"][0]["metrics"]
    assert list(metrics) == ["published setting", "chosen on the test images"]
    assert result["protocol"]["selection"].startswith(
        "ON THE TEST IMAGES, as in DINO's convention; this is an upper bound"
    )
    grid = read_result(run_folder, "linear_dino_test_selected_grid")["rows"][0]["metrics"]
    assert metrics["chosen on the test images"] == max(grid.values())


def test_selecting_nothing_trains_the_published_setting_on_every_image(run_folder):
    options = LinearOptions("swav", epochs=1, selection="published")
    result = published_linear.evaluate(load(run_folder), options)
    row = result["rows"][0]
    assert list(row["metrics"]) == ["published setting"]
    assert not row["notes"]
    assert "200 images" in result["protocol"]["classifier"]


@torch.no_grad()
def test_class_tokens_of_the_last_blocks_equal_those_that_hooks_record():
    backbone = backbones.build(BackboneConfig("test_vit"), 32).eval()
    tokens = []
    for block in backbone.model.blocks:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pooled = backbone(images)
    normalized = [backbone.model.norm(output) for output in tokens]
    last4, cls_mean = Feature(backbone, "last4"), Feature(backbone, "cls_mean")
    class_tokens = torch.cat([output[:, 0] for output in normalized[-4:]], dim=1)
    last = normalized[-1]
    class_and_mean = torch.cat([last[:, 0], last[:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(last4(images), class_tokens)
    torch.testing.assert_close(cls_mean(images), class_and_mean)
    torch.testing.assert_close(last4(images)[:, -backbone.feature_dim :], pooled)
    assert last4(images).shape[1] == last4.feature_dim


def test_dinos_feature_depends_on_the_width_of_the_backbone():
    narrow = backbones.build(BackboneConfig("test_vit"), 32)
    assert named_features.published_feature_name("dino", narrow) == "last4"
    wide = backbones.build_on_meta(BackboneConfig("vit_base_patch16_224"), 224)
    assert named_features.published_feature_name("dino", wide) == "cls_mean"
    assert Feature(wide, "cls_mean").feature_dim == 1536


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--protocol dino --feature last4",
            "--feature last4: ResNet has no class token; give --feature pooled",
        ),
        (
            "--protocol moco --rows raw",
            "--rows raw: the published protocols only evaluate networks; "
            "leave it out or give --protocol cached",
        ),
        (
            "--lrs 1",
            "--lrs: --protocol cached does not take it; "
            "leave it out or give a published --protocol",
        ),
        (
            "--select test",
            "--select test: --protocol cached selects on held-out training images; "
            "leave it out or give a published --protocol",
        ),
        (
            "--protocol moco --labels-per-class 1",
            "--labels-per-class: --protocol moco does not take it; "
            "leave it out or give --protocol cached",
        ),
        (
            "--protocol moco --select published --lrs 1",
            "--select published: only the published setting is trained; "
            "leave out --lrs and --weight-decays",
        ),
        (
            "--protocol moco --batch-size 999",
            "--epochs 100, --batch-size 999: give at least 1 epoch, and a batch of 1 to 180 images",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(run_folder, options, message):
    with pytest.raises(ValueError) as error:
        linear.main([str(run_folder), "--device", "cpu", *options.split()])
    assert str(error.value) == message


def test_accuracies_do_not_depend_on_the_number_of_images_per_matrix_product(monkeypatch):
    monkeypatch.setattr(linear_heads, "MAX_LOGITS", 12 * 7)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 6, 4, generator=generator)
    values = torch.randn(50, 5, generator=generator)
    labels = torch.randint(4, (50,), generator=generator)
    padded = F.pad(values, (0, 1), value=1.0)
    expected = [(padded @ head).argmax(dim=1).eq(labels).double().mean() for head in weights]
    accuracies, _ = linear_heads.scores(weights, values, labels)
    torch.testing.assert_close(accuracies, torch.stack(expected))
