"""Count the pixels of each class by prediction, and compute the scores of a segmentation."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.dense.masked_images import VOID
from ssl_pretrain.system import optional_packages

MEASURE = "mIoU, %"
ABSENT_RULE = (
    "mean over the classes that occur in the masks or in the predictions; a class absent from both "
    "does not count, as in torchmetrics"
)


def require_packages() -> None:
    """Raise ValueError with the install line if torchmetrics is not installed."""
    optional_packages.require("segmentation", "torchmetrics", "segmentation")


@dataclass(frozen=True)
class Scores:
    """Scores of a segmentation in percent.

    Attributes:
        miou: Mean intersection over union of the classes that occur.
        pixel_accuracy: Share of the pixels with the right class.
        class_iou: Intersection over union by class, without the classes that do not occur.
    """

    miou: float
    pixel_accuracy: float
    class_iou: dict[str, float]

    def columns(self) -> dict[str, float]:
        """Return the numbers as the columns of a result's table."""
        shared = {"mIoU": self.miou, "pixel accuracy": self.pixel_accuracy}
        return shared | {f"IoU {name}": value for name, value in self.class_iou.items()}


class Confusion:
    """Number of pixels per true and predicted class, as integers that are summed over ranks.

    Void pixels do not count. A prediction may be void, for example if the nearest training patch
    is. It is wrong for the true class and belongs to no other.

    Args:
        classes: Names of the classes.
    """

    def __init__(self, classes: Sequence[str]):
        require_packages()
        from torchmetrics.classification import MulticlassJaccardIndex

        self.classes, self._void = tuple(classes), len(classes)
        # Void is one more class for torchmetrics, which leaves out its pixels.
        self._metric = MulticlassJaccardIndex(
            len(classes) + 1,
            average="none",
            ignore_index=self._void,
            validate_args=False,  # labels were checked when the masks were read
            sync_on_compute=False,
        )

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count pixels.

        Args:
            predictions: Predicted classes or VOID, of any shape.
            labels: Classes or VOID, of the same shape.
        """
        values = (tensor.detach().cpu().long().flatten() for tensor in (predictions, labels))
        predicted, true = (value.masked_fill(value == VOID, self._void) for value in values)
        self._metric.update(predicted, true)

    def counts(self) -> Tensor:
        """Return the pixels of this rank, int64 (true classes + 1, predicted classes + 1)."""
        counts: Tensor = self._metric.confmat
        return counts

    def scores(self) -> Scores:
        """Return the scores of the pixels of all ranks, the same on every rank.

        Raises:
            ValueError: If no pixel has a class.
        """
        return self._scores(collectives.reduce_sum(self.counts(), process_group.cpu_group()))

    def rank_scores(self) -> Scores:
        """Return the scores of this rank's pixels.

        Raises:
            ValueError: If no pixel has a class.
        """
        return self._scores(self.counts())

    def _scores(self, total: Tensor) -> Scores:
        if not total.sum():
            raise ValueError("segmentation: all pixels of the masks are void; give other masks")
        metric = self._metric.clone()  # more pixels may be counted later
        metric.reset()
        metric.confmat = total
        with warnings.catch_warnings():  # a rank without images has not called update
            warnings.simplefilter("ignore", UserWarning)
            ious = metric.compute()
        is_present = (total.sum(0) + total.sum(1) > 0)[: self._void]
        present = ious[: self._void][is_present]
        names = [name for name, shown in zip(self.classes, is_present.tolist()) if shown]
        num_correct = int(total.diagonal()[: self._void].sum())
        return Scores(
            100 * present.double().mean().item(),
            100 * num_correct / int(total.sum()),
            {name: 100 * iou for name, iou in zip(names, present.double().tolist())},
        )
