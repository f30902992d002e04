"""eval.semi and eval.finetune: torch's optimizers, timm's groups, and ranks that agree."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import run_ranks
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import nn
from torch.nn import functional as F
from untrained_run import load_in_float32, make_run

from ssl_pretrain import rng
from ssl_pretrain.eval import finetune, runs, semi, training_views
from ssl_pretrain.eval.finetuning import selection, trainer
from ssl_pretrain.eval.finetuning.selection import FinetuningOptions
from ssl_pretrain.eval.finetuning_protocols import FINETUNING_PROTOCOLS
from ssl_pretrain.eval.frozen import evaluation_split

SEMI, DEIT = FINETUNING_PROTOCOLS["semi"], FINETUNING_PROTOCOLS["deit"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", "data.subset=200")


@pytest.fixture
def run(run_folder):
    return load_in_float32(run_folder)


@pytest.fixture
def train_split(run):
    return evaluation_split.labeled_splits(run, "a test")[0]


def random_images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def train_in_float64(path):
    """Return the state of a network trained on one rank."""
    run = runs.load_run(path, device="cpu")
    train, _ = evaluation_split.labeled_splits(run, "a test")
    protocol = replace(SEMI, epochs=2, batch_size=24)
    model = trainer.build_network(run, run.backbone, protocol, 10).double()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return trainer.train(run, model, train.source.take(np.arange(72)), protocol, 10).state_dict()


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(run_folder, world_size):
    expected = train_in_float64(run_folder)
    for state in run_ranks(train_in_float64, run_folder, world_size=world_size):
        torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-9)


def test_a_step_is_torchs_sgd_on_the_mean_cross_entropy(run, train_split):
    protocol = replace(SEMI, epochs=1, batch_size=24)
    source = train_split.source.take(np.arange(24))
    model = trainer.build_network(run, run.backbone, protocol, 10)
    ours = trainer.train(run, model, source, protocol, 10)
    theirs = trainer.build_network(run, run.backbone, protocol, 10).train()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05 * 24 / 256, momentum=0.9, nesterov=True)
    view = training_views.build_train_view(run, "bicubic")
    with training_views.build_train_loader(run, source, view, 24) as loader:
        batch = next(loader.iterate_from(0))
    F.cross_entropy(theirs(batch.views[0]), batch.labels).backward()
    optimizer.step()
    for ours_value, theirs_value in zip(ours.state_dict().values(), theirs.state_dict().values()):
        torch.testing.assert_close(ours_value, theirs_value, rtol=1e-4, atol=1e-6)


def test_the_backbone_starts_with_the_runs_weights_and_the_classifier_at_zero(run):
    state = trainer.build_network(run, run.backbone, SEMI, 10).state_dict()
    pretrained = {
        key.removeprefix("model."): value for key, value in run.backbone.state_dict().items()
    }
    assert set(state) - set(pretrained) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(state[key], value) for key, value in pretrained.items())
    assert not state["fc.weight"].any()
    assert not state["fc.bias"].any()
    deit = trainer.build_network(run, run.backbone, DEIT, 10)
    assert 0.015 < deit.fc.weight.std() < 0.025


def test_learning_rates_decay_by_layer_and_biases_have_no_weight_decay():
    model = timm.create_model("test_vit", num_classes=10)
    protocol = replace(DEIT, layer_decay=0.5, batch_size=512, warmup_epochs=0)
    optimizer = trainer.build_optimizer(model, protocol)
    lr = trainer.set_learning_rates(optimizer, protocol, 0.0, 10)
    assert lr == pytest.approx(5e-4)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]
    }
    depth = len(model.blocks)
    assert groups["head.weight"]["lr"] == pytest.approx(lr)
    for block in range(depth):
        block_lr = groups[f"blocks.{block}.attn.qkv.weight"]["lr"]
        assert block_lr == pytest.approx(lr * 0.5 ** (depth - block))
    patch_lr = groups["patch_embed.proj.weight"]["lr"]
    assert patch_lr == pytest.approx(lr * 0.5 ** (depth + 1))
    assert groups["blocks.0.attn.qkv.weight"]["weight_decay"] == 0.05
    assert groups["blocks.0.attn.qkv.bias"]["weight_decay"] == 0
    assert groups["pos_embed"]["weight_decay"] == 0


def test_the_learning_rate_warms_up_and_falls():
    protocol = replace(DEIT, batch_size=1024)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    lrs = [
        trainer.set_learning_rates(optimizer, protocol, fraction, 150)
        for fraction in (0, 2.5 / 150, 5 / 150, 1)
    ]
    assert lrs == pytest.approx([1e-6, (1e-6 + 1e-3) / 2, 1e-3, 1e-5])


def test_a_protocol_without_mixing_keeps_the_images_and_smooths_the_labels():
    images, labels = random_images(8, 3, 16, 16), torch.arange(8) % 5
    unmixed_images, targets = trainer.build_batch_augmentation(SEMI, 5, CPU)(images.clone(), labels)
    assert torch.equal(unmixed_images, images)
    assert torch.equal(targets, F.one_hot(labels, 5).float())
    augment = trainer.build_batch_augmentation(replace(SEMI, smoothing=0.1), 5, CPU)
    _, smooth_targets = augment(images.clone(), labels)
    assert smooth_targets[0].tolist() == pytest.approx([0.92, 0.02, 0.02, 0.02, 0.02])


def test_mixing_depends_on_the_seed_of_the_step():
    images, labels = random_images(8, 3, 16, 16), torch.arange(8) % 5
    mix = trainer.build_batch_augmentation(DEIT, 5, CPU)
    trainer.seed_generators(3)
    first_images, targets = mix(images.clone(), labels)
    trainer.seed_generators(3)
    second_images, _ = mix(images.clone(), labels)
    assert torch.equal(first_images, second_images)
    assert not torch.equal(first_images, images)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_randaugment_depends_only_on_the_epoch_and_the_image():
    augment = partial(trainer.rand_augment, policy="rand-m9-mstd0.5-inc1", mean=(0.5, 0.5, 0.5))
    view = (random_images(3, 16, 16) * 255).to(torch.uint8)
    first, other_epoch, other_image, repeated = (
        augment(view, epoch, index) for epoch, index in ((0, 1), (1, 1), (0, 2), (0, 1))
    )
    assert torch.equal(first, repeated)
    assert (first.dtype, first.shape) == (torch.uint8, view.shape)
    assert not torch.equal(first, other_epoch) or not torch.equal(first, other_image)


def test_randaugment_equals_the_one_that_the_authors_build():
    policy, mean = "rand-m9-mstd0.5-inc1", (0.485, 0.456, 0.406)
    # DeiT and MAE pass these arguments to timm.
    pipeline = create_transform(
        32, is_training=True, auto_augment=policy, interpolation="bicubic", mean=mean
    )
    authors_augment = next(t for t in pipeline.transforms if isinstance(t, RandAugment))
    view = (random_images(3, 32, 32) * 255).to(torch.uint8)
    image = Image.fromarray(view.permute(1, 2, 0).numpy())
    for index in range(40):
        ours = trainer.rand_augment(view, 0, index, policy=policy, mean=mean)
        trainer._seed_python_and_numpy(rng.derive_seed(trainer.SEED, 0, index))
        expected = torch.from_numpy(np.array(authors_augment(image))).permute(2, 0, 1)
        assert torch.equal(ours, expected)


def test_the_moving_average_is_returned(run, train_split):
    protocol = replace(SEMI, epochs=1, batch_size=24)
    images = train_split.source.take(np.arange(24))
    start, last, average = (
        trainer.build_network(run, run.backbone, protocol, 10) for _ in range(3)
    )
    last = trainer.train(run, last, images, protocol, 10)
    average = trainer.train(run, average, images, protocol, 10, ema_decay=0.75)
    # The classifier starts at zero, so the first step changes nothing else.
    expected = 0.75 * start.fc.weight + 0.25 * last.fc.weight
    torch.testing.assert_close(average.fc.weight, expected)
    assert not torch.equal(last.fc.weight, average.fc.weight)


def test_the_semi_command_saves_its_rows_and_its_protocol(run_folder, capsys):
    options = (
        "--device cpu --epochs 2 --percent 10 --rows random pretrained --lrs 0.05 0.5 --verbose"
    )
    semi.main([str(run_folder), *options.split()])
    assert "appendix B.5" in capsys.readouterr().out
    result = json.loads((run_folder / "eval/semi.json").read_text())
    rows, protocol = result["rows"], result["protocol"]
    assert [row["features"] for row in rows] == ["trained from random weights", "pretrained"]
    assert protocol["labels, 10 %"] == (
        "20 training images, the same number per class, drawn with seed 0"
    )
    assert (
        "learning rate 0.05, 0.5 at a batch of 256, batch 16 of 20 labeled images, 2 epochs"
        in protocol["training, 10 %"]
    )
    assert "on 2 held-out labeled images (lr 0.05 wd 0 " in rows[1]["notes"]["10 %"]


def test_the_finetune_command_saves_its_protocol(run_folder, capsys):
    options = "--device cpu --protocol deit --epochs 1 --layer-decay 0.75 --ema 0.5 --verbose"
    finetune.main([str(run_folder), *options.split()])
    assert "DeiT (arXiv:2012.12877)" in capsys.readouterr().out
    result = json.loads((run_folder / "eval/finetune_deit.json").read_text())
    training = result["protocol"]["training, all labels"]
    assert "AdamW, learning rate 0.0005 at a batch of 512" in training
    assert "layer decay 0.75, mixup 0.8, cutmix 1.0" in training
    assert training.endswith("randaugment rand-m9-mstd0.5-inc1, moving average 0.5")


def test_the_choice_of_labels_is_balanced_and_seeded(train_split):
    rows = semi.draw_labeled_rows(train_split, 10, 0)
    assert np.bincount(train_split.labels[rows]).tolist() == [2] * 10
    np.testing.assert_array_equal(rows, semi.draw_labeled_rows(train_split, 10, 0))
    assert not np.array_equal(rows, semi.draw_labeled_rows(train_split, 10, 1))
    assert len(semi.draw_labeled_rows(train_split, 0.1, 0)) == 10


@pytest.mark.parametrize(
    ("percent", "message"),
    [
        (
            100,
            "--percent 100: give a number between 0 and 100; eval.finetune trains on all labels",
        ),
        (
            90,
            "--percent 90: takes 18 images per class, but '{}' has {}; give a smaller number",
        ),
    ],
)
def test_a_percentage_that_cannot_be_balanced_is_refused(train_split, percent, message):
    counts = np.bincount(train_split.labels, minlength=10)
    with pytest.raises(ValueError) as error:
        semi.draw_labeled_rows(train_split, percent, 0)
    assert str(error.value) == message.format(train_split.classes[counts.argmin()], counts.min())


def test_a_published_list_selects_its_images(train_split, tmp_path):
    names = [train_split.source.name(7), "some/folder/" + train_split.source.name(3)]
    published_list, other_list = tmp_path / "1percent.txt", tmp_path / "other.txt"
    published_list.write_text("\n".join(names) + "\n")
    assert semi.read_subset(train_split, published_list).tolist() == [3, 7]
    other_list.write_text(f"{names[0]}\nn01440764_10026.JPEG\n")
    with pytest.raises(ValueError) as error:
        semi.read_subset(train_split, other_list)
    assert str(error.value) == (
        f"--subset {other_list}: 1 of its 2 images are not in {train_split.source.full_path}"
        " (n01440764_10026.JPEG); give a list for this data set"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            FinetuningOptions(batch_size=500),
            "--epochs 150, --batch-size 500: give more than 0 epochs, and a batch of 1 to 200"
            " images",
        ),
        (
            FinetuningOptions(batch_size=15),
            "--batch-size 15: 15 images per rank cannot be mixed in pairs; give an even number, or"
            " --mixup 0 --cutmix 0",
        ),
        (
            FinetuningOptions(layer_decay=1.5),
            "--layer-decay 1.5, --ema 0: give a layer decay in (0, 1] and a moving-average"
            " decay in [0, 1)",
        ),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        selection.adapt_protocol(DEIT, options, 200)
    assert str(error.value) == message


def test_a_step_is_seeded_by_its_number_and_rank():
    trainer.seed_generators(5)
    assert torch.initial_seed() == rng.derive_seed(0, 5, 0)
