"""Written .beton files: their content, reading by FFCV, resuming after a kill, and messages."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from betons import encode_jpeg, needs_ffcv, open_train, write_beton, write_images
from conftest import _context
from PIL import Image

from ssl_pretrain.data import messages
from ssl_pretrain.data.beton import __main__ as command
from ssl_pretrain.data.beton import beton_file, beton_writer, encoder, tables
from ssl_pretrain.data.beton.beton_manifest import manifest_path
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.beton.check import find_problems
from ssl_pretrain.data.beton.encoder import (
    NEW_JPEG,
    PIXELS,
    UNCHANGED,
    EncodingSettings,
    encode_image,
)
from ssl_pretrain.data.images import UnreadableImage, decode
from ssl_pretrain.data.native.views import allocate_buffers
from ssl_pretrain.data.sources import DataConfig, open_source

pytestmark = pytest.mark.timeout(200)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def error_message(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


@contextmanager
def edit_bytes(beton):
    """Yield the path and the bytes of a .beton, and write the changed bytes back.

    The manifest is removed, as it would reveal the change.
    """
    path = Path(beton.full_path)
    manifest_path(path).unlink()
    content = bytearray(path.read_bytes())
    yield path, content
    path.write_bytes(content)


class TestRealData:
    @pytest.mark.full
    def test_cifar10_is_read_back(self, shared_data, tmp_path):
        config = DataConfig(
            source="cifar10",
            root=str(shared_data("cifar10.zip")),
            cache_dir=str(tmp_path / "lists"),
        )
        for split, count in (("train", 50_000), ("val", 10_000)):
            source = open_source(config, split)
            path = tmp_path / f"{split}.beton"
            manifest = beton_writer.write(source, path, EncodingSettings(), num_workers=1)
            assert (manifest.num_samples, manifest.num_unchanged, manifest.unreadable_images) == (
                count,
                count,
                [],
            )
            beton = Beton(beton_file.read(path))
            assert beton.classes == source.classes and beton.fingerprint == source.fingerprint
            np.testing.assert_array_equal(beton.labels, source.labels)
            assert all(
                beton.read_bytes(index) == source.read_bytes(index) for index in range(0, count, 7)
            )
            if split == "val":
                assert find_problems(beton.samples) == []

    def test_the_imagenet_sample_is_read_back(self, shared_data, tmp_path):
        source = open_train(shared_data("imagenet_sample.zip"))
        path = tmp_path / "train.beton"
        manifest = beton_writer.write(source, path, EncodingSettings(max_side=0), num_workers=2)
        beton = open_train(path)
        assert (manifest.num_samples, manifest.unreadable_images, beton.classes) == (
            600,
            [],
            source.classes,
        )
        assert manifest.num_unchanged + manifest.num_encoded == 600 and manifest.num_encoded < 10
        assert int(beton.samples.width.max()) == 2400
        np.testing.assert_array_equal(beton.labels, source.labels)
        for index in range(600):
            assert (
                beton.read_bytes(index) == source.read_bytes(index)
                or np.abs(beton.read(index).astype(int) - source.read(index)).mean() < 3
            )
        assert find_problems(beton.samples, num_threads=2) == []

    @pytest.mark.full
    def test_larger_images_are_resized_once_and_counted(self, shared_data, tmp_path):
        source = open_train(shared_data("imagenet_sample.zip"))
        manifest = beton_writer.write(
            source, tmp_path / "train.beton", EncodingSettings(max_side=256), num_workers=2
        )
        samples = beton_file.read(tmp_path / "train.beton")
        assert int(np.maximum(samples.width, samples.height).max()) == 256
        num_small = sum(max(source.read(index).shape) <= 256 for index in range(0, 600, 20))
        assert (
            0 <= num_small <= 30
            and manifest.num_unchanged + manifest.num_encoded == 600
            and manifest.num_unchanged < 60
        )


def test_each_kind_of_image_is_stored_as_documented(tmp_path):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    gray = Image.open(io.BytesIO(encode_jpeg(1, 60, 40))).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    small_jpeg, large_jpeg = encode_jpeg(2, 60, 40), encode_jpeg(3, 90, 40)
    jpeg_contents = {
        "a_plain.jpg": small_jpeg,
        "b_large.jpg": large_jpeg,
        "c_turned.jpg": encode_jpeg(4, 60, 40, exif=exif.tobytes()),
        "d_progressive.jpg": encode_jpeg(5, 60, 40, progressive=True),
        "e_trailing.jpg": small_jpeg + b"after the end",
    }
    for name, content in jpeg_contents.items():
        (folder / name).write_bytes(content)
    gray.save(folder / "f_gray.jpg")
    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)).save(
        folder / "g_small.png"
    )
    Image.fromarray(np.zeros((70, 80, 3), np.uint8)).save(folder / "h_large.png")
    Image.new("CMYK", (60, 40)).save(folder / "i_cmyk.jpg")
    source = open_train(tmp_path / "data", loader="folder")
    manifest = beton_writer.write(
        source, tmp_path / "train.beton", EncodingSettings(max_side=80), num_workers=1
    )
    beton = open_train(tmp_path / "train.beton")
    outcomes = [
        encode_image(source, index, EncodingSettings(max_side=80))[0].outcome for index in range(9)
    ]
    assert outcomes == [
        UNCHANGED,
        NEW_JPEG,
        NEW_JPEG,
        UNCHANGED,
        UNCHANGED,
        UNCHANGED,
        PIXELS,
        NEW_JPEG,
        NEW_JPEG,
    ]
    assert (manifest.num_unchanged, manifest.num_encoded, manifest.num_raw) == (4, 4, 1)
    assert [beton.read_bytes(index) == source.read_bytes(index) for index in range(6)] == [
        True,
        False,
        False,
        True,
        True,
        True,
    ]
    sizes = [
        (60, 40),
        (80, 36),
        (40, 60),
        (60, 40),
        (60, 40),
        (60, 40),
        (50, 40),
        (80, 70),
        (60, 40),
    ]
    assert list(zip(beton.samples.width.tolist(), beton.samples.height.tolist())) == sizes
    np.testing.assert_array_equal(beton.read(6), source.read(6))  # raw pixels lose nothing
    assert np.abs(beton.read(2).astype(int) - source.read(2)).mean() < 2
    assert find_problems(beton.samples) == []


@needs_ffcv
def test_ffcv_reads_our_files_and_we_read_its_files(tmp_path):
    beton = write_beton(tmp_path / "data", n=20)
    code = """
