"""eval.semi and eval.finetune: one trainer, torch's optimizers and timm's groups, the same on any number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_ranks
from made_run import make_run
from torch import nn
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.eval import finetune, protocols, runs, semi
from ssl_pretrain.eval.finetuning import selection, trainer
from ssl_pretrain.eval.finetuning.selection import Settings
from ssl_pretrain.eval.frozen import evaluation_split


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made", "data.subset=200")


def trained(path, name, dtype=torch.float32, **changes):
    run = runs.load_run(path, device="cpu")
    train, _ = evaluation_split.labelled_parts(run, "a test")
    protocol = replace(
        protocols.TUNING[name], **{"epochs": 2, "steps": 0, "batch_size": 24, **changes}
    )
    model = trainer.network(run, run.backbone, protocol, 10).to(dtype)
    if dtype == torch.float64:
        model.register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(),))
    return trainer.train(run, model, train.source.take(np.arange(72)), protocol, 10).state_dict()


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_what_one_process_trains(made, world_size):
    alone = trained(made, "semi", torch.float64)
    for state in run_ranks(trained, made, "semi", torch.float64, world_size=world_size):
        assert state.keys() == alone.keys()
        for key, value in state.items():
            torch.testing.assert_close(value, alone[key], rtol=1e-6, atol=1e-9)


def test_a_step_is_torchs_sgd_on_the_mean_cross_entropy(made):
    run = runs.load_run(made, device="cpu")
    train, _ = evaluation_split.labelled_parts(run, "a test")
    protocol = replace(protocols.TUNING["semi"], epochs=1, batch_size=24)
    ours = trainer.train(
        run,
        trainer.network(run, run.backbone, protocol, 10),
        train.source.take(np.arange(24)),
        protocol,
        10,
    )
    theirs = trainer.network(run, run.backbone, protocol, 10).train()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05 * 24 / 256, momentum=0.9, nesterov=True)
    from ssl_pretrain.eval.frozen import published_linear

    with published_linear.batches(
        run, train.source.take(np.arange(24)), published_linear.train_views(run, "bicubic"), 24
    ) as made_batches:
        batch = next(made_batches.starting_at(0))
    F.cross_entropy(theirs(batch.views[0]), batch.labels).backward()
    optimizer.step()
    for ours_value, theirs_value in zip(ours.state_dict().values(), theirs.state_dict().values()):
        torch.testing.assert_close(ours_value, theirs_value, rtol=1e-4, atol=1e-6)


def test_the_backbone_begins_with_the_runs_weights_and_the_classifier_at_zero(made):
    run = runs.load_run(made, device="cpu")
    model = trainer.network(run, run.backbone, protocols.TUNING["semi"], 10)
    own = {key.removeprefix("model."): value for key, value in run.backbone.state_dict().items()}
    state = model.state_dict()
    assert set(state) - set(own) == {"fc.weight", "fc.bias"} and all(
        torch.equal(state[key], value) for key, value in own.items()
    )
    assert not state["fc.weight"].any() and not state["fc.bias"].any()
    other = trainer.network(run, run.backbone, protocols.TUNING["deit"], 10)
    assert 0.015 < other.fc.weight.std() < 0.025


def test_layers_learn_by_their_depth():
    import timm

    model = timm.create_model("test_vit", num_classes=10)
    protocol = protocols.TUNING["deit"]
    stepped = trainer.optimizer(model, protocol, 0.05, layer_decay=0.5)
    rate = trainer.set_rate(stepped, replace(protocol, batch_size=512, warmup_epochs=0), 0.0, 10)
    assert rate == pytest.approx(5e-4)
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name = {
        names[parameter]: group for group in stepped.param_groups for parameter in group["params"]
    }
    depth = len(model.blocks)
    assert by_name["head.weight"]["lr"] == pytest.approx(rate)
    for block in range(depth):
        assert by_name[f"blocks.{block}.attn.qkv.weight"]["lr"] == pytest.approx(
            rate * 0.5 ** (depth - block)
        )
    assert by_name["patch_embed.proj.weight"]["lr"] == pytest.approx(rate * 0.5 ** (depth + 1))
    assert (
        by_name["blocks.0.attn.qkv.weight"]["weight_decay"] == 0.05
        and by_name["blocks.0.attn.qkv.bias"]["weight_decay"] == 0
    )
    assert by_name["pos_embed"]["weight_decay"] == 0


def test_the_rate_warms_up_and_falls():
    protocol = replace(protocols.TUNING["deit"], batch_size=1024)
    stepped = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    rates = [
        trainer.set_rate(stepped, protocol, progress, 150)
        for progress in (0, 2.5 / 150, 5 / 150, 1)
    ]
    assert rates == pytest.approx([1e-6, (1e-6 + 1e-3) / 2, 1e-3, 1e-5])


def test_mixed_targets_are_timms_and_smoothed_ones_sum_to_one():
    images, labels = (
        torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.arange(8) % 5,
    )
    plain = trainer.mixing(protocols.TUNING["semi"], 5, torch.device("cpu"))(images.clone(), labels)
    assert torch.equal(plain[0], images) and torch.equal(plain[1], F.one_hot(labels, 5).float())
    smoothed = trainer.mixing(
        replace(protocols.TUNING["semi"], smoothing=0.1), 5, torch.device("cpu")
    )(images.clone(), labels)[1]
    assert smoothed[0].tolist() == pytest.approx([0.92, 0.02, 0.02, 0.02, 0.02])
    mixed = trainer.mixing(protocols.TUNING["deit"], 5, torch.device("cpu"))
    trainer.seed(3)
    first = mixed(images.clone(), labels)
    trainer.seed(3)
    again = mixed(images.clone(), labels)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], images)
    torch.testing.assert_close(first[1].sum(dim=1), torch.ones(8))


def test_randaugment_depends_on_the_epoch_and_the_image_alone():
    augment = trainer.RandAugment("rand-m9-mstd0.5-inc1", [0.5, 0.5, 0.5])
    view = (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    made = [augment(view, epoch, index) for epoch, index in ((0, 1), (1, 1), (0, 2), (0, 1))]
    assert (
        torch.equal(made[0], made[3])
        and made[0].dtype == torch.uint8
        and made[0].shape == view.shape
    )
    assert not torch.equal(made[0], made[1]) or not torch.equal(made[0], made[2])


def test_the_moving_average_is_what_is_judged(made):
    run = runs.load_run(made, device="cpu")
    train, _ = evaluation_split.labelled_parts(run, "a test")
    protocol = replace(protocols.TUNING["semi"], epochs=1, batch_size=24)
    images = train.source.take(np.arange(24))
    start = trainer.network(run, run.backbone, protocol, 10)
    average = trainer.train(
        run, trainer.network(run, run.backbone, protocol, 10), images, protocol, 10, ema=0.75
    )
    last = trainer.train(
        run, trainer.network(run, run.backbone, protocol, 10), images, protocol, 10
    )
    expected = (
        0.75 * start.conv1.weight + 0.25 * last.conv1.weight
        if isinstance(start.conv1, nn.Conv2d)
        else None
    )
    weights = [dict(model.named_parameters()) for model in (start, last, average)]
    name = next(iter(weights[0]))
    torch.testing.assert_close(weights[2][name], 0.75 * weights[0][name] + 0.25 * weights[1][name])
    assert expected is None or not torch.equal(weights[1][name], weights[2][name])


def test_few_labels_end_to_end(made, capsys):
    semi.main(
        [
            str(made),
            "--device",
            "cpu",
            "--epochs",
            "2",
            "--percent",
            "10",
            "--rows",
            "random",
            "pretrained",
            "--lrs",
            "0.05",
            "0.5",
        ]
    )
    printed = capsys.readouterr().out
    found = json.loads((made / "eval/semi.json").read_text())
    assert [row["features"] for row in found["rows"]] == [
        "trained from random weights",
        "pretrained",
    ]
    assert (
        found["protocol"]["labels, 10 %"] == "20 training images, as many of each class, by seed 0"
    )
    assert (
        "learning rate 0.05, 0.5 at a batch of 256, batch 16 of 20 labelled images, 2 epochs"
        in found["protocol"]["training, 10 %"]
    )
    note = found["rows"][1]["notes"]["10 %"]
    assert "on 2 held-out labelled images (lr 0.05 wd 0 " in note and "appendix B.5" in printed


def test_fine_tuning_end_to_end(made, capsys):
    arguments = [
        "--device",
        "cpu",
        "--protocol",
        "deit",
        "--epochs",
        "1",
        "--layer-decay",
        "0.75",
        "--ema",
        "0.5",
    ]
    finetune.main([str(made), *arguments])
    found = json.loads((made / "eval/finetune_deit.json").read_text())
    said = found["protocol"]["training, all labels"]
    assert (
        "AdamW, learning rate 0.0005 at a batch of 512" in said
        and "layer decay 0.75, mixup 0.8, cutmix 1.0" in said
    )
    assert (
        said.endswith("randaugment rand-m9-mstd0.5-inc1, moving average 0.5")
        and "DeiT (arXiv:2012.12877)" in capsys.readouterr().out
    )


def test_a_balanced_choice_is_balanced_and_seeded(made):
    train, _ = evaluation_split.labelled_parts(runs.load_run(made, device="cpu"), "a test")
    rows = semi.balanced(train, 10, 0)
    assert np.bincount(train.labels[rows]).tolist() == [2] * 10 and np.array_equal(
        rows, semi.balanced(train, 10, 0)
    )
    assert (
        not np.array_equal(rows, semi.balanced(train, 10, 1))
        and len(semi.balanced(train, 0.1, 0)) == 10
    )


@pytest.mark.parametrize(
    ("percent", "message"),
    [
        (100, "--percent 100: give a number between 0 and 100; eval.finetune trains on all"),
        (
            90,
            "--percent 90: that is 18 images of each class, and '{}' has {}; give a smaller percentage, or the choice as a list (--subset FILE)",
        ),
    ],
)
def test_a_share_that_cannot_be_balanced_is_refused(made, percent, message):
    train, _ = evaluation_split.labelled_parts(runs.load_run(made, device="cpu"), "a test")
    counts = np.bincount(train.labels, minlength=10)
    with pytest.raises(ValueError) as error:
        semi.balanced(train, percent, 0)
    assert str(error.value) == message.format(train.classes[counts.argmin()], counts.min())


def test_a_published_list_chooses_its_images(made, tmp_path):
    train, _ = evaluation_split.labelled_parts(runs.load_run(made, device="cpu"), "a test")
    names = [train.source.name(7), "some/folder/" + train.source.name(3)]
    (tmp_path / "1percent.txt").write_text("\n".join(names) + "\n")
    assert semi.listed(train, tmp_path / "1percent.txt").tolist() == [3, 7]
    (tmp_path / "other.txt").write_text(f"{names[0]}\nn01440764_10026.JPEG\n")
    with pytest.raises(ValueError) as error:
        semi.listed(train, tmp_path / "other.txt")
    assert str(error.value) == (
        f"--subset {tmp_path / 'other.txt'}: 1 of its 2 images are not in {train.source.where} (n01440764_10026.JPEG);"
        " give the list of this data set"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            Settings(batch_size=500),
            "--epochs 150, --batch-size 500: give more than 0 epochs, and a batch of 1 to 200 images",
        ),
        (
            Settings(batch_size=15),
            "--batch-size 15: 15 images a rank cannot be mixed in pairs; give an even number, or --mixup 0 --cutmix 0",
        ),
        (
            Settings(layer_decay=1.5),
            "--layer-decay 1.5 is a share in (0, 1], --ema 0 one in [0, 1)",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        selection.departing(protocols.TUNING["deit"], settings, 200)
    assert str(error.value) == message


def test_seeds_of_a_step_are_of_its_part_of_the_batch():
    trainer.seed(5)
    assert torch.initial_seed() == rng.seed_of(0, 5, 0)
