"""Problem images: unreadable files, more than 8 bits, decompression bombs, damaged archives."""

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
from commands import finish, make_noise_image, run, start, write_class_folders, write_config
from PIL import Image

pytestmark = pytest.mark.full  # each test starts several processes; `make test-full` runs them

TRAIN = ("-m", "ssl_pretrain.train")
INSPECT = ("-m", "ssl_pretrain.planning.inspect")
BETON = ("-m", "ssl_pretrain.data.beton")


def read_records(folder: Path) -> list[dict]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def truncate(files: list[Path]) -> None:
    for file in files:
        os.truncate(file, 60)


class TestReplacement:
    """Unreadable images are replaced and counted, and too many of them stop the run."""

    def test_deleting_the_images_stops_the_run(self, tmp_path):
        root = write_class_folders(tmp_path / "data", "train", num_classes=4, images_per_class=10)
        config = write_config(tmp_path, root)
        process = start(*TRAIN, config, "epochs=2000", "data.num_workers=1")
        deadline = time.monotonic() + 100
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        for file in sorted(root.rglob("*.png"))[1:]:
            file.unlink()
        result = finish(process)
        assert result.status == 2, result.text
        assert "error: data." in result.stderr
        assert "No such file or directory; " in result.stderr
        assert str(root / "train") in result.stderr
        assert "Traceback" not in result.stderr

    def test_the_records_and_the_report_count_replaced_images(self, tmp_path):
        root = write_class_folders(tmp_path / "data", "train", num_classes=2, images_per_class=12)
        write_class_folders(root, "val", num_classes=2, images_per_class=4, first_number=50)
        truncate(sorted((root / "train").rglob("*.png"))[5:6])
        result = run(*TRAIN, write_config(tmp_path, root), "epochs=2")
        assert result.status == 0, result.text
        assert sum(record["replaced_images"] for record in read_records(tmp_path)) == 2
        assert result.text.count("takes its place") == 1
        result = run("-m", "ssl_pretrain.eval.report", tmp_path / "run")
        assert result.status == 0, result.text
        page = (tmp_path / "run" / "report.html").read_text()
        assert "unreadable images replaced" in page
        assert "Replaced images" in page

    def test_a_damaged_zip_is_rejected_unless_the_limit_is_raised(self, tmp_path):
        folder = write_class_folders(
            tmp_path / "files", "train", num_classes=2, images_per_class=12
        )
        files = sorted(folder.rglob("*.png"))
        truncate(files[::4])
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
        config = write_config(tmp_path, tmp_path / "data.zip")
        result = run(*TRAIN, config)
        assert result.status == 2, result.text
        assert "error: data.max_replaced: " in result.stderr
        assert "more than the 1 that may be replaced (0.01 of the images)" in result.stderr
        result = run(*TRAIN, config, "data.max_replaced=0.5")
        assert result.status == 0, result.text
        assert read_records(tmp_path)[-1]["replaced_images"] >= 1

    def test_the_limit_applies_to_the_sum_over_ranks(self, tmp_path):
        """Each of the two ranks is below the limit, and their sum is above it."""
        root = write_class_folders(tmp_path / "data", "train", num_classes=4, images_per_class=50)
        truncate(sorted(root.rglob("*.png"))[10:14])  # 4 of 200 images, where the limit is 2
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        overrides = ("global_batch_size=20", "epochs=1", "log.every_steps=50")
        result = run(*torchrun, *TRAIN, write_config(tmp_path, root), *overrides)
        assert result.status != 0
        assert "error: data.max_replaced: " in result.stderr

    def test_evaluations_enforce_the_limit_too(self, tmp_path):
        root = write_class_folders(tmp_path / "data", "train", num_classes=2, images_per_class=8)
        write_class_folders(root, "val", num_classes=2, images_per_class=8, first_number=50)
        assert run(*TRAIN, write_config(tmp_path, root)).status == 0
        truncate(sorted((root / "val").rglob("*.png"))[::3])  # includes the first image
        result = run("-m", "ssl_pretrain.eval.knn", tmp_path / "run")
        assert result.status == 2, result.text
        assert "data.max_replaced: " in result.stderr
        assert f"of 16 images of {root / 'val'} could not be read" in result.stderr
        assert not (tmp_path / "run" / "eval" / "knn.json").exists()


def write_tiffs(root: Path, low: int, high: int, dtype: type = np.uint16) -> None:
    """Write 16 gray images with pixel values from `low` to `high`, exclusive."""
    rng = np.random.default_rng(0)
    for number in range(16):
        path = root / "train" / f"class_{number % 2}" / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(low, high, (24, 24)).astype(dtype)).save(path)


