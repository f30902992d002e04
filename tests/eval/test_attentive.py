"""Attentive probes equal plain modules that torch.optim.AdamW trains alone, on any ranks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_ranks
from torch import nn
from torch.nn import functional as F
from untrained_run import make_run

from ssl_pretrain.eval import attentive, attentive_protocols, runs, strong_views, training_views
from ssl_pretrain.eval.attentive_protocols import (
    ATTENTIVE_PROTOCOLS,
    AttentiveOptions,
    AttentiveProtocol,
    ProbeSetting,
)
from ssl_pretrain.eval.frozen import (
    cached_attentive,
    evaluation_split,
    patch_tokens,
    published_attentive,
)
from ssl_pretrain.eval.frozen.attentive_probes import AttentiveProbes, ProbeShape, max_num_heads
from ssl_pretrain.eval.frozen.probe_training import ProbeGrid
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.parallel import memory

DIM, CLASSES, HEADS, TOKENS = 12, 3, 3, 7
SHAPES = {
    "capi": ProbeShape("capi", DIM, CLASSES, HEADS),
    "vjepa": ProbeShape("jepa", DIM, CLASSES, HEADS),
    "vjepa2": ProbeShape("jepa", DIM, CLASSES, HEADS, num_blocks=2),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return make_run(folder, "backbone.name=test_vit", "data.subset=200")


def load(path):
    return runs.load_run(path, device="cpu")


def read_result(path, name):
    return json.loads((path / f"eval/{name}.json").read_text())


def random_tokens(num_images, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_images, TOKENS, DIM, generator=generator, dtype=dtype)
    return 2 + tokens, torch.randint(CLASSES, (num_images,), generator=generator)


class PlainProbe(nn.Module):
    """One probe as the authors write it, with keys and values of every token."""

    def __init__(self, shape, weights):
        super().__init__()
        self.shape = shape
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(value.clone()) for name, value in weights.items()}
        )

    def get(self, name):
        return self.weights[name.replace(".", "/")]

    def linear(self, name, x):
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def attention(self, query, key, value):
        heads = [x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (query, key, value)]
        scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(DIM / HEADS)
        return (scores.softmax(dim=3) @ heads[2]).transpose(1, 2).flatten(2)

    def forward(self, tokens):
        query = self.get("query").expand(len(tokens), 1, -1)
        if self.shape.kind == "capi":
            keys, values = tokens @ self.get("key.weight").T, self.linear("value", tokens)
            return self.linear("linear", self.attention(query, keys, values)[:, 0])
        for number in range(self.shape.num_blocks):
            name = f"blocks.{number}."
            qkv = self.linear(f"{name}qkv", self.norm(f"{name}norm1", tokens)).chunk(3, dim=2)
            tokens = tokens + self.linear(f"{name}proj", self.attention(*qkv))
            hidden = F.gelu(self.linear(f"{name}fc1", self.norm(f"{name}norm2", tokens)))
            tokens = tokens + self.linear(f"{name}fc2", hidden)
        tokens = self.norm("norm1", tokens)
        keys, values = tokens @ self.get("key.weight").T, self.linear("value", tokens)
        x = query + self.attention(self.linear("q", query), keys, values)
        x = x + self.linear("fc2", F.gelu(self.linear("fc1", self.norm("norm2", x))))
        return self.linear("linear", x)[:, 0]


def randomize(probes):
    """Give every weight of the probes another value, so that none is 0 or equal to another's."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in probes.weights.values():
            value += 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_probes_equal_modules_with_keys_and_values(name):
    shape, (tokens, labels) = SHAPES[name], random_tokens(5)
    probes = AttentiveProbes(shape, 1 if shape.num_blocks else 4, tokens)
    randomize(probes)
    logits = probes.logits(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="sum")
    gradients = dict(zip(probes.weights, torch.autograd.grad(loss, list(probes.weights.values()))))
    for number in range(probes.num_probes):
        plain = PlainProbe(shape, {key: value[number] for key, value in probes.weights.items()})
        expected = plain(tokens)
        torch.testing.assert_close(logits[number], expected, rtol=1e-12, atol=1e-12)
        F.cross_entropy(expected, labels, reduction="sum").backward()
        for key, gradient in gradients.items():
            assert gradient[number].abs().max() > 0, key
            torch.testing.assert_close(
                gradient[number], plain.get(key).grad, rtol=1e-10, atol=1e-12, msg=key
            )


