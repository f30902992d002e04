"""MAE's linear and fine-tuning protocols: the authors' arithmetic, schedules and network."""

import json
import math
from dataclasses import replace

import pytest
import timm
import torch
from mae_schedule import mae_lr
from torch import nn
from untrained_run import load_in_float32, make_run

from ssl_pretrain.eval import finetune, linear
from ssl_pretrain.eval.finetuning import trainer
from ssl_pretrain.eval.finetuning_protocols import FINETUNING_PROTOCOLS, choose_protocol
from ssl_pretrain.eval.frozen import named_features
from ssl_pretrain.eval.frozen.named_features import Feature
from ssl_pretrain.eval.frozen.published_linear import ProbedNetwork
from ssl_pretrain.eval.protocols import LINEAR_PROTOCOLS, LinearOptions
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig

VIT = ["backbone.name=test_vit", "backbone.args={depth: 3, patch_size: 8}"]
MAE_VIT_B = FINETUNING_PROTOCOLS["mae_vit_b"]
DIM, CLASSES, BATCH, STEPS_PER_EPOCH, EPOCHS = 3, 4, 6, 5, 10


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    overrides = [*VIT, "backbone.stem=imagenet", "data.subset=200"]
    return make_run(tmp_path_factory.mktemp("runs") / "vit", *overrides)


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "resnet", "data.subset=200")


@pytest.fixture
def vit_run(vit_folder):
    return load_in_float32(vit_folder)


def train_head_in_loops(batches, weight, bias, lrs, weight_decay):
    """Train one head with batch norm and LARS, one number at a time.

    Args:
        batches: Features, lists (BATCH, DIM), and labels of every step.
        weight: Initial weights, lists (CLASSES, DIM). Changed in place.
        bias: Initial biases. Changed in place.
        lrs: Learning rate of every step.
        weight_decay: Weight decay, which LARS does not apply to biases.
    """
    weight_momentum = [[0.0] * DIM for _ in range(CLASSES)]
    bias_momentum = [0.0] * CLASSES
    for (values, labels), lr in zip(batches, lrs):
        means = [sum(row[d] for row in values) / BATCH for d in range(DIM)]
        variances = [sum((row[d] - means[d]) ** 2 for row in values) / BATCH for d in range(DIM)]
        weight_gradient = [[weight_decay * w for w in row] for row in weight]
        bias_gradient = [0.0] * CLASSES
        for row, label in zip(values, labels):
            x = [(row[d] - means[d]) / math.sqrt(variances[d] + 1e-6) for d in range(DIM)]
            logits = [sum(w * v for w, v in zip(weight[c], x)) + bias[c] for c in range(CLASSES)]
            total = sum(math.exp(logit) for logit in logits)
            for c in range(CLASSES):
                error = (math.exp(logits[c]) / total - (c == label)) / BATCH
                bias_gradient[c] += error
                for d in range(DIM):
                    weight_gradient[c][d] += error * x[d]
        weight_norm = math.sqrt(sum(w * w for row in weight for w in row))
        update_norm = math.sqrt(sum(g * g for row in weight_gradient for g in row))
        trust = 0.001 * weight_norm / update_norm if weight_norm and update_norm else 1.0
        for c in range(CLASSES):
            bias_momentum[c] = 0.9 * bias_momentum[c] + bias_gradient[c]
            bias[c] -= lr * bias_momentum[c]
            for d in range(DIM):
                momentum = 0.9 * weight_momentum[c][d] + trust * weight_gradient[c][d]
                weight_momentum[c][d] = momentum
                weight[c][d] -= lr * momentum


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class GivenFeature(nn.Identity):
    """Feature of the heads, which get its values from the test."""

    feature_dim = DIM


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_heads_equal_the_authors_batch_norm_lars_and_warm_up(weight_decay):
    protocol = LinearOptions("mae", epochs=EPOCHS, batch_size=BATCH).adapt_protocol(1000)
    grid = [(lr, weight_decay) for lr in (0.1, 30.0, 1000.0)]
    network = ProbedNetwork("", GivenFeature(), grid, protocol, CLASSES, torch.device("cpu"))
    start = network.heads.weights[:, 0].clone()
    generator = torch.Generator().manual_seed(0)
    shape = 3 * STEPS_PER_EPOCH, BATCH
    values = 2 + torch.randn(*shape, DIM, generator=generator)
    labels = torch.randint(CLASSES, shape, generator=generator)
    for step in range(len(values)):
        network.step(values[step], labels[step], protocol.lr_factor(step / STEPS_PER_EPOCH))
    for head, (base_lr, _) in zip(network.heads.weights.transpose(0, 1), grid):
        lrs = [
            mae_lr(
                step / STEPS_PER_EPOCH,
                lr=base_lr * BATCH / 256,
                warmup_epochs=protocol.warmup_epochs,
                epochs=EPOCHS,
            )
            for step in range(len(values))
        ]
        weight, bias = start[:-1].T.tolist(), start[-1].tolist()
        train_head_in_loops(zip(values.tolist(), labels.tolist()), weight, bias, lrs, weight_decay)
        expected = torch.tensor([*map(list, zip(*weight)), bias])
        torch.testing.assert_close(head, expected, rtol=1e-11, atol=1e-13)
    # The largest rate moves the weights, so that their scaling matters.
    assert (network.heads.weights[:-1, 2] - start[:-1]).norm() > 0.1 * start[:-1].norm()