class TestRange:
    """Images that use few of the possible values need `data.range`, or they would be dark."""

    def test_a_small_16_bit_range_is_an_error_and_inspect_proposes_a_range(self, tmp_path):
        write_tiffs(tmp_path / "data", 200, 3000)
        config = write_config(tmp_path, tmp_path / "data")
        result = run(*TRAIN, config)
        assert result.status == 2, result.text
        assert "error: data.range: not set, and the 16-bit images of " in result.stderr
        assert "would leave 11 of 256 gray levels" in result.stderr
        assert "data.range=[2" in result.stderr
        result = run(*INSPECT, tmp_path / "data")
        assert result.status == 0, result.text
        assert "16 images wider than 8 bits" in result.stdout
        assert "  range: [20" in result.stdout
        assert "would keep only 11 of 256 gray levels" in result.stdout
        result = run(*TRAIN, config, "data.range=[200,3000]")
        assert result.status == 0, result.text

    def test_floats_need_a_range_and_inspect_proposes_it(self, tmp_path):
        write_tiffs(tmp_path / "data", 0, 2, np.float32)
        result = run(*INSPECT, tmp_path / "data")
        assert result.status == 0, result.text
        assert "# measured again with the range suggested below" in result.stdout
        assert "  range: [0.0, 1.0]" in result.stdout
        config = write_config(tmp_path, tmp_path / "data")
        refused = run(*TRAIN, config)
        assert refused.status == 2, refused.text
        assert "are floats from 0 to 1 " in refused.stderr
        result = run(*TRAIN, config, "data.range=[0,1]")
        assert result.status == 0, result.text

    def test_writing_a_beton_needs_the_range(self, tmp_path):
        pytest.importorskip("ffcv")
        root, path = tmp_path / "data", tmp_path / "train.beton"
        write_tiffs(root, 0, 1000)
        command = (*BETON, "write", root, path, "--workers", "1")
        result = run(*command)
        assert result.status == 2, result.text
        assert "error: data.range: not set" in result.stderr
        assert not path.exists()
        assert run(*command, "--range", "0", "1000").status == 0
        result = run(*INSPECT, path)
        assert "mean    0.5" in result.stdout or "mean    0.49" in result.stdout, result.stdout


class TestFalseHeaders:
    """Files with wrong headers are rejected, and the sizes they state allocate no memory."""

    def test_inspect_reports_decompression_bombs_and_postscript(self, tmp_path):
        root = write_class_folders(tmp_path / "data", "train")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        for suffix in ("jpg", "png"):
            Image.new("L", (16000, 16000)).save(root / "train" / "class_0" / f"bomb.{suffix}")
        Image.MAX_IMAGE_PIXELS = limit
        eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        (root / "train" / "class_1" / "eps.jpg").write_text(eps)
        result = run(*INSPECT, root)
        assert result.status == 1, result.text
        message = "16,000 x 16,000 pixels exceed the limit of 178,956,970"
        assert result.stdout.count(message) == 2
        assert "eps.jpg: not a known image format" in result.stdout

    def test_inspect_reports_zip_members_with_a_wrong_checksum_or_size(self, tmp_path):
        content = io.BytesIO()
        make_noise_image(0).save(content, "BMP")
        path = tmp_path / "data.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(8):
                archive.writestr(f"train/class_{number % 2}/{number}.bmp", content.getvalue())
            archive.writestr("train/class_0/flipped.bmp", content.getvalue())
            archive.writestr("train/class_0/large.bmp", bytes(1 << 29))
            archive.writestr("train/class_0/grows.bmp", bytes(1 << 26))
        data = bytearray(path.read_bytes())
        flipped, _, grows = [match.start() for match in re.finditer(rb"PK\x01\x02", data)][-3:]
        data[flipped + 16] ^= 1  # the checksum in the central directory
        data[grows + 24 : grows + 28] = (1000).to_bytes(4, "little")  # the uncompressed size
        path.write_bytes(data)
        result = run(*INSPECT, path)
        assert result.status == 1, result.text
        assert "  bad     3\n" in result.stdout
        assert (
            "flipped.bmp: the checksum of the image differs from the zip's; the zip is damaged"
            in result.stdout
        )
        assert "into 536,870,912 bytes, which no image needs (a zip bomb?)" in result.stdout
        assert (
            "grows.bmp: the image has more than the 1,000 bytes that the zip states"
            in result.stdout
        )

    def test_every_command_rejects_a_beton_whose_length_overflows(self, tmp_path):
        pytest.importorskip("ffcv")
        root = write_class_folders(tmp_path / "data", "train")
        path = tmp_path / "train.beton"
        assert run(*BETON, "write", root, path, "--workers", "1").status == 0
        content = bytearray(path.read_bytes())
        # The last eight bytes are the length in the last entry of the table.
        content[-8:] = (2**64 - 8).to_bytes(8, "little")
        path.write_bytes(content)
        result = run(*TRAIN, write_config(tmp_path, path))
        assert result.status == 2, result.text
        assert "error: data.root: " in result.stderr
        assert "do not belong together" in result.stderr
        path.with_name("train.beton.json").unlink()
        for command in ("check", "info"):
            result = run(*BETON, command, path)
            assert result.status == 2, result.text
            assert "points outside the file; it is damaged" in result.stderr


WRITE_KILLED_AT_THE_RENAME = """
import os, sys
real_replace = os.replace
def replace(old, new):
    if str(new).endswith(".beton"):
        os.kill(os.getpid(), 9)
    real_replace(old, new)
os.replace = replace
from ssl_pretrain.data.beton import __main__ as beton
beton.main(sys.argv[1:])
"""


def test_overwriting_a_beton_can_be_repeated_after_a_kill_between_the_renames(tmp_path):
    pytest.importorskip("ffcv")
    root, path = write_class_folders(tmp_path / "data", "train"), tmp_path / "train.beton"
    arguments = ("write", root, path, "--workers", "1", "--max-side")
    assert run(*BETON, *arguments, "8").status == 0
    assert run("-c", WRITE_KILLED_AT_THE_RENAME, *arguments, "12").status == -signal.SIGKILL
    assert run(*BETON, *arguments, "12").status == 0
    assert "max 12 pixels" in run(*BETON, "info", path).stdout


def test_the_memory_of_evaluations_does_not_grow_with_the_aspect_ratio_of_an_image(tmp_path):
    root = write_class_folders(tmp_path / "data", "train")
    Image.new("RGB", (60_000, 1)).save(root / "train" / "class_0" / "thin.png")
    overrides = ("online.knn_every_epochs=1", "online.k=3", "online.probe=false")
    result = run(*TRAIN, write_config(tmp_path, root), "views.crops.global.size=64", *overrides)
    assert result.status == 0, result.text
    assert read_records(tmp_path)[-1]["memory_gib"] < 2.5
