"""Layouts of data sets: which images are for training and for validation, and their labels.

Most commands run in this process, because starting one takes seconds and there are many layouts.
Two tests start a real run.
"""

import io
import os
import re
import runpy
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest

Inspect = Callable[..., "Result"]


@dataclass(frozen=True)
class Result:
    """Exit status and output of a command, with ROOT in place of the data set's path.

    Lines that describe the data set are YAML comments. Their mark is left out.
    """

    status: int
    text: str

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys) -> Inspect:
    """Return a function that runs `python -m ssl_pretrain.planning.inspect ROOT ...`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run_inspect(root: Path, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["inspect", str(root), *arguments])
        with pytest.raises(SystemExit) as exit_info, pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "ssl_pretrain.planning.inspect", raising=False)
            runpy.run_module("ssl_pretrain.planning.inspect", run_name="__main__")
        out, err = capsys.readouterr()
        text = re.sub("^# ", "", out, flags=re.MULTILINE) + err.removeprefix("error: ")
        return Result(int(exit_info.value.code or 0), text.replace(str(root), "ROOT"))

    return run_inspect


def write_tree(folder: Path, names: str) -> Path:
    return commands.write_images(folder / "data", names.split())


def write_zip(folder: Path, members: list[str]) -> Path:
    """Write a zip with exactly these member names, as other systems write them."""
    image = io.BytesIO()
    commands.make_noise_image(0).save(image, "PNG")
    with zipfile.ZipFile(folder / "data.zip", "w") as file:
        for name in members:
            member = zipfile.ZipInfo()
            member.filename = name
            file.writestr(member, image.getvalue())
    return folder / "data.zip"


SPLITS = {
    "other case, flat": (
        "Train/1.png Train/2.png Val/3.png",
        "data: training ROOT/Train: 2 images, no labels; validation ROOT/Val: 1 image, no labels",
    ),
    "longer names, sorted": (
        "training/a/1.png training/b/2.png validation/b/3.png",
        (
            "data: training ROOT/training: 2 images, 2 classes (a, b); validation "
            "ROOT/validation: 1 image, 1 of 2 classes (b)"
        ),
    ),
    "test images only": (
        "TRAIN/a/1.png TRAIN/b/2.png TEST/3.png",
        (
            "data: training ROOT/TRAIN: 2 images, 2 classes (a, b); validation ROOT/TEST: 1 "
            "image, no labels"
        ),
    ),
    "held out beside class folders": (
        "a/1.png b/2.png test/3.png dev/a/4.png",
        (
            "data: training ROOT: 2 images, 2 classes (a, b); validation ROOT/dev: 1 image, 1 "
            "of 2 classes (a)"
        ),
    ),
    "below folders that wrap them": (
        (
            "ILSVRC/Data/CLS-LOC/train/n1/1.png ILSVRC/Data/CLS-LOC/train/n2/2.png "
            "ILSVRC/Data/CLS-LOC/val/n1/3.png"
        ),
        "data: training ROOT/ILSVRC/Data/CLS-LOC/train: 2 images, 2 classes (n1, n2);"
        " validation ROOT/ILSVRC/Data/CLS-LOC/val: 1 image, 1 of 2 classes (n1)",
    ),
    "below a folder that is named like a split": (
        "training_data/train/a/1.png training_data/train/b/2.png training_data/val/a/3.png",
        (
            "data: training ROOT/training_data/train: 2 images, 2 classes (a, b); validation "
            "ROOT/training_data/val: 1 image, 1 of 2 classes (a)"
        ),
    ),
    "a folder between": (
        "train/a/1.png train/b/2.png val/more/a/3.png val/more/b/4.png",
        (
            "data: training ROOT/train: 2 images, 2 classes (a, b); validation ROOT/val: 2 "
            "images, 2 classes (a, b)"
        ),
    ),
    "a class is missing in val": (
        "train/a/1.png train/b/2.png train/c/3.png val/c/4.png val/b/5.png",
        (
            "data: training ROOT/train: 3 images, 3 classes (a, b, c); validation ROOT/val: 2 "
            "images, 2 of 3 classes (b, c)"
        ),
    ),
    "classes only in val": (
        "train/1.png train/2.png val/a/3.png val/b/4.png",
        (
            "data: training ROOT/train: 2 images, no labels; validation ROOT/val: 2 images, 2 "
            "classes (a, b)"
        ),
    ),
    "deeper class folders": (
        "train/n1/images/1.png train/n2/images/2.png train/n2/3.png val/n1/images/4.png",
        (
            "data: training ROOT/train: 3 images, 2 classes (n1, n2); validation ROOT/val: 1 "
            "image, 1 of 2 classes (n1)"
        ),
    ),
}


@pytest.mark.parametrize("layout", SPLITS)
def test_first_line_says_which_folder_is_which_split(layout, tmp_path, inspect):
    names, expected = SPLITS[layout]
    result = inspect(write_tree(tmp_path, names))
    assert (result.first_line, result.status) == (expected, 0)


TAKE_ALL = "or give data.train=. if all images there are for training\n"
UNCLEAR_LAYOUTS = {
    "years": (
        "train2017/1.png val2017/2.png",
        (
            "ROOT contains train2017/, val2017/, whose names look like splits; say which is "
            "which, as in data.train=train2017 data.val=val2017"
        ),
    ),
    "words": (
        "cat/1.png dog/2.png test_images/3.png",
        (
            "ROOT contains test_images/, whose names look like splits; say which is which, as in "
            "data.val=test_images"
        ),
    ),
    "splits inside classes": (
        "bottle/train/1.png bottle/test/2.png cable/train/3.png cable/test/4.png",
        "ROOT has splits inside its folders (bottle/train/, bottle/test/); name them, or a "
        "list of the training images,"
        " as in data.train=bottle/train data.val=bottle/test",
    ),
    "splits inside the second of two folders": (
        "samples/1.png ILSVRC/Data/CLS-LOC/train/n1/2.png ILSVRC/Data/CLS-LOC/val/n1/3.png",
        "ROOT has splits inside its folders (ILSVRC/Data/CLS-LOC/train/, "
        "ILSVRC/Data/CLS-LOC/val/); name them, or a list of the training"
        " images, as in data.train=ILSVRC/Data/CLS-LOC/train data.val=ILSVRC/Data/CLS-LOC/val",
    ),
    "splits inside the training split": (
        "train/train/a/1.png train/train/b/2.png train/test/a/3.png",
        "ROOT/train has splits inside its folders (train/, test/); name them, or a list of "
        "the training images,"
        " as in data.train=train/train data.val=train/test",
    ),
    "names of another language": (
        (
            "entrenamiento/a/1.png entrenamiento/b/2.png entrenamiento/c/3.png prueba/a/4.png "
            "prueba/c/5.png"
        ),
        "ROOT contains entrenamiento/, prueba/ with the same folders in each (a/, c/), so "
        "they may be splits; say which is which,"
        " as in data.train=entrenamiento data.val=prueba",
    ),
    "images named like splits": (
        "train_1.png train_2.png test_1.png",
        "ROOT contains images whose names look like splits (test_1.png, train_1.png); list "
        "those of each split,"
        " as in data.train=LIST data.val=LIST",
    ),
    "no training images": (
        "val/a/1.png test/b/2.png",
        (
            "ROOT contains test/, val/ and no training images; say where they are, as in "
            "data.train=FOLDER"
        ),
    ),
    "a class called train": (
        "bus/1.png car/2.png train/3.png",
        (
            "ROOT contains train/ next to bus/, car/, so it may be the training split or one "
            "class of several; say which, as in data.train=train"
        ),
    ),
    "two training splits": (
        "train/1.png Training/2.png val/3.png",
        (
            "ROOT contains Training and train; say which has the training images, as in "
            "data.train=Training"
        ),
    ),
}


@pytest.mark.parametrize("layout", UNCLEAR_LAYOUTS)
def test_layouts_with_unclear_splits_are_refused(layout, tmp_path, inspect):
    names, expected = UNCLEAR_LAYOUTS[layout]
    assert inspect(write_tree(tmp_path, names)) == Result(2, f"data.train: {expected}, {TAKE_ALL}")


def test_the_train_and_val_keys_name_the_splits(tmp_path, inspect):
    root = write_tree(tmp_path, "train2017/1.png val2017/2.png val2017/3.png extra/4.png")
    result = inspect(root, "--train", "train2017", "--val", str(root / "val2017"))
    assert result.first_line == (
        "data: training ROOT/train2017: 1 image, no labels; validation ROOT/val2017: 2 "
        "images, no labels"
    )
    assert inspect(root, "--train", ".").first_line.startswith(
        "data: training ROOT: 4 images, 3 classes (extra, train2017, val2017); validation none ("
    )
    without_val = inspect(root, "--train", ".", "--val", "val2017")
    assert without_val.first_line == (
        "data: training ROOT: 2 images, 2 classes (extra, train2017); validation "
        "ROOT/val2017: 2 images, no labels"
    )
    assert inspect(root, "--train", "trian") == Result(
        2,
        (
            "data.train: ROOT has no folder or list 'trian'; it has extra/, train2017/, "
            "val2017/; name the one that contains the training images\n"
        ),
    )


LISTS_OF_SPLITS = {
    "Food-101": (
        "meta",
        {"train.txt": "apple/1\npie/3\n", "test.txt": "apple/2\n"},
        "meta/train.txt data.val=meta/test.txt",
    ),
    "VOC": (
        "ImageSets/Main",
        {"train.txt": "1\n3\n", "val.txt": "2\n", "test.txt": "2\n"},
        "ImageSets/Main/train.txt data.val=ImageSets/Main/val.txt",
    ),
    "CUB-200": (
        ".",
        {"images.txt": "1 apple/1.png\n", "train_test_split.txt": "1 1\n2 0\n"},
        "LIST data.val=LIST",
    ),
}


@pytest.mark.parametrize("layout", LISTS_OF_SPLITS)
def test_lists_that_look_like_splits_are_refused(layout, tmp_path, inspect):
    folder, lists, proposal = LISTS_OF_SPLITS[layout]
    root = write_tree(tmp_path, "images/apple/1.png images/apple/2.png images/pie/3.png")
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in lists.items():
        (root / folder / name).write_text(content)
    location = "ROOT" if folder == "." else f"ROOT/{folder}"
    text = (
        f"{location} contains lists whose names look like splits; say which images are for "
        f"training, as in data.train={proposal}"
    )
    assert inspect(root) == Result(2, f"data.train: {text}, {TAKE_ALL}")
    zip_result = inspect(Path(shutil.make_archive(str(tmp_path / "packed"), "zip", root)))
    assert zip_result == Result(
        2,
        (
            f"data.train: {location} contains lists whose names look like splits, which are not "
            f"read inside a zip; unpack it, {TAKE_ALL}"
        ),
    )
    if folder != ".":
        train, val = proposal.split(" data.val=")
        result = inspect(root, "--train", train, "--val", val)
        assert result.first_line == (
            f"data: training ROOT/{train}: 2 images, no labels; validation ROOT/{val}: 1 "
            "image, no labels"
        )


def test_logs_of_a_training_run_are_not_read_as_lists(tmp_path, inspect):
    root = write_tree(tmp_path, "a/1.png b/2.png")
    for name in ("training_log.txt", "test_results.csv"):
        (root / name).write_text("step,loss\n1,2\n")
    assert inspect(root).first_line.startswith(
        "data: training ROOT: 2 images, 2 classes (a, b); validation none ("
    )


def test_images_in_both_splits_are_counted(tmp_path, inspect):
    root = write_tree(tmp_path, "train/a/1.png train/b/2.png")
    (root / "val").symlink_to("train")
    (root / "l.csv").write_text("train/a/1.png,a\n")
    expected = "data: {} validation images are also training images (first: ROOT/train/a/1.png)\n"
    assert expected.format("2 of 2") in inspect(root).text
    assert expected.format("2 of 2") in inspect(root, "--train", "train", "--val", ".").text
    assert expected.format("1 of 1") in inspect(root, "--train", "train", "--val", "l.csv").text
    shutil.move(root / "train", root / "data" / "train")
    (root / "val").unlink()
    (root / "l.csv").unlink()
    commands.write_images(root, ["data/val/a/3.png"], first_number=3)
    result = inspect(root, "--train", "data")
    assert (
        "data: ROOT/data has splits inside its folders (train/, val/), and all of them are "
        "for training\n"
    ) in result.text
    assert (
        "data: 1 of 1 validation images are also training images (first: ROOT/data/val/a/3.png)\n"
        in result.text
    )


def test_names_that_are_not_text_are_escaped(tmp_path, inspect):
    root = write_tree(tmp_path, "train/a/1.png train/b/2.png")
    (root / "train" / "a").rename(root / "train" / os.fsdecode(b"caf\xe9"))
    (root / "train" / "x\x1b[31m\n.txt").write_text("no image")
    text = inspect(root).text
    assert "2 images, 2 classes (b, caf\\udce9)" in text and "        1  caf\\udce9\n" in text
    assert "1 .txt files (first: x\\x1b[31m\\n.txt)\n" in text


def test_one_class_of_many_may_be_called_like_a_split(tmp_path, inspect):
    classes = " ".join(f"{name}/1.png" for name in "abcdefghi")
    result = inspect(write_tree(tmp_path / "1", f"{classes} train/1.png"))
    assert result.first_line.startswith(
        "data: training ROOT: 10 images, 10 classes (a, b, c, ...); validation none ("
    )
    assert (
        "data: ROOT/train is read as one of 10 classes; give data.train=train if it is the "
        "training split\n"
    ) in result.text
    result = inspect(write_tree(tmp_path / "2", f"{classes} bullet_train/1.png"))
    assert "data: bullet_train/ is read as one of 10 classes\n" in result.text


def test_two_validation_splits_are_refused(tmp_path, inspect):
    result = inspect(write_tree(tmp_path, "train/a/1.png train/b/2.png val/a/3.png valid/b/4.png"))
    expected = (
        "none (data.val: ROOT contains val and valid; choose the one with the validation images, "
        "as in data.val=val)"
    )
    assert result.first_line.endswith(f"validation {expected}")


def test_composed_and_decomposed_accents_are_the_same_class(tmp_path, inspect):
    result = inspect(
        write_tree(tmp_path, "train/caf\u00e9/1.png train/the/2.png val/cafe\u0301/3.png")
    )
    assert result.first_line.endswith("validation ROOT/val: 1 image, 1 of 2 classes (caf\u00e9)")


def test_only_an_image_beside_the_class_folders_has_no_label(tmp_path, inspect):
    result = inspect(
        write_tree(
            tmp_path,
            "train/a/1.png train/b/2.png train/logo.png val/a/3.png val/b/4.png val/sheet.png",
        )
    )
    lines = result.text.splitlines()
    assert lines[:3] == [
        "data: training ROOT/train: 3 images, 2 classes (a, b), 1 without a label;"
        " validation ROOT/val: 3 images, 2 classes (a, b), 1 without a label",
        "data: 1 of 3 images in ROOT/train have no label (first: logo.png)",
        "data: 1 of 3 images in ROOT/val have no label (first: sheet.png)",
    ]


SYSTEM_FILES = (
    ".hidden/1.png __MACOSX/a/2.png @eaDir/3.png lost+found/4.png $RECYCLE.BIN/5.png "
    ".ipynb_checkpoints/6.png"
    " train/.ipynb_checkpoints/7.png train/a/._1.png train/a/@eaDir/8.png val/a/Thumbs.db.png"
)


def test_folders_and_archives_skip_the_same_system_files(tmp_path, inspect):
    names = f"{SYSTEM_FILES} train/a/1.png train/b/2.png val/a/3.png"
    root = write_tree(tmp_path, names)
    expected = (
        "data: training ROOT/train: 2 images, 2 classes (a, b); validation ROOT/val: 2 images, "
        "1 of 2 classes (a)"
    )
    assert inspect(root).first_line == expected
    assert (
        inspect(Path(shutil.make_archive(str(tmp_path / "packed"), "zip", root))).first_line
        == expected
    )


ARCHIVES = {
    "Windows": [r"train\a\1.png", r"train\b\2.png", r"val\a\3.png", r"val\a\Thumbs.db"],
    "macOS": [
        "d/train/a/1.png",
        "d/train/b/2.png",
        "d/val/a/3.png",
        "__MACOSX/d/train/a/._1.png",
        "d/.DS_Store",
    ],
    "leading dots": ["./train/a/1.png", "./train/b/2.png", "./val/a/3.png"],
    "members outside": [
        "train/a/1.png",
        "train/b/2.png",
        "val/a/3.png",
        "/train/c/4.png",
        "../train/c/5.png",
        "C:/train/c/6.png",
        "train/../x.png",
    ],
}


@pytest.mark.parametrize("archive", ARCHIVES)
def test_archives_of_other_systems_are_read(archive, tmp_path, inspect):
    result = inspect(write_zip(tmp_path, ARCHIVES[archive]))
    root_text = "ROOT/d" if archive == "macOS" else "ROOT"
    assert result.first_line == (
        f"data: training {root_text}/train: 2 images, 2 classes (a, b); validation "
        f"{root_text}/val: 1 image, 1 of 2 classes (a)"
    )
    if archive == "members outside":
        assert (
            "left out in ROOT: 2 members outside the archive (first: ../train/c/5.png), 2 "
            "members with absolute paths (first: /train"
        ) in result.text


def test_links_lists_and_duplicates_in_an_archive_are_reported(tmp_path, inspect):
    path = write_zip(tmp_path, ["a/1.png", "b/2.png", "b/link.png"])
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 41] = 0xA0  # high byte of the mode of a link
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("a/1.png", b"another")
    assert inspect(path).text.splitlines()[1] == (
        "data: left out in ROOT: 1 earlier members of the same name (first: a/1.png), 1 "
        "links, pipes or devices (first: b/link.png)"
    )
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train.csv", "a/1.png,a\n")
    text = "ROOT contains lists of its splits, which are not read inside a zip; unpack it"
    assert inspect(path) == Result(2, f"data.train: {text}, {TAKE_ALL}")


def change_entry(path: Path, fields: dict[int, bytes]) -> Path:
    """Overwrite bytes in the last entry of a zip's directory, by their offset in the entry."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    for offset, value in fields.items():
        content[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(content)
    return path


def test_a_damaged_archive_is_refused(tmp_path, inspect):
    members = ["train/a/1.png", "train/b/2.png", "val/3.png"]
    result = inspect(change_entry(write_zip(tmp_path, members), {6: b"\xff"}))
    assert result == Result(2, "data.root: ROOT cannot be read as a zip: zip file version 25.5\n")
    # The extra field takes the place of the slashes that pad the name.
    impossible_sizes = struct.pack("<HHQQQ", 1, 24, 2**64 - 1, 2**64 - 1, 2**64 - 8)
    path = write_zip(tmp_path, [*members, "val/4.png" + "/" * len(impossible_sizes)])
    fields = {
        20: b"\xff" * 8,
        28: struct.pack("<HH", 9, len(impossible_sizes)),
        42: b"\xff" * 4,
        46 + 9: impossible_sizes,
    }
    assert inspect(change_entry(path, fields)) == Result(
        2, "data.root: ROOT is damaged, because val/4.png has an impossible size; copy it again\n"
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({8: b"\1"}, "is encrypted, password required"),
        ({16: b"\0\0\0\0"}, "Bad CRC-32"),
        (
            {24: struct.pack("<I", 1 << 30)},
            "1,073,741,824 bytes are too many for a table of labels",
        ),
    ],
)
def test_a_damaged_table_in_an_archive_gives_no_labels(fields, reason, tmp_path, inspect):
    path = write_zip(tmp_path, ["train/a/1.png", "train/b/2.png", "val/3.png"])
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("val/val_annotations.txt", "3.png\ta\n")
    result = inspect(change_entry(path, fields))
    assert "; validation ROOT/val: 1 image, no labels\n" in result.text
    assert (
        "data: ROOT/val/val_annotations.txt has no usable labels: " in result.text
        and reason in result.text
    )