import sys, numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
if __name__ == "__main__":
    images = [(np.full((20, 30, 3), 10 * number, np.uint8), number % 3) for number in range(12)]
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=95), "label": IntField()}
    DatasetWriter(sys.argv[2], fields, num_workers=1).from_indexed_dataset(images)
from ffcv.reader import Reader
from ffcv.loader import Loader, OrderOption
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
reader = Reader(sys.argv[1])
assert reader.num_samples == len(reader.alloc_table) == 20
assert reader.field_names == ["image", "label"]
loader = Loader(sys.argv[1], batch_size=10, num_workers=1, order=OrderOption.SEQUENTIAL,
                pipelines={"image": [CenterCropRGBImageDecoder((16, 16), 1.0)],
                           "label": [IntDecoder()]})
print([label for _, labels in loader for label in labels[:, 0].tolist()])
"""
    ffcv_file = tmp_path / "ffcv_file.beton"
    result = subprocess.run(
        [sys.executable, "-c", code, beton.full_path, str(ffcv_file)],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout) == beton.labels.tolist()
    source = open_train(ffcv_file)
    assert source.labels.tolist() == [number % 3 for number in range(12)] and source.classes == [
        "0",
        "1",
        "2",
    ]
    assert np.abs(source.read(7).astype(int) - 70).max() <= 1 and source.read(7).shape == (
        20,
        30,
        3,
    )
    problems = [
        f"{ffcv_file}: has no manifest (ffcv_file.beton.json), so there are no class names and no "
        "checksum to compare with"
    ]
    assert find_problems(beton_file.read(ffcv_file)) == problems


def test_unreadable_images_are_named_and_left_out(tmp_path, capsys):
    root = write_images(tmp_path / "data", n=12)
    damaged = sorted((root / "train").rglob("*.jpg"))[4]
    damaged.write_bytes(damaged.read_bytes()[:200])
    assert command.main(["write", str(root), str(tmp_path / "train.beton"), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert (
        "11 images: 11 stored unchanged, 0 encoded at quality 95" in out
        and f"  unreadable, left out: {damaged}: " in out
    )
    beton = open_train(tmp_path / "train.beton")
    assert len(beton) == 11 and beton.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert beton.fingerprint != open_train(root, loader="folder").fingerprint
    assert command.main(["check", str(tmp_path / "train.beton")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'train.beton'}: 11 images, 0 problems\n"


def test_info_describes_the_file(tmp_path, capsys):
    beton = write_beton(tmp_path / "data", n=12)
    assert command.main(["info", beton.full_path]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{beton.full_path}: 12 images in 1 file(s), ")
    assert "classes: 3, images without a label: 0\n12 images: 12 stored unchanged" in out


def test_check_names_damaged_images(tmp_path, capsys):
    beton = write_beton(tmp_path / "data", n=12)
    with open(beton.full_path, "r+b") as file:
        file.seek(int(beton.samples.offset[3]))
        file.write(b"GIF")
        # After this change image 7 still decodes without a warning.
        file.seek(int(beton.samples.offset[7] + beton.samples.length[7]) - 40)
        original_byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([original_byte[0] ^ 1]))
    assert command.main(["check", beton.full_path]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{beton.full_path}, image 3: not a JPEG"
    assert lines[-2] == (
        f"{beton.full_path}: the images have changed since the file was written (their CRC-32 "
        "differs from the manifest's)"
    )


def _write_slowly(root: Path, path: Path) -> None:
    """Write 300 images in at least three seconds, so that a kill interrupts the work."""
    encode_job, encoder._IMAGES_PER_JOB = encoder._encode_job, 3
    encoder._encode_job = lambda indices: (time.sleep(0.03), encode_job(indices))[1]
    beton_writer.write(
        open_train(root, loader="folder"), path, EncodingSettings(max_side=64), num_workers=1
    )


class TestWriting:
    def test_ten_kills_do_not_change_the_file(self, tmp_path):
        root = write_images(tmp_path / "data", n=300)
        reference, path = (
            tmp_path / "reference" / "train.beton",
            tmp_path / "killed" / "train.beton",
        )
        beton_writer.write(
            open_train(root, loader="folder"),
            reference,
            EncodingSettings(max_side=64),
            num_workers=1,
        )
        journal, sizes = path.with_name("train.beton.journal"), []
        for delay in np.random.default_rng(0).uniform(0, 0.2, 10):
            process = _context.Process(target=_write_slowly, args=(root, path))
            process.start()
            deadline = time.monotonic() + 60
            while (
                sizes
                and not (journal.exists() and journal.stat().st_size > sizes[-1])
                and time.monotonic() < deadline
            ):
                time.sleep(0.005)  # all but the first kill come after another image was written
            time.sleep(delay)
            process.kill()
            process.join()
            assert not path.exists()
            sizes.append(journal.stat().st_size if journal.exists() else 0)
        # Each write continued where the previous one ended.
        assert sizes == sorted(sizes) and sizes[-1] > sizes[0]
        beton_writer.write(
            open_train(root, loader="folder"), path, EncodingSettings(max_side=64), num_workers=1
        )
        assert sha256(path) == sha256(reference) and sha256(manifest_path(path)) == sha256(
            manifest_path(reference)
        )
        assert sorted(file.name for file in path.parent.iterdir()) == [
            "train.beton",
            "train.beton.json",
        ]

    @pytest.mark.parametrize(
        "damage",
        ["half an entry", "data lost", "data changed", "other settings", "before the rename"],
    )
    def test_images_lost_in_a_power_cut_are_written_again(self, damage, tmp_path, monkeypatch):
        source = open_train(write_images(tmp_path / "data", n=40), loader="folder")
        reference, path = tmp_path / "reference" / "train.beton", tmp_path / "train.beton"
        beton_writer.write(source, reference, EncodingSettings(), num_workers=1)
        with monkeypatch.context() as patch:
            stop = OSError("the disk is full")

            def interrupt(*_arguments):
                raise stop

            patch.setattr(
                beton_writer.os if damage == "before the rename" else beton_writer,
                "replace" if damage == "before the rename" else "_write_tables",
                interrupt,
            )
            with pytest.raises(OSError, match="the disk is full"):
                beton_writer.write(
                    source,
                    path,
                    EncodingSettings(max_side=30 if damage == "other settings" else 500),
                    num_workers=1,
                )
        data, journal = tmp_path / "train.beton.writing", tmp_path / "train.beton.journal"
        if damage == "half an entry":
            os.truncate(journal, journal.stat().st_size - 7)
        elif damage == "data lost":
            os.truncate(data, data.stat().st_size - 2000)
        elif damage == "data changed":
            content = bytearray(data.read_bytes())
            content[-3000] ^= 255
            data.write_bytes(bytes(content))
        beton_writer.write(source, path, EncodingSettings(), num_workers=1)
        assert sha256(path) == sha256(reference)

    def test_a_finished_file_is_not_written_again(self, tmp_path):
        beton = write_beton(tmp_path / "data", n=12)
        before = os.stat(beton.full_path)
        beton_writer.write(
            open_train(tmp_path / "data", loader="folder"),
            Path(beton.full_path),
            EncodingSettings(),
            num_workers=1,
        )
        assert os.stat(beton.full_path).st_mtime_ns == before.st_mtime_ns

    def test_any_number_of_processes_writes_the_same_file(self, tmp_path):
        source = open_train(write_images(tmp_path / "data", n=100), loader="folder")
        for workers in (1, 3):
            beton_writer.write(
                source,
                tmp_path / str(workers) / "train.beton",
                EncodingSettings(max_side=50),
                workers,
            )
        assert sha256(tmp_path / "1" / "train.beton") == sha256(tmp_path / "3" / "train.beton")

    def test_a_second_writer_of_the_same_file_is_refused(self, tmp_path):
        source = open_train(write_images(tmp_path / "data", n=12), loader="folder")
        path = tmp_path / "train.beton"
        encode_images = beton_writer.encode_images

        def start_second_writer(*arguments, **options):
            assert (
                error_message(beton_writer.write, source, path, EncodingSettings(), 1)
                == f"{path}: another process is writing this file; wait until it ends, or stop it"
            )
            return encode_images(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(beton_writer, "encode_images", start_second_writer)
            beton_writer.write(source, path, EncodingSettings(), num_workers=1)
        assert path.exists()


class TestMessages:
    @pytest.fixture
    def beton(self, tmp_path) -> Beton:
        return write_beton(tmp_path / "data", n=12)

    @pytest.mark.case(15)
    def test_the_error_says_why_a_file_does_not_open(self, beton, tmp_path):
        path, size = Path(beton.full_path), os.stat(beton.full_path).st_size
        os.truncate(path, size - 100)
        assert (
            error_message(beton_file.read, path)
            == f"data.root: {path} is truncated to {size - 100:,} bytes; copy or write it again"
        )
        os.truncate(path, 0)
        assert (
            error_message(beton_file.read, path)
            == f"data.root: {path} is empty, as its writer was stopped or the disk was full; "
            "write it again"
        )
        path.write_bytes(bytes(5000))
        assert (
            error_message(beton_file.read, path)
            == f"data.root: {path} is not a .beton file of format 2; write it with python -m "
            "ssl_pretrain.data.beton write"
        )
        path.unlink()
        assert error_message(beton_file.read, path) == (
            f"data.root: {path} does not exist; write it: python -m "
            "ssl_pretrain.data.beton write --help"
        )

    @pytest.mark.parametrize("field", ["offset", "width", "mode"])
    def test_entries_that_point_outside_the_file_are_refused(self, field, beton):
        with edit_bytes(beton) as (path, content):
            samples = np.frombuffer(content, tables.SAMPLE_DTYPE, 12, offset=tables.SAMPLES_OFFSET)
            samples["image"][field][2] = {"offset": 1 << 40, "width": 0, "mode": 9}[field]
        expected = (
            "the allocation table has no entry for image 2"
            if field == "offset"
            else "the entry of image 2 points outside the file"
        )
        assert error_message(beton_file.read, path) == (
            f"data.root: {path}: {expected}; the file is damaged; copy or write it again"
        )

    def test_a_damaged_manifest_is_refused_and_a_missing_one_is_not(self, beton):
        path = manifest_path(Path(beton.full_path))
        path.write_text("{")
        assert error_message(beton_file.read, Path(beton.full_path)) == (
            f"data.root: {path} is damaged; copy it again, or run the same write command again"
        )
        path.unlink()  # as with FFCV's files, whose classes are named by number
        assert open_train(Path(beton.full_path)).classes == ["0", "1", "2"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ["--page-size", "3000000"],
                "--page-size 3000000: give a power of two of at least 2,097,152, FFCV's minimum",
            ),
            (
                ["--shards", "2", "--shard", "2"],
                (
                    "--shards 2, --shard 2: give 1 to 12 shards, and a shard from 0 to one less "
                    "than their number"
                ),
            ),
        ],
    )
    def test_impossible_options_are_refused(self, options, message, beton, tmp_path, capsys):
        assert (
            command.main(["write", str(tmp_path / "data"), str(tmp_path / "x.beton"), *options])
            == 2
        )
        assert capsys.readouterr().err == f"error: {message}\n"

    def test_each_task_of_a_slurm_array_writes_one_shard(
        self, beton, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
        assert (
            command.main(
                [
                    "write",
                    str(tmp_path / "data"),
                    str(tmp_path / "out" / "val.beton"),
                    "--shards",
                    "4",
                    "--workers",
                    "1",
                ]
            )
            == 0
        )
        assert [path.name for path in sorted((tmp_path / "out").glob("*.beton"))] == [
            "val-00002-of-00004.beton"
        ]

    def test_progress_shows_the_time_left(self, monkeypatch, capsys):
        clock = iter(range(0, 100, 2))
        monkeypatch.setattr(messages.time, "monotonic", lambda: next(clock))
        assert list(messages.report_progress("abcd", 4, "wrote")) == list("abcd")
        assert "wrote 3 of 4 images, about " in capsys.readouterr().err


class TestDamage:
    """Damage and malicious entries are detected before a decoder sees them."""

    @pytest.fixture
    def beton(self, tmp_path) -> Beton:
        return write_beton(tmp_path / "data", n=12)

    def test_flipped_bits_of_the_tables_are_detected(self, beton):
        path = Path(beton.full_path)
        content = path.read_bytes()
        allocations_offset = int(
            np.frombuffer(content, tables.HEADER_DTYPE, 1)[0]["allocations_offset"]
        )
        samples_end = tables.SAMPLES_OFFSET + 12 * tables.SAMPLE_DTYPE.itemsize
        positions = [
            *range(tables.HEADER_DTYPE.itemsize),
            *range(tables.SAMPLES_OFFSET, samples_end),
            *range(allocations_offset, len(content)),
        ]
        for number, position in enumerate(positions[::5]):
            flipped = bytearray(content)
            flipped[position] ^= 1 << number % 8
            path.write_bytes(flipped)
            error_message(beton_file.read, path)
        path.write_bytes(content)
        assert len(beton_file.read(path)) == 12

    def test_flipped_bits_of_the_manifest_are_detected(self, beton):
        path = manifest_path(Path(beton.full_path))
        content = path.read_bytes()
        for position in range(0, len(content), 3):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 7
            path.write_bytes(flipped)
            assert error_message(beton_file.read, Path(beton.full_path)) == (
                f"data.root: {path} is damaged; copy it again, or run the same write command again"
            )

    @pytest.mark.parametrize(
        "text", ["[]", "null", "5", '"text"', "{}", "\xff", pytest.param("[" * 200_000, id="deep")]
    )
    def test_text_that_is_no_manifest_is_refused(self, text, beton, capsys):
        path = manifest_path(Path(beton.full_path))
        path.write_text(text, encoding="latin-1")
        expected = (
            f"error: data.root: {path} is damaged; copy it again, or run the same write command "
            "again\n"
        )
        for action in ("check", "info"):
            assert command.main([action, beton.full_path]) == 2
            assert capsys.readouterr().err == expected

    def test_every_key_of_a_manifest_is_checked(self, beton):
        path = manifest_path(Path(beton.full_path))
        manifest = json.loads(path.read_text())
        for key in manifest:
            for replacement in ({}, {key: None}, {key: [5]}):
                path.write_text(
                    json.dumps(
                        {name: value for name, value in manifest.items() if name != key}
                        | replacement
                    )
                )
                assert "is damaged" in error_message(beton_file.read, Path(beton.full_path))

    def test_a_manifest_of_an_earlier_version_is_read(self, beton):
        path = manifest_path(Path(beton.full_path))
        manifest = json.loads(path.read_text())
        path.write_text(
            json.dumps(
                {key: value for key, value in manifest.items() if not key.endswith("_sha256")}
            )
        )
        assert len(beton_file.read(Path(beton.full_path))) == 12

    @pytest.mark.parametrize("length", [2**64 - 8, 2**63, 2**64 - 1])
    def test_a_length_that_overflows_is_refused(self, length, beton):
        with edit_bytes(beton) as (path, content):
            allocations_offset = int(
                np.frombuffer(content, tables.HEADER_DTYPE, 1)[0]["allocations_offset"]
            )
            allocations = np.frombuffer(
                content, tables.ALLOCATION_DTYPE, 12, offset=allocations_offset
            )
            allocations["length"][3] = np.uint64(length)
        assert error_message(beton_file.read, path).endswith(
            "the entry of image 3 points outside the file; the file is damaged; copy or write it "
            "again"
        )

    @pytest.mark.parametrize("label", [-2, 1_000_000, 2**40, -(2**63)])
    def test_a_label_that_is_no_class_is_refused(self, label, beton):
        """A file without class names gets one name per class, which could fill the memory."""
        with edit_bytes(beton) as (path, content):
            samples = np.frombuffer(content, tables.SAMPLE_DTYPE, 12, offset=tables.SAMPLES_OFFSET)
            samples["label"][3] = label
        assert error_message(beton_file.read, path) == (
            f"data.root: {path}: the label of image 3 is {label}, but labels are -1 for "
            "none or a class below 1,000,000; the file is damaged; copy or write it again"
        )

    def test_a_file_without_images_is_refused(self, beton):
        with edit_bytes(beton) as (path, content):
            np.frombuffer(content, tables.HEADER_DTYPE, 1)["num_samples"][0] = 0
        assert (
            error_message(open_train, path)
            == f"data.root: {path} contains no image; write it again"
        )

    def test_a_folder_is_refused(self, beton):
        path = Path(beton.full_path)
        path.unlink()
        path.mkdir()
        assert error_message(beton_file.read, path) == (
            f"data.root: {path} is not a regular file; give the .beton itself, or the "
            "folder that contains train.beton"
        )

    def test_an_entry_with_too_many_pixels_is_refused(self, beton):
        with edit_bytes(beton) as (path, content):
            samples = np.frombuffer(content, tables.SAMPLE_DTYPE, 12, offset=tables.SAMPLES_OFFSET)
            samples["image"]["width"][2] = samples["image"]["height"][2] = 65535
        assert (
            "the entry of image 2 says 65,535 x 65,535 pixels, more than the limit of 178,956,970"
            in error_message(beton_file.read, path)
        )

    def test_a_buffer_is_not_sized_for_the_largest_height_times_the_largest_width(self, beton):
        sides = np.array([1, 60000] * 6)
        assert allocate_buffers(3, sides, sides[::-1], []).image.nbytes < 20_000_000

    def test_a_replaced_file_is_detected(self, beton, tmp_path):
        replacement = write_beton(tmp_path / "other" / "data", n=12, max_side=30)
        beton.read(0)
        os.replace(replacement.full_path, beton.full_path)
        with pytest.raises(UnreadableImage, match="the file was replaced"):
            beton.read(0)
        assert error_message(beton.check_present) == (
            f"data.root: {beton.full_path} was replaced or changed while it was being read; "
            "start the run again"
        )

    def test_only_jpeg_decoders_see_a_stored_jpeg(self, beton):
        path, samples = Path(beton.full_path), beton.samples
        content = bytearray(path.read_bytes())
        offset = int(samples.offset[4])
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        content[offset : offset + len(eps)] = eps
        path.write_bytes(content)
        with pytest.raises(UnreadableImage) as error:
            open_train(path).read(4)
        assert str(error.value) == f"{path}, image 4: not a JPEG"


@pytest.mark.parametrize(
    "moment", ["before the manifest", "between manifest and data", "before the journal is removed"]
)
def test_a_killed_rewrite_is_finished(moment, tmp_path, monkeypatch):
    source = open_train(write_images(tmp_path / "data", n=12), loader="folder")
    path, reference = tmp_path / "train.beton", tmp_path / "reference" / "train.beton"
    beton_writer.write(source, path, EncodingSettings(max_side=30), num_workers=1)
    beton_writer.write(source, reference, EncodingSettings(max_side=60), num_workers=1)
    with monkeypatch.context() as patch:

        def interrupt(*_arguments):
            raise KeyboardInterrupt

        replace_file = os.replace
        steps = {
            "before the manifest": lambda: patch.setattr(beton_writer, "write_manifest", interrupt),
            "between manifest and data": lambda: patch.setattr(
                beton_writer.os,
                "replace",
                lambda old, new: interrupt() if new == path else replace_file(old, new),
            ),
            "before the journal is removed": lambda: patch.setattr(Path, "unlink", interrupt),
        }
        steps[moment]()
        with pytest.raises(KeyboardInterrupt):
            beton_writer.write(source, path, EncodingSettings(max_side=60), num_workers=1)
    if moment == "between manifest and data":
        assert "do not belong together" in error_message(beton_file.read, path)
    beton_writer.write(source, path, EncodingSettings(max_side=60), num_workers=1)
    assert sha256(path) == sha256(reference)
    assert sorted(file.name for file in tmp_path.glob("train.beton*")) == [
        "train.beton",
        "train.beton.json",
    ]


def test_a_subset_reads_its_images_and_a_deleted_file_is_reported(tmp_path):
    beton = write_beton(tmp_path / "data", n=12)
    np.testing.assert_array_equal(beton.read(3), decode(beton.read_bytes(3), "x"))
    subset = beton.take(np.array([5, 2]))
    assert subset.fingerprint not in (beton.fingerprint, beton.take(np.array([2, 5])).fingerprint)
    np.testing.assert_array_equal(subset.read(0), beton.read(5))
    os.unlink(beton.full_path)
    with pytest.raises(FileNotFoundError) as error:
        beton.check_present()
    assert (
        str(error.value)
        == f"data.root: {beton.full_path} no longer exists, but existed when the run began"
    )
