"""The scores of a segmentation: torchmetrics' mIoU, the same by hand, void and ranks."""

import importlib.util

import pytest
import torch
from conftest import run_ranks

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval.dense.confusion import Confusion
from ssl_pretrain.eval.dense.masked_images import VOID

CLASSES = ["sky", "road", "tree", "car"]


def random_maps(seed=0, num_classes=4, shape=(3, 20, 30)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, shape, generator=generator, dtype=torch.uint8)
    predictions = torch.randint(num_classes, shape, generator=generator, dtype=torch.uint8)
    labels[torch.rand(shape, generator=generator) < 0.1] = VOID
    return predictions, labels


def score(predictions, labels, classes=CLASSES):
    confusion = Confusion(classes)
    confusion.update(predictions, labels)
    return confusion.scores()


def test_scores_of_a_map_equal_those_computed_by_hand():
    """Sky: 2 of 4 pixels overlap. Road: 2 of 5. Tree: 0 of 1. The car does not occur."""
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, VOID, 1]])
    predictions = torch.tensor([[0, 0, 1, 1], [0, 1, 3, 2]])
    scores = score(predictions, labels)
    assert scores.class_iou == pytest.approx({"sky": 50.0, "road": 40.0, "tree": 0.0})
    assert scores.miou == pytest.approx(30.0)
    assert scores.pixel_accuracy == pytest.approx(100 * 4 / 7)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_miou_equals_that_of_torchmetrics_on_random_maps(num_classes):
    from torchmetrics.functional.classification import multiclass_jaccard_index

    predictions, labels = random_maps(num_classes=num_classes)
    theirs, per_class = (
        multiclass_jaccard_index(
            predictions.long(), labels.long(), 4, average=average, ignore_index=VOID
        )
        for average in ("macro", "none")
    )
    scores = score(predictions, labels)
    assert scores.miou == pytest.approx(100 * theirs.item(), rel=1e-6)
    expected = (100 * per_class[:num_classes]).tolist()
    assert list(scores.class_iou.values()) == pytest.approx(expected, rel=1e-6)


def test_void_pixels_do_not_count():
    predictions, labels = random_maps()
    changed = torch.where(labels == VOID, (predictions + 1) % 4, predictions)
    assert (changed != predictions).any()
    assert score(changed, labels) == score(predictions, labels)


def test_a_prediction_of_void_is_wrong_for_the_true_class_only():
    labels = torch.tensor([0, 0, 1, 1])
    scores = score(torch.tensor([0, VOID, 1, 1]), labels)
    assert scores.class_iou == {"sky": 50.0, "road": 100.0}
    assert scores.miou == 75.0
    assert scores.pixel_accuracy == 75.0


def test_masks_without_a_class_are_refused():
    with pytest.raises(ValueError) as error:
        score(torch.zeros(4), torch.full((4,), VOID))
    assert str(error.value) == "segmentation: all pixels of the masks are void; give other masks"


def test_a_missing_torchmetrics_is_a_message_with_the_install_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "ssl_pretrain.system.optional_packages.find_spec",
        lambda name: None if name == "torchmetrics" else find(name),
    )
    with pytest.raises(ValueError) as error:
        Confusion(CLASSES)
    assert str(error.value).startswith(
        "segmentation: torchmetrics is not installed; install it with `pip install "
        "'.[segmentation]'` in a clone, or with "
    )


def _score_images_of_this_rank(predictions, labels):
    confusion = Confusion(CLASSES)
    for image in range(process_group.rank(), len(labels), process_group.world_size()):
        confusion.update(predictions[image], labels[image])
    return confusion.scores()


def test_three_ranks_one_of_them_without_images_have_the_scores_of_one_process():
    predictions, labels = random_maps(shape=(2, 20, 30))
    by_rank = run_ranks(_score_images_of_this_rank, predictions, labels, world_size=3)
    assert by_rank == [score(predictions, labels)] * 3


def test_pixels_may_be_counted_after_scores_were_read():
    predictions, labels = random_maps()
    confusion = Confusion(CLASSES)
    confusion.update(predictions[:2], labels[:2])
    confusion.rank_scores()
    confusion.update(predictions[2:], labels[2:])
    assert confusion.rank_scores() == score(predictions, labels)