def test_the_rate_of_the_heads_follows_the_authors_schedule():
    protocol = LINEAR_PROTOCOLS["mae"]
    for epoch in (0, 0.25, 9.9, 10, 10.1, 50, 89.99):
        expected = mae_lr(epoch, warmup_epochs=10, epochs=90)
        assert protocol.lr_factor(epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(None, 10), (50, 10), (20, 4), (1, 0.2)])
def test_a_short_linear_training_has_a_short_warm_up(epochs, warmup_epochs):
    protocol = LinearOptions("mae", epochs=epochs).adapt_protocol(1_281_167)
    assert protocol.warmup_epochs == pytest.approx(warmup_epochs)
    assert protocol.batch_size == 16384


def test_the_rates_of_fine_tuning_follow_the_authors_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    for epoch in (0, 0.25, 4.9, 5, 5.1, 50, 99.99):
        lr = trainer.set_learning_rates(optimizer, MAE_VIT_B, epoch / 100, 100)
        expected = mae_lr(epoch, lr=5e-4 * 4, min_lr=1e-6, warmup_epochs=5, epochs=100)
        assert lr == pytest.approx(expected, rel=1e-12)


def test_fine_tuning_has_the_published_numbers():
    numbers = {
        name: (p.base_lr, p.epochs, p.layer_decay, p.drop_path)
        for name, p in FINETUNING_PROTOCOLS.items()
        if name.startswith("mae")
    }
    assert numbers == {
        "mae_vit_b": (5e-4, 100, 0.65, 0.1),
        "mae_vit_l": (1e-3, 50, 0.75, 0.2),
        "mae_vit_h": (1e-3, 50, 0.75, 0.3),
    }
    p = MAE_VIT_B
    assert (p.batch_size, p.lr_batch_size, p.weight_decay) == (1024, 256, 0.05)
    assert (p.mixup, p.cutmix, p.smoothing, p.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (p.randaugment, p.head_std) == ("rand-m9-mstd0.5-inc1", 2e-5)
    assert not p.decays_norms_and_biases


@pytest.mark.parametrize(
    ("network", "protocol"),
    [
        ("vit_small_patch16_224", "mae_vit_b"),
        ("vit_base_patch16_224", "mae_vit_b"),
        ("vit_large_patch16_224", "mae_vit_l"),
        pytest.param("vit_huge_patch14_224", "mae_vit_h", marks=pytest.mark.full),
        pytest.param("vit_giant_patch14_224", "mae_vit_h", marks=pytest.mark.full),
    ],
)
def test_the_width_of_the_network_decides(network, protocol):
    backbone = backbones.build_on_meta(BackboneConfig(network), 224)
    assert choose_protocol("mae", backbone) is FINETUNING_PROTOCOLS[protocol]


@torch.no_grad()
def test_the_classifier_reads_the_normalized_mean_of_the_patches(vit_run):
    backbone = vit_run.backbone.model
    nn.init.normal_(backbone.norm.weight)  # a pretrained norm, which fine-tuning removes
    protocol = replace(MAE_VIT_B, drop_path=0.0)
    model = trainer.build_network(vit_run, vit_run.backbone, protocol, 10).eval()
    images = torch.randn(
        2, 3, vit_run.view_size, vit_run.view_size, generator=torch.Generator().manual_seed(0)
    )
    captured = []
    handle = backbone.blocks[-1].register_forward_hook(
        lambda module, inputs, output: captured.append(output)
    )
    backbone(images)
    handle.remove()
    mean = captured[0][:, 1:].mean(dim=1)
    centered = mean - mean.mean(dim=1, keepdim=True)
    normalized = centered / (centered.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    expected = normalized @ model.head.weight.T
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-8)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert not model.head.bias.any()
    # timm builds the same network if it is asked for average pooling.
    theirs = timm.create_model(
        "test_vit",
        depth=3,
        patch_size=8,
        img_size=vit_run.view_size,
        global_pool="avg",
        num_classes=10,
    ).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model(images), theirs(images))