def train_alone(shape, protocol, setting, weights, batches):
    plain = PlainProbe(shape, weights)
    undecayed = protocol.undecayed(weights)
    groups = [
        {"params": [plain.get(name) for name in weights if name not in undecayed], "decays": True},
        {"params": [plain.get(name) for name in undecayed], "decays": False},
    ]
    optimizer = torch.optim.AdamW(groups, betas=protocol.betas)
    for step, (tokens, labels) in enumerate(batches):
        lr, decay = protocol.rates(setting, step, len(batches))
        for group in optimizer.param_groups:
            group |= {"lr": lr, "weight_decay": decay if group["decays"] else 0.0}
        optimizer.zero_grad()
        F.cross_entropy(plain(tokens), labels).backward()
        if protocol.clip_norm:
            nn.utils.clip_grad_norm_(plain.parameters(), protocol.clip_norm)
        optimizer.step()
    return plain


@pytest.mark.parametrize("name", SHAPES)
def test_a_grid_equals_each_probe_trained_alone(name):
    batches = [random_tokens(16, seed) for seed in range(6)]
    options = AttentiveOptions(name, lrs=[0.02, 0.1], weight_decays=[0.0, 0.5], batch_size=16)
    protocol, shape = options.adapt_protocol(160), SHAPES[name]
    grid = ProbeGrid(shape, protocol.settings, protocol, len(batches), batches[0][0])
    initial = {
        key: value[0].detach().clone() for key, value in grid._groups[0][1].probes.weights.items()
    }
    for step, (tokens, labels) in enumerate(batches):
        grid.step(tokens, labels, step, len(labels))
    trained = [
        {key: value[number].detach() for key, value in optimizer.probes.weights.items()}
        for settings, optimizer in grid._groups
        for number in range(len(settings))
    ]
    assert len(trained) == 4
    for weights, setting in zip(trained, protocol.settings):
        plain = train_alone(shape, protocol, setting, initial, batches)
        for key, value in weights.items():
            assert not torch.equal(value, initial[key]), key
            torch.testing.assert_close(
                value, plain.get(key).detach(), rtol=1e-9, atol=1e-9, msg=key
            )


