"""Image files as people have them: unreadable, with many bits, bombs, and damaged in transit."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import class_folders, finish, run, start, write_config
from PIL import Image

pytestmark = pytest.mark.full  # each test starts several processes; `make test-full` runs them


def records(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]


def damage(files: list[Path]) -> None:
    for file in files:
        os.truncate(file, 60)


class TestReplaced:
    """Unreadable images are replaced and counted, and too many of them stop the run."""

    def test_images_that_vanish_stop_the_run(self, tmp_path):
        root = class_folders(tmp_path / "data", "train", classes=4, per_class=10)
        process = start(
            "-m",
            "ssl_pretrain.train",
            write_config(tmp_path, root),
            "epochs=2000",
            "data.num_workers=1",
        )
        deadline = time.monotonic() + 100
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        for file in sorted(root.rglob("*.png"))[1:]:
            file.unlink()
        finished = finish(process)
        assert finished.status == 2, finished.text
        assert (
            "error: data." in finished.stderr and "No such file or directory; " in finished.stderr
        )
        assert str(root / "train") in finished.stderr and "Traceback" not in finished.stderr

    def test_a_few_are_counted_in_the_records_and_the_report(self, tmp_path):
        root = class_folders(tmp_path / "data", "train", classes=2, per_class=12)
        class_folders(root, "val", classes=2, per_class=4, first=50)
        damage(sorted((root / "train").rglob("*.png"))[5:6])
        finished = run("-m", "ssl_pretrain.train", write_config(tmp_path, root), "epochs=2")
        assert finished.status == 0, finished.text
        assert sum(record["replaced_images"] for record in records(tmp_path)) == 2
        assert finished.text.count("takes its place") == 1
        finished = run("-m", "ssl_pretrain.eval.report", tmp_path / "run")
        assert finished.status == 0, finished.text
        page = (tmp_path / "run" / "report.html").read_text()
        assert "unreadable images replaced" in page and "Replaced images" in page

    @pytest.mark.full
    def test_a_damaged_zip_is_refused_and_a_higher_ceiling_is_obeyed(self, tmp_path):
        folder = class_folders(tmp_path / "files", "train", classes=2, per_class=12)
        files = sorted(folder.rglob("*.png"))
        damage(files[::4])
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
        config = write_config(tmp_path, tmp_path / "data.zip")
        finished = run("-m", "ssl_pretrain.train", config)
        assert finished.status == 2 and "error: data.max_replaced: " in finished.stderr
        assert "more than the 1 that may be replaced (0.01 of the images)" in finished.stderr
        finished = run("-m", "ssl_pretrain.train", config, "data.max_replaced=0.5")
        assert finished.status == 0, finished.text
        assert records(tmp_path)[-1]["replaced_images"] >= 1

    @pytest.mark.full
    def test_ranks_count_together(self, tmp_path):
        """Each of two ranks sees fewer unreadable images than the limit, both together more."""
        root = class_folders(tmp_path / "data", "train", classes=4, per_class=50)
        damage(sorted(root.rglob("*.png"))[10:14])  # 4 of 200, and 2 may be
        torchrun = (
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "ssl_pretrain.train",
        )
        finished = run(
            *torchrun,
            write_config(tmp_path, root),
            "global_batch_size=20",
            "epochs=1",
            "log.every_steps=50",
        )
        assert finished.status != 0
        assert "error: data.max_replaced: " in finished.stderr

    @pytest.mark.full
    def test_evaluations_have_the_ceiling_too(self, tmp_path):
        root = class_folders(tmp_path / "data", "train", classes=2, per_class=8)
        class_folders(root, "val", classes=2, per_class=8, first=50)
        assert run("-m", "ssl_pretrain.train", write_config(tmp_path, root)).status == 0
        damage(sorted((root / "val").rglob("*.png"))[::3])  # the first one too
        finished = run("-m", "ssl_pretrain.eval.knn", tmp_path / "run")
        assert finished.status == 2, finished.text
        assert (
            "data.max_replaced: " in finished.stderr
            and f"of 16 images of {root / 'val'} could not be read" in finished.stderr
        )
        assert not (tmp_path / "run" / "eval" / "knn.json").exists()


def write_deep(root: Path, low: int, high: int, kind: type = np.uint16) -> None:
    rng = np.random.default_rng(0)
    for number in range(16):
        path = root / "train" / f"class_{number % 2}" / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(low, high, (24, 24)).astype(kind)).save(path)


class TestRange:
    """Images that use a part of 16 bits are not reduced to a few dark levels without a word."""

    def test_twelve_bits_are_refused_measured_and_read_by_the_range(self, tmp_path):
        write_deep(tmp_path / "data", 200, 3000)
        config = write_config(tmp_path, tmp_path / "data")
        finished = run("-m", "ssl_pretrain.train", config)
        assert finished.status == 2
        assert "error: data.range: not set, and the 16-bit images of " in finished.stderr
        assert (
            "would leave 11 of 256 gray levels" in finished.stderr
            and "data.range=[2" in finished.stderr
        )
        told = run("-m", "ssl_pretrain.data.inspect", tmp_path / "data")
        assert told.status == 0 and "16 images wider than 8 bits" in told.stdout
        assert (
            "  range: [20" in told.stdout and "11 of 256 gray levels would be left" in told.stdout
        )
        finished = run("-m", "ssl_pretrain.train", config, "data.range=[200,3000]")
        assert finished.status == 0, finished.text

    @pytest.mark.full
    def test_floats_need_a_range_and_inspect_proposes_it(self, tmp_path):
        write_deep(tmp_path / "data", 0, 2, np.float32)
        told = run("-m", "ssl_pretrain.data.inspect", tmp_path / "data")
        assert (
            told.status == 1
            and "pixels of mode F have no agreed conversion to RGB; give data.range=[low, high]"
            in told.stdout
        )
        assert "  range: [0, 1]" in told.stdout
        finished = run(
            "-m",
            "ssl_pretrain.train",
            write_config(tmp_path, tmp_path / "data"),
            "data.range=[0,1]",
        )
        assert finished.status == 0, finished.text

    @pytest.mark.full
    def test_a_beton_is_written_by_the_range_and_not_without(self, tmp_path):
        pytest.importorskip("ffcv")
        write_deep(tmp_path / "data", 0, 1000)
        write = (
            "-m",
            "ssl_pretrain.data.beton",
            "write",
            tmp_path / "data",
            tmp_path / "train.beton",
            "--workers",
            "1",
        )
        finished = run(*write)
        assert finished.status == 2 and "error: data.range: not set" in finished.stderr
        assert not (tmp_path / "train.beton").exists()
        assert run(*write, "--range", "0", "1000").status == 0
        told = run("-m", "ssl_pretrain.data.inspect", tmp_path / "train.beton")
        assert "mean    0.5" in told.stdout or "mean    0.49" in told.stdout, told.stdout


class TestTrust:
    """Files with false headers are refused, and memory is not allocated as their headers say."""

    def test_bombs_and_other_programs_are_named(self, tmp_path):
        root = class_folders(tmp_path / "data", "train")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        for suffix in ("jpg", "png"):
            Image.new("L", (16000, 16000)).save(root / "train" / "class_0" / f"bomb.{suffix}")
        Image.MAX_IMAGE_PIXELS = limit
        eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        (root / "train" / "class_1" / "eps.jpg").write_text(eps)
        told = run("-m", "ssl_pretrain.data.inspect", root)
        assert told.status == 1
        assert (
            told.stdout.count(
                "16,000 x 16,000 pixels are more than the 178,956,970 that are decoded"
            )
            == 2
        )
        assert "eps.jpg: no known image format" in told.stdout

    def test_members_of_an_archive_are_what_it_says(self, tmp_path):
        content = io.BytesIO()
        Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        ).save(content, "BMP")
        path = tmp_path / "data.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(8):
                archive.writestr(f"train/class_{number % 2}/{number}.bmp", content.getvalue())
            archive.writestr("train/class_0/flipped.bmp", content.getvalue())
            archive.writestr("train/class_0/honest.bmp", bytes(1 << 29))
            archive.writestr("train/class_0/grows.bmp", bytes(1 << 26))
        data = bytearray(path.read_bytes())
        entries = [found.start() for found in re.finditer(rb"PK\x01\x02", data)][-3:]
        data[entries[0] + 16] ^= 1  # its checksum
        data[entries[2] + 24 : entries[2] + 28] = (1000).to_bytes(4, "little")  # its size
        path.write_bytes(data)
        told = run("-m", "ssl_pretrain.data.inspect", path)
        assert told.status == 1 and "  bad     3\n" in told.stdout
        assert "flipped.bmp: its checksum in the zip differs; the zip is damaged" in told.stdout
        assert "to 536,870,912 bytes, more than an image does" in told.stdout
        assert "grows.bmp: the zip says that it has 1,000 bytes, and it has more" in told.stdout

    @pytest.mark.full
    def test_a_beton_with_a_length_that_wraps_is_refused_by_every_command(self, tmp_path):
        pytest.importorskip("ffcv")
        root = class_folders(tmp_path / "data", "train")
        path = tmp_path / "train.beton"
        assert (
            run("-m", "ssl_pretrain.data.beton", "write", root, path, "--workers", "1").status == 0
        )
        content = bytearray(path.read_bytes())
        content[-8:] = (2**64 - 8).to_bytes(
            8, "little"
        )  # the length in the last entry of the table
        path.write_bytes(content)
        finished = run("-m", "ssl_pretrain.train", write_config(tmp_path, path))
        assert (
            finished.status == 2
            and "error: data.root: " in finished.stderr
            and "do not belong together" in finished.stderr
        )
        path.with_name("train.beton.json").unlink()
        for command in ("check", "info"):
            finished = run("-m", "ssl_pretrain.data.beton", command, path)
            assert (
                finished.status == 2 and "points outside the file; it is damaged" in finished.stderr
            ), finished.text


KILLED = """
import os, sys
real = os.replace
def replace(old, new):
    if str(new).endswith(".beton"):
        os.kill(os.getpid(), 9)
    real(old, new)