def test_rates_decay_by_layer_as_in_the_authors_code(vit_run):
    model = trainer.build_network(vit_run, vit_run.backbone, MAE_VIT_B, 10)
    optimizer = trainer.build_optimizer(model, MAE_VIT_B)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    num_layers = len(model.blocks) + 1
    assert num_layers == 4

    def layer(name):
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks") else num_layers

    assert groups.keys() == set(names.values())
    for parameter, name in names.items():
        has_decay = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        expected = 0.65 ** (num_layers - layer(name)), 0.05 if has_decay else 0.0
        assert groups[name] == pytest.approx(expected), name
    assert groups["fc_norm.weight"] == groups["head.bias"] == (1.0, 0.0)


def test_the_linear_feature_is_the_class_token():
    tokens = backbones.build(BackboneConfig("test_vit"), 32)
    means = backbones.build(BackboneConfig("test_vit", args={"global_pool": "avg"}), 32)
    resnet = backbones.build(BackboneConfig("test_resnet"), 32)
    features = [
        named_features.published_feature_name("class_token", backbone)
        for backbone in (tokens, means, resnet)
    ]
    assert features == ["pooled", "last1", "pooled"]
    assert str(Feature(means, "last1")).startswith("class token of the last block")


def test_the_linear_command_saves_its_protocol(vit_folder):
    options = "--device cpu --protocol mae --epochs 2"
    linear.main([str(vit_folder), *options.split()])
    result = json.loads((vit_folder / "eval/linear_mae.json").read_text())
    assert list(result["rows"][0]["metrics"]) == ["published setting", "chosen on held-out images"]
    classifier, views = result["protocol"]["classifier"], result["protocol"]["views"]
    assert "LARS with coefficient 0.001, not on biases" in classifier
    assert "batch 16 (published: 16384, 180 images), 2 epochs (published: 90)" in classifier
    assert "warm-up 0.4 epochs, cosine to 0 by steps" in classifier
    assert classifier.endswith("features through a batch norm without scale and shift")
    assert "bicubic, clipped sampler" in views
    assert "not antialiased" not in views


def test_the_fine_tuning_command_saves_its_protocol(vit_folder):
    options = "--device cpu --protocol mae --epochs 1"
    finetune.main([str(vit_folder), *options.split()])
    result = json.loads((vit_folder / "eval/finetune_mae.json").read_text())
    protocol = result["protocol"]
    assert protocol["source"].endswith("its numbers for ViT-B")
    assert protocol["feature"] == (
        "none: the whole network is trained, with a linear classifier on its mean patch token,"
        " after a new norm"
    )
    training = protocol["training, all labels"]
    assert "AdamW, learning rate 0.0005 at a batch of 256" in training
    assert "layer decay 0.65, mixup 0.8, cutmix 1.0" in training


def test_fine_tuning_a_network_without_class_token_is_refused(resnet_folder):
    with pytest.raises(ValueError) as error:
        finetune.main([str(resnet_folder), "--device", "cpu", "--protocol", "mae"])
    assert str(error.value) == (
        "--protocol mae: test_resnet is not a ViT with a class token; give --protocol simclr or"
        " deit"
    )


def test_an_unknown_protocol_of_fine_tuning_is_refused(vit_run):
    with pytest.raises(ValueError) as error:
        choose_protocol("semi", vit_run.backbone)
    assert str(error.value) == (
        "--protocol semi: is not a protocol of fine-tuning; give one of: simclr, deit, mae"
    )