def test_skipped_files_are_counted_and_named(tmp_path, inspect):
    root = write_tree(tmp_path, "train/a/1.png train/b/2.png")
    folder = root / "train" / "a"
    image = (folder / "1.png").read_bytes()
    for name in ("2.jfif", "3.unknown", "without"):  # recognized by their content
        (folder / name).write_bytes(image)
    (folder / "4.jpg.part").write_bytes(image)
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "up").symlink_to("../..")
    (root / "train" / "c").symlink_to("b")
    result = inspect(root)
    assert result.status == 0
    assert result.first_line.startswith(
        "data: training ROOT/train: 5 images, 2 classes (a, b); validation none ("
    )
    assert result.text.splitlines()[1] == (
        "data: left out in ROOT/train: 2 broken links (first: a/gone.png), "
        "2 links to folders that are listed already (first: a/up),"
        " 1 .part files (first: a/4.jpg.part), 1 .txt files (first: a/notes.txt), 1 pipes, "
        "sockets or devices (first: a/pipe.png)"
    )


def write_ground_truth(root: Path) -> None:
    (root / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    (root / "map_clsloc.txt").write_text("n2 1 cat\nn1 2 dog\n")


TABLES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "Tiny ImageNet": (
        "val/images/val_0.png val/images/val_1.png",
        lambda root: (root / "val" / "val_annotations.txt").write_text(
            "val_0.png\tn1\t0\t0\t9\t9\nval_1.png\tn2\t0\t0\t9\t9\n"
        ),
    ),
    "LOC_val_solution": (
        "val/ILSVRC2012_val_1.png val/ILSVRC2012_val_2.png",
        lambda root: (root / "LOC_val_solution.csv").write_text(
            "ImageId,PredictionString\nILSVRC2012_val_2,n2 85 1 49 27 n2 1 2 3 4 "
            "\nILSVRC2012_val_1,n1 5 1 9 2 \n"
        ),
    ),
    "val.csv": (
        "val/x.png val/y.png",
        lambda root: (root / "val.csv").write_text("name;class\ny.png;n2\nx.png;n1\n"),
    ),
    "ILSVRC2012's ground truth": (
        "val/ILSVRC2012_val_00000001.png val/ILSVRC2012_val_00000002.png",
        write_ground_truth,
    ),
}


