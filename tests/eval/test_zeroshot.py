"""Zero-shot classification and the retrieval of captions with the towers of a run."""

import json

import pytest
import tiny
import torch

from ssl_pretrain import train
from ssl_pretrain.eval import captions, runs, zeroshot
from ssl_pretrain.eval.frozen import towers
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, open_images

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of CLIP that has learned the classes, whose colors differ, in a few epochs."""
    folder = tmp_path_factory.mktemp("clip")
    path = tiny.write_text_config(folder, "clip")
    learns = ["epochs=30", "optim.name=adamw", "optim.base_lr=0.003", "optim.lr_scaling=none"]
    assert train.main([str(path), *learns, "log.every_steps=50"]) == 0
    return runs.load_run(folder / "run", device="cpu")


def test_classes_are_recognized_by_their_names(run):
    result = zeroshot.evaluate(run)
    rows = {row["features"]: row["metrics"] for row in result["rows"]}
    assert rows["pretrained"]["top-1"] == 100
    assert rows["pretrained"]["standard error"] == 0
    assert rows["random, as built"]["top-1"] < 90
    assert rows["raw pixels"]["top-1"] > 50
    saved = json.loads((run.path / "eval" / "zeroshot.json").read_text())
    assert saved["protocol"]["chance"] == "33.33 % top-1"


def test_an_accuracy_is_that_of_its_own_similarities(run):
    """The towers' vectors are compared by hand, image by image."""
    both = towers.build_towers(run)
    split = EvaluationSplit(run, open_images(run, "val"))
    images, classes = both.embed_images(split), both.embed_classes(split.classes)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(len(images)))
    sentences = [f"a photo of a {name}." for name in split.classes]
    torch.testing.assert_close(classes, both.embed_texts(sentences))
    predictions = [max(range(3), key=lambda c: float(image @ classes[c])) for image in images]
    accuracy = 100 * sum(p == label for p, label in zip(predictions, split.labels)) / len(images)
    metrics = zeroshot.zero_shot_metrics(images @ classes.T, torch.from_numpy(split.labels))
    assert metrics["top-1"] == pytest.approx(accuracy)


def test_equal_similarities_are_wrong():
    metrics = zeroshot.zero_shot_metrics(torch.ones(4, 10), torch.zeros(4, dtype=torch.int64))
    assert metrics == {"top-1": 0, "top-5": 0, "standard error": 0}


def test_the_numbers_are_those_of_a_count_by_hand():
    similarities = torch.tensor(
        [[0.9, 0.1, 0.2], [0.3, 0.2, 0.1], [0.1, 0.5, 0.4], [0.0, 0.2, 0.8]]
    )
    metrics = zeroshot.zero_shot_metrics(similarities, torch.tensor([0, 1, 2, 2]))
    assert metrics == {"top-1": 50, "standard error": 25}


def test_several_templates_are_averaged(run):
    both = towers.build_towers(run)
    run.config.text.templates = ["a {}.", "the {}."]
    try:
        (mean,) = both.embed_classes(["class_1"])
    finally:
        run.config.text.templates = ["a photo of a {}."]
    expected = both.embed_texts(["a class_1.", "the class_1."]).mean(0)
    torch.testing.assert_close(mean, expected / expected.norm())


def test_images_without_captions_are_refused(run):
    with pytest.raises(ValueError) as error:
        captions.evaluate(run)
    assert str(error.value) == (
        f"data.val: {run.config.data.root}/val has no captions; give shards with .txt or .json, or "
        "a table with data.caption_column"
    )


def test_methods_without_texts_are_refused(tmp_path):
    path = tiny.write_config(tmp_path)
    assert train.main([str(path), "--stop-after", "1"]) in (0, 75)
    image_run = runs.load_run(tmp_path / "run", device="cpu")
    for evaluation, purpose in (
        (zeroshot, "zero-shot classification"),
        (captions, "the retrieval of captions"),
    ):
        with pytest.raises(ValueError) as error:
            evaluation.evaluate(image_run)
        assert str(error.value) == (
            f"{tmp_path / 'run'}: {purpose} needs a text tower, and method simclr has none; "
            "evaluate a run of clip or siglip"
        )


def test_embeddings_that_are_not_finite_are_refused(run):
    both = towers.build_towers(run)
    with torch.no_grad():
        both.image_network[1].weight[0] = torch.nan
    split = EvaluationSplit(run, open_images(run, "val"))
    with pytest.raises(ValueError) as error:
        both.embed_images(split)
    assert str(error.value) == (
        "12 of 12 embeddings of the images are not finite; evaluate an earlier checkpoint"
    )


def test_captions_are_found_by_their_images(tmp_path):
    path = tiny.write_text_config(tmp_path, "clip")
    composites = [
        "data.source=ssl_pretrain.data.composites:open_split",
        "data.root=",
        "data.args={train_images: 72, val_images: 40}",
        "text.captions=stored",
    ]
    assert train.main([str(path), *composites]) == 0
    result = captions.evaluate(runs.load_run(tmp_path / "run", device="cpu"))
    (random, pretrained) = result["rows"]
    assert (random["features"], pretrained["features"]) == ("random, as built", "pretrained")
    columns = [f"image to text, recall@{k}" for k in (1, 5, 10)]
    assert all(0 <= pretrained["metrics"][column] <= 100 for column in columns)
    assert pretrained["metrics"][columns[0]] <= pretrained["metrics"][columns[2]]
    assert pretrained["spread"].keys() == pretrained["metrics"].keys()
    assert result["protocol"]["pairs"] == ("40 test images and 200 captions, at most 5 per image")
