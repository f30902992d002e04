"""Locations of the images and masks of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain.data.config import pixel_format
from ssl_pretrain.eval.dense import mask_layouts
from ssl_pretrain.eval.dense.masked_images import VOID, MaskedImages
from ssl_pretrain.eval.runs import Run

# Layouts of the options that only one layout takes
_OWNERS = {"voc_splits": "--voc", "voc_masks": "--voc", "void": "--masks", "first_label": "--masks"}


@dataclass(frozen=True)
class MaskSources:
    """One data set with masks: in VOC's layout, in ADE20K's, or two folders.

    Attributes:
        voc: Root in Pascal VOC's layout.
        voc_splits: Lists for training and testing.
        voc_masks: Folder of the masks in VOC's layout.
        ade20k: Root in ADE20K's layout.
        images: Folder or zip of images.
        masks: Folder or zip of their masks.
        classes: Class names, or a file with one name per line.
        void: Pixel values of no class, for `masks`.
        first_label: Pixel value of the first class, for `masks`.
        subset: Number of training images to train and test on, as a check that training works.
    """

    voc: str | Path | None = None
    voc_splits: Sequence[str] = ("train", "val")
    voc_masks: str = "SegmentationClass"
    ade20k: str | Path | None = None
    images: str | Path | None = None
    masks: str | Path | None = None
    classes: Sequence[str] = ()
    void: Sequence[int] = (VOID,)
    first_label: int = 0
    subset: int = 0

    def open(self, run: Run) -> tuple[MaskedImages, MaskedImages]:
        """Return the training and the test images, in the channels that the network takes.

        Raises:
            ValueError: Unless exactly one data set is given, if it does not take an option, or if
                it cannot be opened.
        """
        if self.images and not self.masks:
            raise ValueError(
                f"--images {self.images}: has no masks; give their folder with --masks"
            )
        sources = [self.voc, self.ade20k, self.masks]
        if len([source for source in sources if source]) != 1 or (self.masks and not self.images):
            raise ValueError(
                "segmentation: needs one data set with masks; give --voc ROOT, --ade20k ROOT, or "
                "--images FOLDER with --masks FOLDER"
            )
        self._check_options()
        classes = mask_layouts.read_classes(self.classes)
        if self.voc:
            train, test = (
                mask_layouts.open_voc(self.voc, split, classes, self.voc_masks)
                for split in self.voc_splits
            )
        elif self.ade20k:
            train, test = (
                mask_layouts.open_ade20k(self.ade20k, split, classes)
                for split in ("training", "validation")
            )
        else:
            assert self.images and self.masks, "checked above"
            train, test = mask_layouts.open_folders(
                self.images, self.masks, classes, self.void, self.first_label
            )
        if self.subset:
            train = test = train.subset(range(min(self.subset, len(train))))
        pixels = pixel_format(run.config.data)
        return train.read_as(pixels), test.read_as(pixels)

    def _check_options(self) -> None:
        """Refuse options that the layout does not take."""
        layout = "--voc" if self.voc else "--ade20k" if self.ade20k else "--masks"
        for option, owner in _OWNERS.items():
            value, default = getattr(self, option), getattr(MaskSources, option)
            is_given = (tuple(value) if isinstance(value, list) else value) != default
            if is_given and owner != layout:
                raise ValueError(
                    f"--{option.replace('_', '-')}: {layout} does not take it, only {owner} does; "
                    "leave it out"
                )