def test_the_probe_finds_what_only_one_patch_holds():
    """The mean over patches cannot tell the classes apart, because the other patches cancel it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 2
    signs = 2.0 * labels - 1
    tokens = 0.05 * torch.randn(240, 4, 8, generator=generator)
    tokens[:, 0, 0] += signs  # the marked patch, whose second number is 1, has the class
    tokens[:, 0, 1] += 1.0
    tokens[:, 1, 0] -= signs
    protocol = AttentiveProtocol(
        "", "capi", (ProbeSetting(0.03, 0.0),), batch_size=40, epochs=20, betas=(0.9, 0.95)
    )
    rows = torch.arange(200)
    shape = ProbeShape("capi", 8, 2, 1)
    grid = cached_attentive.train_probes(shape, tokens, labels, rows, protocol.settings, protocol)
    accuracies, _ = grid.score_tokens(tokens[200:], labels[200:])
    assert accuracies[0] == 1.0


def test_the_published_grids_and_schedules():
    capi, vjepa, vjepa2 = (ATTENTIVE_PROTOCOLS[name] for name in ("capi", "vjepa", "vjepa2"))
    assert [len(protocol.settings) for protocol in (capi, vjepa, vjepa2)] == [30, 1, 21]
    assert all(
        len({setting.name for setting in protocol.settings}) == len(protocol.settings)
        for protocol in (capi, vjepa, vjepa2)
    )
    setting = capi.settings[-1]
    assert (setting.lr, setting.weight_decay) == (1e-2, 5e-2)
    scaled = 1e-2 * 128 / 256
    assert [capi.rates(setting, step, 12_500) for step in (0, 1249, 12_499)] == [
        (0.0, 5e-2),
        (pytest.approx(scaled), 5e-2),
        (0.0, 5e-2),
    ]
    assert vjepa.rates(vjepa.settings[0], 99, 200) == pytest.approx((5e-4, (1e-3 + 1e-6) / 2))
    assert vjepa.rates(vjepa.settings[0], 199, 200) == pytest.approx((0.0, 1e-6))
    setting = vjepa2.settings[-1]
    assert vjepa2.rates(setting, 24, 200) == pytest.approx((2e-4 + 1.8e-3 / 2, 5e-4))
    assert vjepa2.rates(setting, 49, 200) == pytest.approx((2e-3, 5e-4))


def test_weights_without_decay_are_the_authors():
    weights = AttentiveProbes(SHAPES["vjepa"], 1, torch.empty(0)).weights
    biases = {name for name in weights if name.endswith("bias")}
    norms = {"norm1.weight", "norm2.weight"}
    assert ATTENTIVE_PROTOCOLS["capi"].undecayed(weights) == biases
    assert ATTENTIVE_PROTOCOLS["vjepa"].undecayed(weights) == biases | norms
    assert ATTENTIVE_PROTOCOLS["vjepa2"].undecayed(weights) == frozenset()


def test_heads_are_at_least_64_wide_and_divide_the_tokens():
    assert [max_num_heads(dim) for dim in (1024, 192, 588, 48, 65)] == [16, 3, 7, 1, 1]


@pytest.mark.parametrize(
    ("config", "num_heads"),
    [
        (BackboneConfig("efficientnet_b0"), 20),  # 1,280 channels, so by width
        (BackboneConfig("test_resnet"), None),
        (BackboneConfig("deit_tiny_patch16_224"), 3),
        (BackboneConfig("vit_small_patch16_18x2_224", args={"depth": 1}), 6),  # parallel branches
        (BackboneConfig("deit_tiny_patch16_224", args={"num_heads": 6}), 6),
    ],
)
def test_the_heads_of_v_jepas_probe_are_the_backbones_or_by_width(config, num_heads):
    backbone = backbones.build_on_meta(config, 32)
    dim = patch_tokens.TokenSequence(backbone).dim
    shape = published_attentive.build_shape(backbone, dim, ATTENTIVE_PROTOCOLS["vjepa"], CLASSES)
    assert shape.num_heads == (num_heads or max_num_heads(dim))


def train_cached(num_images):
    tokens, labels = random_tokens(num_images)
    protocol = AttentiveOptions(epochs=2, batch_size=31).adapt_protocol(num_images)
    grid = cached_attentive.train_probes(
        SHAPES["capi"], tokens, labels, torch.arange(num_images), protocol.settings, protocol
    )
    weights = grid._groups[0][1].probes.weights
    return {name: value.detach() for name, value in weights.items()}


def train_and_score(path, name):
    """Return the accuracies of all settings after one epoch, and a weight, on one rank."""
    run = load(path)
    options = AttentiveOptions(name, epochs=1, batch_size=24, lrs=[1e-3], weight_decays=[0.1])
    train, test = evaluation_split.labeled_splits(run, "a test")
    protocol = options.adapt_protocol(len(train))
    sequence = patch_tokens.TokenSequence(run.backbone)
    shape = published_attentive.build_shape(run.backbone, sequence.dim, protocol, 10)
    network = published_attentive.ProbedTokens("pretrained", sequence, shape)
    view = training_views.build_train_view(run, protocol.interpolation)
    published_attentive.train_probes([network], run, train.source, view, protocol)
    accuracies, _ = network.grid.score_split(test, network.token_function)
    return accuracies, network.grid._groups[0][1].probes.weights["query"].detach()


def test_ranks_agree_with_one_process_on_cached_tokens():
    expected = train_cached(100)
    for weights in run_ranks(train_cached, 100, world_size=3):
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.full
def test_ranks_agree_with_one_process_by_a_published_protocol(run_folder):
    accuracies, query = train_and_score(run_folder, "vjepa")
    for rank_accuracies, rank_query in run_ranks(
        train_and_score, run_folder, "vjepa", world_size=3
    ):
        torch.testing.assert_close(rank_query, query, rtol=1e-3, atol=1e-5)
        assert rank_accuracies == pytest.approx(accuracies, abs=0.005)


def test_digits_end_to_end(run_folder, capsys):
    attentive.main([str(run_folder), "--device", "cpu", "--epochs", "1", "--verbose"])
    assert "the probe of CAPI on tokens that are computed once" in capsys.readouterr().out
    result = read_result(run_folder, "attentive")
    rows = {row["features"]: row for row in result["rows"]}
    assert list(rows) == ["raw pixels", "random, as built", "random (better of two)", "pretrained"]
    protocol = result["protocol"]
    backbone = load(run_folder).backbone
    num_rows, num_columns = backbone.grid(load(run_folder).image_size)
    assert protocol["feature"] == (
        f"{num_rows} x {num_columns} patch tokens of the last layer after the final norm, if the"
        f" network has one, {backbone.token_dim} numbers each"
    )
    grid = {
        row["features"]: row["metrics"] for row in read_result(run_folder, "attentive_grid")["rows"]
    }
    names = [setting.name for setting in attentive_protocols.CACHED.settings]
    assert list(grid["pretrained"]) == names
    selected = rows["pretrained"]["notes"]["all labels"].partition(" (")[0].partition(", at")[0]
    assert grid["pretrained"][selected] == max(grid["pretrained"].values())


def test_a_published_protocol_end_to_end(run_folder):
    options = "--device cpu --protocol capi --epochs 1 --rows random pretrained"
    attentive.main([str(run_folder), *options.split()])
    result = read_result(run_folder, "attentive_capi")
    assert [row["features"] for row in result["rows"]] == [
        "random, as built",
        "random (better of two)",
        "pretrained",
    ]
    assert list(result["rows"][-1]["metrics"]) == ["chosen on held-out images"]
    classifier = result["protocol"]["classifier"]
    assert "batch 16 (published: 128, 180 images), 1 epochs (published: 12500 steps)" in classifier
    assert result["protocol"]["transform"].endswith("bicubic, nothing random")
    held_out, test = read_result(run_folder, "attentive_capi_grid")["rows"][-2:]
    note = result["rows"][-1]["notes"]["chosen on held-out images"].partition(", at")[0]
    assert held_out["metrics"][note] == max(held_out["metrics"].values())
    accuracy = result["rows"][-1]["metrics"]["chosen on held-out images"]
    assert test["metrics"][note] == accuracy


def test_v_jepas_only_setting_is_trained_on_all_images(run_folder):
    result = attentive.evaluate(load(run_folder), "vjepa", 1)
    assert list(result["rows"][-1]["metrics"]) == ["published setting"]
    assert "200 images" in result["protocol"]["classifier"]
    assert "AutoAugment" in result["protocol"]["views"]
    assert result["protocol"]["transform"].endswith("bilinear, nothing random")


def test_augmentations_only_depend_on_the_epoch_and_the_image():
    generator = torch.Generator().manual_seed(0)
    view = torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8)
    augment = strong_views.auto_augment
    first = [augment(view, 0, index, mean=(0.5, 0.5, 0.5)) for index in range(8)]
    again = [augment(view, 0, index, mean=(0.5, 0.5, 0.5)) for index in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert len({tensor.numpy().tobytes() for tensor in first}) > 4
    views = torch.zeros(40, 3, 16, 16)
    erased = strong_views.erase(views.clone(), 3, torch.arange(40))
    half = strong_views.erase(views[20:].clone(), 3, torch.arange(20, 40))
    assert torch.equal(erased[20:], half)
    share = np.mean([bool(image.any()) for image in erased])
    assert 0.1 < share < 0.4  # the probability is 0.25


def test_erasing_leaves_the_generator_of_torch_as_it_was():
    state = torch.get_rng_state()
    strong_views.erase(torch.zeros(4, 3, 16, 16), 0, torch.arange(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_that_do_not_fit_in_memory_are_refused(run_folder, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    run = load(run_folder)
    num_tokens = math.prod(run.backbone.grid(run.image_size))
    dim = max(3 * run.backbone.patch_size**2, run.backbone.token_dim)
    with pytest.raises(ValueError) as error:
        attentive.evaluate(run)
    size = (200 + 500 + 500) * num_tokens * dim * 4 / memory.GIB
    assert str(error.value) == (
        f"--protocol cached: {num_tokens} tokens of {dim} numbers for 200 training and 500 test"
        f" images need up to {size:.2f} GiB, more than {memory.USABLE_FRACTION:.0%} of the 0.00 GiB"
        " free. Give --protocol capi, which computes them anew in every step, or fewer images"
        " (data.subset=N)"
    )


def test_memory_is_checked_for_the_largest_row(run_folder, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**10)
    run = load(run_folder)
    config, side = BackboneConfig("test_vit", args={"patch_size": 4}), 4
    run = replace(run, backbone=backbones.build(config, run.image_size))
    num_patches = (run.image_size // side) ** 2
    assert num_patches > 1
    assert num_patches * 3 * side**2 > run.backbone.token_dim > 3 * side**2
    expected = {
        ("raw", "pretrained"): f"{num_patches} tokens of {3 * side**2} numbers",
        ("pretrained",): f"1 tokens of {run.backbone.token_dim} numbers",
    }
    for rows, tokens in expected.items():
        with pytest.raises(ValueError) as error:
            patch_tokens.check_memory(run, 200, 500, rows, "prefix")
        assert str(error.value).startswith(f"--protocol cached: {tokens} for 200 training")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--protocol capi --rows raw",
            "--rows raw: the published protocols only evaluate networks; "
            "leave it out or give --protocol cached",
        ),
        (
            "--select test",
            "--select test: --protocol cached selects on held-out training images; "
            "leave it out or give a published --protocol",
        ),
        (
            "--protocol capi --select published",
            "--select published: --protocol capi has 30 settings; name one with --lrs and "
            "--weight-decays, or give --select held-out",
        ),
        (
            "--protocol vjepa --batch-size 999",
            "--epochs 20, --batch-size 999: give at least 1 epoch, and a batch of 1 to 200 images",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(run_folder, options, message):
    with pytest.raises(ValueError) as error:
        attentive.main([str(run_folder), "--device", "cpu", *options.split()])
    assert str(error.value) == message


def test_an_unknown_protocol_is_refused(run_folder):
    with pytest.raises(ValueError) as error:
        attentive.evaluate(load(run_folder), "capy")
    assert str(error.value) == (
        "evaluate: attentive has no protocol 'capy'; choose one of: cached, capi, vjepa, vjepa2"
    )