@pytest.mark.parametrize("table", TABLES)
def test_unsorted_validation_images_get_labels_from_a_table(table, tmp_path, inspect):
    names, write_table = TABLES[table]
    root = write_tree(
        tmp_path, f"train/n1/images/1.png train/n2/images/2.png train/n3/images/3.png {names}"
    )
    write_table(root)
    result = inspect(root)
    assert "; validation ROOT/val: 2 images, 2 of 3 classes (n1, n2)" in result.first_line
    assert "data: the labels of ROOT/val come from ROOT/" in result.text


def test_class_numbers_in_an_unknown_order_give_no_labels(tmp_path, inspect):
    root = write_tree(
        tmp_path,
        (
            "train/n1/1.png train/n2/2.png val/ILSVRC2012_val_00000001.png "
            "val/ILSVRC2012_val_00000002.png"
        ),
    )
    (root / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    (root / "synsets.txt").write_text("n1\nn2\n")
    expected = (
        "data: ROOT/ILSVRC2012_validation_ground_truth.txt has no usable labels: it numbers the "
        "classes, but synsets.txt lists them in "
        "alphabetical order, not in the order of ILSVRC2012's numbers\n"
    )
    assert expected in inspect(root).text
    (root / "synsets.txt").write_text("n2\nn1\n")
    assert "; validation ROOT/val: 2 images, 2 classes (n1, n2)" in inspect(root).first_line
    (root / "meta.mat").write_bytes(b"not a file of MATLAB")
    assert "has no usable labels: meta.mat cannot be read: " in inspect(root).text


def test_a_table_that_does_not_fit_gives_no_labels(tmp_path, inspect):
    root = write_tree(tmp_path, "train/n1/1.png train/n2/2.png val/x.png val/y.png")
    (root / "val.txt").write_text("x.png 0\ny.png 1\n")  # class numbers in an unknown order
    (root / "val_submission.csv").write_text("id,label\nx,n1\ny,n1\n")
    result = inspect(root)
    assert "; validation ROOT/val: 2 images, no labels" in result.first_line
    assert (
        "data: ROOT/val.txt has no usable labels: '0' is not a class of the training split, which "
        "has n1, n2"
    ) in result.text


TWO_CLASSES = "2 images, 2 classes (a, b)"
LISTS: dict[str, tuple[str, bytes, str]] = {
    "from a spreadsheet": (
        "l.csv",
        '\ufeffpath;label\r\n"images/1.png";"b; c"\r\nimages/2.png;a\r\n'.encode(),
        "2 images, 2 classes (a, b; c)",
    ),
    "UTF-16 from a spreadsheet": (
        "l.txt",
        "path\tlabel\r\nimages\\1.png\tä\r\nimages\\2.png\tb\r\n".encode("utf-16"),
        "2 images, 2 classes (b, ä)",
    ),
    "from a data frame, with a missing label": (
        "l.csv",
        b",Image Name,Target\n0,images/1.png,10.0\n1,images/2.png,2.0\n2,images/3.png,\n",
        "3 images, 2 classes (2, 10), 1 without a label",
    ),
    "paths of another machine": (
        "l.tsv",
        b"C:\\d\\images\\1.png\ta\nC:\\d\\images\\2.png\tb\n",
        TWO_CLASSES,
    ),
    "names without folders and suffixes": ("l.csv", b"id,breed\n1,a\n2,b\n", TWO_CLASSES),
    "separated by a space": ("l.txt", b"images/1.png a\nimages/2.png b\n", TWO_CLASSES),
    "comments": (
        "l.txt",
        b"# made by a program\n# for 2 images\nimages/1.png a\nimages/2.png b\n",
        TWO_CLASSES,
    ),
    "numbered rows": ("l.csv", b"1,images/1.png,a\n2,images/2.png,b\n", TWO_CLASSES),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_many_programs_are_read(kind, tmp_path, inspect):
    name, content, expected = LISTS[kind]
    root = write_tree(tmp_path, "images/1.png images/2.png images/3.png")
    (root / name).write_bytes(content)
    assert inspect(root / name).first_line.startswith(
        f"data: training ROOT: {expected}; validation none ("
    )


def test_rows_of_the_same_image_are_counted(tmp_path, inspect):
    root = write_tree(tmp_path, "1.png 2.png")
    (root / "l.csv").write_text("path,label\n1.png,a\n1.png,b\n2.png,a\n")
    assert (
        "data: 1 of 3 rows of ROOT repeat the image of an earlier row; "
        "that image is used once per row\n"
    ) in inspect(root / "l.csv").text


def test_a_list_may_name_missing_images(tmp_path, inspect):
    root = write_tree(tmp_path, "1.png")
    (root / "l.csv").write_text("1.png,a\ngone.png,b\n")
    result = inspect(root / "l.csv")
    assert result.first_line.startswith("data: training ROOT: 2 images, 2 classes (a, b);")
    assert (result.status, f"{root}/gone.png: No such file or directory" in result.text) == (
        1,
        True,
    )


def test_a_plan_refuses_what_the_run_would_refuse(tmp_path):
    config = commands.write_config(
        tmp_path / "run", write_tree(tmp_path, "train2017/1.png val2017/2.png")
    )
    plan = commands.run("-m", "ssl_pretrain.train", config, "--plan")
    assert (plan.status, plan.stderr.partition(" contains ")[0]) == (
        2,
        f"error: data.train: {tmp_path}/data",
    )


def test_a_list_may_name_the_split_of_each_image(tmp_path, inspect):
    root = write_tree(tmp_path, "images/1.png images/2.png images/3.png")
    (root / "all.csv").write_text(
        "path,label,split\nimages/1.png,a,train\nimages/2.png,b,train\nimages/3.png,a,valid\n"
    )
    result = inspect(root / "all.csv")
    assert result.first_line == (
        "data: training ROOT: 2 images, 2 classes (a, b); validation ROOT: 1 image, 1 of 2 "
        "classes (a)"
    )


def test_lists_in_the_root_folder_are_the_splits(tmp_path, inspect):
    root = write_tree(tmp_path, "images/1.png images/2.png images/3.png")
    (root / "train.csv").write_text("image,label\n1,a\n2,b\n")
    (root / "test.csv").write_text("image\n3\n")
    result = inspect(root)
    assert result.first_line == (
        "data: training ROOT/train.csv: 2 images, 2 classes (a, b); validation "
        "ROOT/test.csv: 1 image, no labels"
    )


def test_a_list_without_a_label_column_is_reported(tmp_path, inspect):
    root = write_tree(tmp_path, "1.png 2.png")
    (root / "l.csv").write_text("path,width,height\n1.png,20,20\n2.png,20,21\n")
    result = inspect(root / "l.csv")
    assert result.first_line.startswith("data: training ROOT: 2 images, no labels;")
    assert (
        "data: none of the columns 'path', 'width', 'height' is called label, so the "
        "images have no labels\n"
    ) in result.text


def test_a_table_of_an_unsupported_kind_is_refused(tmp_path, inspect):
    (tmp_path / "train.xlsx").write_bytes(b"PAR1")
    assert inspect(tmp_path / "train.xlsx") == Result(
        2,
        (
            "data.root: ROOT is a table of an unsupported kind; save it as .csv, with the "
            "columns path and label\n"
        ),
    )


@pytest.mark.full
def test_pipes_and_unlabeled_images_stop_neither_training_nor_knn(tmp_path):
    """A pipe and unlabeled images in both splits stop neither the run nor its evaluation."""
    root = write_tree(
        tmp_path,
        " ".join(f"Train/{c}/{n}.png" for c in "ab" for n in range(6))
        + " Train/logo.png Val/a/1.png Val/b/2.png Val/x.png",
    )
    os.mkfifo(root / "Train" / "a" / "pipe.png")
    config = commands.write_config(tmp_path / "run", root)
    training = commands.run("-m", "ssl_pretrain.train", config)
    assert training.status == 0, training.text
    line = (
        f"data: training {root}/Train: 13 images, 2 classes (a, b), 1 without a label;"
        f" validation {root}/Val: 3 images, 2 classes (a, b), 1 without a label"
    )
    assert training.stderr.splitlines()[0] == line
    assert "1 pipes, sockets or devices (first: a/pipe.png)" in training.stderr
    evaluation = commands.run(
        "-m", "ssl_pretrain.eval.knn", tmp_path / "run" / "run", "--device", "cpu"
    )
    assert evaluation.status == 0, evaluation.text
    assert evaluation.stderr.splitlines()[0] == line
    assert "12 training, 2 test images, 2 classes" in evaluation.text