os.replace = replace
from ssl_pretrain.data.beton import __main__ as beton
beton.main(sys.argv[1:])
"""


def test_a_beton_written_anew_and_killed_between_its_renames_is_finished(tmp_path):
    pytest.importorskip("ffcv")
    root, path = class_folders(tmp_path / "data", "train"), tmp_path / "train.beton"
    write = ("write", root, path, "--workers", "1", "--max-side")
    assert run("-m", "ssl_pretrain.data.beton", *write, "8").status == 0
    assert run("-c", KILLED, *write, "12").status == -signal.SIGKILL
    assert run("-m", "ssl_pretrain.data.beton", *write, "12").status == 0
    assert "max 12 pixels" in run("-m", "ssl_pretrain.data.beton", "info", path).stdout


def test_memory_of_evaluations_does_not_follow_the_aspect_ratio_of_a_file(tmp_path):
    root = class_folders(tmp_path / "data", "train")
    Image.new("RGB", (60_000, 1)).save(root / "train" / "class_0" / "thin.png")
    online = ("online.knn_every_epochs=1", "online.k=3", "online.probe=false")
    finished = run(
        "-m",
        "ssl_pretrain.train",
        write_config(tmp_path, root),
        "views.crops.global.size=64",
        *online,
    )
    assert finished.status == 0, finished.text
    assert records(tmp_path)[-1]["memory_gib"] < 2.5
