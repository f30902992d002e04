"""Images with masks: each layout is read right, and each mistake has its message."""

import multiprocessing
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from masked_folders import (
    CLASSES,
    HEIGHT,
    WIDTH,
    draw,
    save,
    write_ade20k,
    write_folders,
    write_voc,
)
from PIL import Image

from ssl_pretrain.eval import file_tree
from ssl_pretrain.eval.dense import composed_masks, mask_layouts
from ssl_pretrain.eval.dense.mask_sources import MaskSources
from ssl_pretrain.eval.dense.masked_images import LabelRule, decode_mask
from ssl_pretrain.eval.file_tree import FileTree


def error_message(function, *arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    return str(error.value)


def png_of_bits(values: np.ndarray, bits: int) -> bytes:
    """Return a gray PNG of 2 or 4 bits per pixel, with the values as they are."""
    digits = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :]
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in digits)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def test_vocs_palette_masks_are_read_as_class_numbers(tmp_path):
    root = write_voc(tmp_path)
    train, val = (mask_layouts.open_voc(root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    assert train.name == "VOCdevkit, train"
    assert len(train.classes) == 21
    assert train.classes[15] == "person"
    for images, index, number in ((train, 0, 0), (train, 1, 1), (val, 0, 2)):
        pixels, labels = images.read(index)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        np.testing.assert_array_equal(labels, draw(number)[1])


def test_a_zip_of_vocs_layout_is_the_same_as_its_folder_and_can_be_pickled_while_open(tmp_path):
    root = write_voc(tmp_path)
    archive = shutil.make_archive(str(tmp_path / "voc"), "zip", root)
    images = mask_layouts.open_voc(archive, "train")
    labels = images.read(1)[1]
    again = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(again.read(1)[1], labels)
    np.testing.assert_array_equal(labels, draw(1)[1])


def test_ade20ks_value_zero_is_void_and_its_first_class_has_the_value_one(tmp_path):
    root = write_ade20k(tmp_path)
    train = mask_layouts.open_ade20k(root, "training")
    assert train.classes == ("wall", "screen", "screen 2")
    np.testing.assert_array_equal(train.read(1)[1], draw(1)[1])
    (root / "objectInfo150.txt").unlink()
    assert len(mask_layouts.open_ade20k(root.parent, "validation").classes) == 150


def test_folders_with_train_and_val_are_split_by_them(tmp_path):
    root = write_folders(tmp_path, 3, 2)
    train, val = mask_layouts.open_folders(root / "images", root / "masks", CLASSES)
    assert [image for image, _ in val.pairs] == ["val/3.png", "val/4.png"]
    np.testing.assert_array_equal(val.read(0)[0], draw(3)[0])
    np.testing.assert_array_equal(val.read(0)[1], draw(3)[1])
    assert train.classes == tuple(CLASSES)


def test_other_folders_hold_out_a_fixed_fifth_and_name_classes_by_number(tmp_path):
    root = write_folders(tmp_path, 10, 0)
    folders = root / "images/train", root / "masks/train"
    train, val = mask_layouts.open_folders(*folders)
    assert (len(train), len(val)) == (8, 2)
    assert not set(train.pairs) & set(val.pairs)
    assert mask_layouts.open_folders(*folders)[1].pairs == val.pairs
    assert train.classes == ("0", "1", "2")


def test_a_class_list_is_a_file_or_names(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("sky\n\n road \n")
    assert mask_layouts.read_classes([str(path)]) == ("sky", "road")
    assert mask_layouts.read_classes(["sky", "road"]) == ("sky", "road")
    assert error_message(mask_layouts.read_classes, [f"{path}s"]) == (
        f"--classes {path}s: cannot be read as a list of classes (FileNotFoundError); give a text "
        "file with one name per line, or two or more names"
    )
    assert error_message(LabelRule, ("sky",)) == (
        "--classes: 1 names; give 2 to 255 classes, with the background among them if it is one"
    )
    assert error_message(LabelRule, ("sky", "sky")) == (
        "--classes: sky is named more than once; give each class a name of its own"
    )


def test_mistakes_in_a_layout_are_reported(tmp_path):
    root = write_voc(tmp_path)
    assert error_message(mask_layouts.open_voc, root, "test") == (
        f"{root}: ImageSets/Segmentation/ has no split 'test'; choose one of: train, val"
    )
    mask = root / "VOC2012/SegmentationClass/2007_1.png"
    mask.unlink()
    assert error_message(mask_layouts.open_voc, root, "train") == (
        "VOC2012/SegmentationClass: has no mask for 1 of the 2 images, such as "
        "VOC2012/JPEGImages/2007_1.jpg; add the masks or remove the images"
    )
    (root / "VOC2012/JPEGImages/2007_0.jpg").unlink()
    assert error_message(mask_layouts.open_voc, root, "train") == (
        f"{root}: VOC2012/JPEGImages has no image 2007_0, which train.txt lists; add it or remove "
        "its line"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert error_message(mask_layouts.open_voc, empty, "train") == (
        f"{empty}: has no ImageSets/Segmentation; give one folder or zip in Pascal VOC's layout, "
        "with ImageSets/Segmentation, JPEGImages and SegmentationClass"
    )
    assert error_message(mask_layouts.open_ade20k, empty, "training") == (
        f"{empty}: has no annotations/training; give one folder or zip in ADE20K's layout, "
        "ADEChallengeData2016 with images/ and annotations/, each with training/ and validation/"
    )
    assert error_message(FileTree, tmp_path / "none") == (
        f"{tmp_path / 'none'}: neither a folder nor a zip; give one that has the images"
    )
    folders = write_folders(tmp_path, 2, 1)
    assert error_message(mask_layouts.open_folders, folders / "images", empty) == (
        f"{empty}: has no masks; segmentation needs one mask per image, and boxes are not masks"
    )
    assert error_message(mask_layouts.open_folders, empty, folders / "masks") == (
        "empty: has no image; give images with masks"
    )


def test_mistakes_in_a_mask_are_reported(tmp_path):
    root = write_folders(tmp_path, 2, 1)
    train, _ = mask_layouts.open_folders(root / "images", root / "masks", ["sky", "road"])
    assert error_message(train.read, 0) == (
        "train/0.png: the mask has the value 2, but the 2 classes are 0 to 1, and void is 255; add "
        "the class to --classes, or the value to --void"
    )
    save(root / "masks/train/0.png", np.zeros((HEIGHT, 10), np.uint8))
    assert error_message(train.read, 0) == (
        f"train/0.png: the mask has 10 x {HEIGHT} pixels, but its image train/0.png has {WIDTH} x "
        f"{HEIGHT}; give both in one size"
    )
    save(root / "masks/train/0.png", draw(0)[0])
    assert error_message(train.read, 0) == (
        "train/0.png: the mask is in Pillow's mode RGB, with colors instead of class numbers; give "
        "masks with one number per pixel, such as PNG in mode L or P"
    )
    jpeg = save(tmp_path / "mask.jpg", np.zeros((4, 4), np.uint8)).read_bytes()
    assert error_message(decode_mask, jpeg, "mask.jpg") == (
        "mask.jpg: the mask is a JPEG, whose compression changes class numbers; give masks as PNG"
    )
    assert error_message(decode_mask, b"no image", "mask.png") == (
        "mask.png: the mask cannot be read (cannot identify image file); replace the file"
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I"])
def test_masks_of_every_mode_with_one_number_per_pixel_are_read(tmp_path, mode):
    values = np.array([[0, 1], [1, 0]])
    kinds = {"I;16": np.uint16, "I": np.int32, "1": bool}
    image = Image.fromarray(values.astype(kinds.get(mode, np.uint8)))
    if mode == "P":
        image = image.convert("L")
        image.putpalette([9, 9, 9] * 256)
    path = tmp_path / ("mask.tif" if mode == "I" else "mask.png")
    image.save(path)
    np.testing.assert_array_equal(decode_mask(path.read_bytes(), "mask"), values)


def test_the_mask_of_a_composed_image_is_exactly_the_pasted_pixels():
    background = np.full((32, 32, 3), 7, dtype=np.uint8)
    objects = np.full((3, 8, 8), 200, dtype=np.uint8), np.array([1, 2, 3], dtype=np.uint8)
    pixels, mask = composed_masks.compose(background, objects, composed_masks._Numbers(0, 0, 0))
    is_pasted = (pixels != background).any(axis=2)
    np.testing.assert_array_equal(is_pasted, mask > 0)
    assert set(np.unique(mask)) <= {0, 1, 2, 3}


def test_cells_are_the_dark_pixels_in_boxes_and_void_where_no_or_two_classes_are_annotated():
    pixels = np.full((6, 8, 3), 220, dtype=np.uint8)
    pixels[1:5, 1:7] = 60
    boxes = np.array([[0, 0, 4, 6], [3, 0, 6, 6]])
    mask = composed_masks.cell_mask(pixels, boxes, np.array([1, 2]))
    np.testing.assert_array_equal(mask[2], [0, 1, 1, 255, 2, 2, 255, 0])
    assert not mask[0].any()


def test_composed_data_are_written_read_and_the_same_for_a_seed(tmp_path, capsys):
    photos = write_folders(tmp_path / "photos", 4, 0) / "images/train"
    for name in ("a", "b"):
        settings = ["--objects", "digits", "--count", "3", "2", "--size", "24"]
        composed_masks.main([str(tmp_path / name), "--photos", str(photos), *settings])
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{tmp_path / 'a'}: wrote 3 training and 2 test images with masks"
    )
    opened = []
    for name in ("a", "b"):
        root = tmp_path / name
        classes = mask_layouts.read_classes([str(root / "classes.txt")])
        opened.append(mask_layouts.open_folders(root / "images", root / "masks", classes)[1])
    for row in range(2):
        for first, second in zip(opened[0].read(row), opened[1].read(row)):
            np.testing.assert_array_equal(first, second)
    assert opened[0].classes[:2] == ("background", "0")
    message = error_message(composed_masks.main, [str(tmp_path / "a"), "--photos", str(photos)])
    assert message == f"{tmp_path / 'a'}: exists already; give a new folder"


def test_a_forked_process_does_not_move_the_parents_position_in_a_zip(tmp_path):
    archive = shutil.make_archive(str(tmp_path / "voc"), "zip", write_voc(tmp_path))
    images = mask_layouts.open_voc(archive, "train")
    images.read(0)
    descriptor = file_tree._open_zip(Path(archive), os.getpid()).fp.fileno()
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    reader = multiprocessing.get_context("fork").Process(target=images.read, args=(1,))
    reader.start()
    reader.join()
    assert reader.exitcode == 0
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == position


def test_gray_masks_of_few_bits_keep_their_numbers(tmp_path):
    values = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    for bits in (2, 4):
        content = png_of_bits(values, bits)
        np.testing.assert_array_equal(decode_mask(content, "m.png"), values)


def test_system_files_are_left_out_and_links_to_folders_are_followed(tmp_path):
    root = write_folders(tmp_path / "data", 3, 2)
    (root / "images/._0.png").write_bytes(b"\0\5\x16\7")
    (root / "masks/__MACOSX").mkdir()
    (root / "masks/__MACOSX/._0.png").write_bytes(b"\0\5\x16\7")
    (root / "images/train").rename(tmp_path / "elsewhere")
    (root / "images/train").symlink_to(tmp_path / "elsewhere")
    train, test = mask_layouts.open_folders(root / "images", root / "masks")
    assert (len(train), len(test)) == (3, 2)


def test_images_and_masks_that_cannot_be_paired_or_counted_are_named(tmp_path):
    root = write_folders(tmp_path, 3, 2)
    images, masks = root / "images", root / "masks"
    save(images / "train/0.jpg", draw(0)[0])
    assert error_message(mask_layouts.open_folders, images, masks) == (
        f"{images}: train/0.jpg and train/0.png differ only in their suffix, so images and their "
        "annotations cannot be paired; remove or rename one"
    )
    (images / "train/0.jpg").unlink()
    for path in masks.rglob("*.png"):
        save(path, np.where(draw(0)[1] == 1, 255, 0).astype(np.uint8))
    assert error_message(mask_layouts.open_folders, images, masks) == (
        f"{masks}: beside the void values 255 the masks have only the class 0; store classes as "
        "consecutive numbers, such as 0 and 1, or give --void other values"
    )
    assert error_message(mask_layouts.open_folders, images, masks, void=()) == (
        f"{masks}: beside the void values (none) the masks have values up to 255; store classes as "
        "consecutive numbers, such as 0 and 1, or give --void other values"
    )


def test_lists_of_classes_without_names_or_in_another_encoding_are_refused(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffsky\nroad\n".encode())
    assert mask_layouts.read_classes([str(path)]) == ("sky", "road")
    path.write_text("\n")
    assert error_message(mask_layouts.read_classes, [str(path)]) == (
        f"--classes {path}: has no names; write one per line"
    )
    root = write_voc(tmp_path) / "VOC2012"
    (root / "ImageSets/Segmentation/train.txt").write_bytes("ä".encode("latin-1"))
    assert error_message(mask_layouts.open_voc, root, "train") == (
        f"{root}: ImageSets/Segmentation/train.txt is not UTF-8 text; save it as UTF-8"
    )


def test_options_of_another_layout_are_refused(tmp_path):
    for options, message in (
        ({"voc": "x", "void": [7]}, "--void: --voc does not take it, only --masks does; "),
        ({"ade20k": "x", "voc_masks": "y"}, "--voc-masks: --ade20k does not take it, only --voc"),
    ):
        assert error_message(MaskSources(**options).open, None).startswith(message)
