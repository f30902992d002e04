"""Threads yield the same bytes as worker processes, without FFCV's bugs, with either decoder."""

import gc
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from betons import needs_ffcv, open_train, write_beton
from loaders import build_loader, digest, digests
from omegaconf import OmegaConf

from ssl_pretrain.data import order
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.loader import Loader, build
from ssl_pretrain.data.named_datasets import Digits
from ssl_pretrain.data.native import ffcv, threads, views
from ssl_pretrain.data.readers import choose_reader_kind
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.recipe import Crop, ViewsConfig

pytestmark = pytest.mark.timeout(120)

JITTER = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
GLOBAL = Crop(count=2, size=24, grayscale=0.2, blur=0.5, **JITTER)
LOCAL = Crop(count=2, size=10, scale=[0.1, 0.4], interpolation="bicubic", solarize=0.5)
VIEWS = ViewsConfig(crops={"global": GLOBAL, "local": LOCAL})
ROOT = Path(__file__).parents[2]


settings = {"kind": "threads"}  # the kind of reader that `make_loader` builds


@pytest.fixture(
    autouse=True, scope="module", params=["threads", pytest.param("ffcv", marks=needs_ffcv)]
)
def kind(request) -> str:
    settings["kind"] = request.param
    return request.param


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Beton:
    return write_beton(tmp_path_factory.mktemp("threads") / "data")


@pytest.fixture
def small_beton(tmp_path) -> Beton:
    return write_beton(tmp_path / "data", n=24)


def make_loader(source, num_workers=2, kind="", views=VIEWS, **options) -> Loader:
    kind = kind or settings["kind"]
    return build_loader(source, views, kind, num_workers=num_workers, **options)


@pytest.fixture(scope="module")
def expected(beton) -> list[str]:
    """Return the digests of steps 0 to 9, read without FFCV from the same file."""
    return digests(make_loader(beton, num_workers=0, kind="folder"), 0, 10)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_threads_gives_the_bytes_of_processes(num_workers, beton, expected):
    assert digests(make_loader(beton, num_workers), 0, 10) == expected


def test_a_folder_gives_the_batches_of_the_beton_written_from_it(beton, expected):
    source = open_train(Path(beton.full_path).parent / "data", loader="folder")
    assert source.fingerprint == beton.fingerprint
    assert digests(make_loader(source, num_workers=0, kind="folder"), 0, 10) == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_make_up_the_global_batch(world_size, beton, expected):
    loaders = [make_loader(beton, rank=rank, world_size=world_size) for rank in range(world_size)]
    iterators = [loader.iterate_from(0) for loader in loaders]
    for step in range(5):
        shards = [next(iterator) for iterator in iterators]
        views = [torch.cat(tensors) for tensors in zip(*(shard.views for shard in shards))]
        labels = torch.cat([shard.labels for shard in shards])
        indices = torch.cat([shard.indices for shard in shards])
        assert digest(Batch(views, labels, indices)) == expected[step]
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("first", range(1, 10))
def test_batches_resumed_at_any_step_equal_uninterrupted_ones(first, beton, expected):
    assert digests(make_loader(beton), first, 10 - first) == expected[first:]


def test_a_second_iterator_ends_the_first(beton, expected):
    with make_loader(beton) as loader:
        first = loader.iterate_from(0)
        next(first)
        second = itertools.islice(loader.iterate_from(3), 3)
        assert [digest(batch) for batch in second] == expected[3:6]
        assert list(first) == []


def _digest_file(path: str, first: int, count: int) -> list[str]:
    return digests(make_loader(open_train(Path(path))), first, count)


def test_a_closed_loader_can_start_again(beton, expected):
    loader = make_loader(beton)
    assert digests(loader, 0, 2) == expected[:2]
    assert digests(loader, 2, 2) == expected[2:4]


def test_a_spawned_process_gives_the_same_bytes(beton, expected):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_digest_file, (beton.full_path, 2, 3)) == expected[2:5]


def test_a_batch_larger_than_a_threads_share_is_complete(beton):
    options = {
        "global_batch_size": 50,
        "views": ViewsConfig(crops={"global": Crop(count=1, size=8)}),
    }
    expected = digests(make_loader(beton, 0, kind="folder", **options), 0, 2)
    assert digests(make_loader(beton, 3, **options), 0, 2) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"crop_sampler": "tensorflow", "antialias": False, "interpolation": "bicubic"},
        {"crop_sampler": "clipped", "antialias": False},
        {"crop_sampler": "tensorflow", "scale": [0.2, 0.6]},
    ],
)
def test_samplers_and_resizes_equal_those_of_processes(options, beton):
    def build_views(**settings) -> ViewsConfig:
        local = Crop(count=1, size=10, **settings)
        return ViewsConfig(crops={"global": Crop(count=2, size=24, **settings), "local": local})

    batch_digests = digests(make_loader(beton, views=build_views(**options)), 0, 3)
    assert batch_digests == digests(
        make_loader(beton, 0, views=build_views(**options), kind="folder"), 0, 3
    )
    assert not set(batch_digests) & set(digests(make_loader(beton, views=build_views()), 0, 3))


@pytest.mark.parametrize("options", [{"interpolation": "bicubic"}, {"antialias": False}])
def test_rectangular_views_equal_those_of_processes(options, beton):
    views = ViewsConfig(
        crops={
            "global": Crop(count=2, size=[12, 40], blur=0.5, **options),
            "local": Crop(count=1, size=[30, 7], **options),
        }
    )
    first = next(make_loader(beton, views=views).iterate_from(0))
    assert [view.shape[1:] for view in first.views] == [(3, 12, 40), (3, 12, 40), (3, 30, 7)]
    expected = digests(make_loader(beton, 0, views=views, kind="folder"), 0, 3)
    assert digests(make_loader(beton, views=views), 0, 3) == expected


def test_raw_pixels_equal_those_of_the_source(tmp_path):
    from ssl_pretrain.data.beton import beton_writer
    from ssl_pretrain.data.beton.encoder import EncodingSettings
    from ssl_pretrain.data.sources import open_source

    digits = open_source(DataConfig("digits"), "val")
    beton_writer.write(digits, tmp_path / "train.beton", EncodingSettings(), num_workers=1)
    source = open_train(tmp_path / "train.beton")
    assert isinstance(source, Beton) and source.samples.mode.tolist() == [1] * 500
    assert digests(make_loader(source), 0, 4) == digests(
        make_loader(digits, 0, kind="folder"), 0, 4
    )


def test_shards_are_read_as_one_file(tmp_path, beton, expected):
    from ssl_pretrain.data.beton.__main__ import main

    root = Path(beton.full_path).parent / "data"
    command = ["write", str(root), str(tmp_path / "train.beton"), "--shards", "3", "--workers", "1"]
    for shard in ("2", "0", "1"):
        assert main([*command, "--shard", shard]) == 0
    source = open_train(tmp_path)
    assert isinstance(source, Beton) and len(source.samples.paths) == 3
    assert source.fingerprint == beton.fingerprint
    assert digests(make_loader(source), 0, 10) == expected
    (tmp_path / "train-00001-of-00003.beton").unlink()
    with pytest.raises(ValueError) as error:
        open_train(tmp_path)
    first = tmp_path / "train-00000-of-00003.beton"
    assert str(error.value) == (
        f"data.root: the set of {first} lacks 1 of its 3 shards: train-00001-of-00003.beton; "
        "write them, or wait until they are written"
    )


class TestChoiceOfReader:
    def test_auto_reports_the_reader_and_the_reason(self, beton, capsys):
        config = DataConfig(root=beton.full_path, num_workers=1)
        build(config, VIEWS, seed=3, global_batch_size=12, device="cpu").close()
        assert capsys.readouterr().err.endswith(
            f"\ndata.loader: threads: {beton.full_path} is a .beton\n"
        )

    def test_a_folder_is_read_as_a_folder(self, beton):
        source = open_train(Path(beton.full_path).parent / "data", loader="folder")
        train_folder = Path(beton.full_path).parent / "data" / "train"
        assert choose_reader_kind(DataConfig(), source) == (
            "folder",
            f"{train_folder} is not a .beton; python -m ssl_pretrain.data.beton write creates one, "
            "which is read faster",
        )
        with pytest.raises(ValueError) as error:
            choose_reader_kind(DataConfig(loader="ffcv"), source)
        assert str(error.value) == (
            f"data.loader: ffcv only reads .beton files, and {train_folder} is not one; "
            "python -m ssl_pretrain.data.beton write creates one, or set data.loader=auto"
        )

    def test_threads_read_a_folder_on_request(self, beton, expected):
        source = open_train(Path(beton.full_path).parent / "data", loader="folder")
        kind, reason = choose_reader_kind(DataConfig(loader="threads"), source)
        assert (kind, reason) == ("threads", "data.loader is set to threads")
        assert digests(make_loader(source, kind=kind), 0, 10) == expected

    def test_threads_do_not_read_images_in_memory(self):
        with pytest.raises(ValueError) as error:
            choose_reader_kind(DataConfig(loader="threads"), Digits("train"))
        assert str(error.value) == (
            "data.loader: threads only read image files and .beton files, and scikit-learn's "
            "digits is neither; set data.loader=auto"
        )

    def test_without_ffcv_its_decoder_is_refused(self, beton, monkeypatch):
        monkeypatch.setattr(ffcv.importlib.util, "find_spec", lambda name: None)
        assert choose_reader_kind(DataConfig(), beton)[0] == "threads"
        with pytest.raises(ValueError) as error:
            choose_reader_kind(DataConfig(loader="ffcv"), beton)
        assert str(error.value) == (
            f"data.loader: FFCV is not installed; {ffcv.INSTALL_HINT}, or set data.loader=threads"
        )


class TestBugsOfFFCV:
    """This project's loader works in cases where FFCV's hangs, leaks or returns wrong images.

    If a test hangs, the timeout of this file makes it fail.
    """

    @pytest.mark.case(18)
    def test_1_the_order_of_the_keys_of_a_recipe_does_not_matter(self, beton, expected):
        """FFCV hangs for one order of operations."""
        crops = {name: dict(reversed(asdict(crop).items())) for name, crop in VIEWS.crops.items()}
        text = yaml.safe_dump(crops, sort_keys=False)
        overrides = {"crops": OmegaConf.create(text)}
        merged = OmegaConf.merge(OmegaConf.structured(ViewsConfig), overrides)
        views = OmegaConf.to_object(merged)
        assert isinstance(views, ViewsConfig)
        assert digests(make_loader(beton, views=views), 0, 2) == expected[:2]

    @pytest.mark.case(17)
    @pytest.mark.parametrize("stage", ["views", "buffers"])
    def test_2_an_exception_in_a_thread_is_raised_in_the_trainer(
        self, kind, stage, beton, monkeypatch
    ):
        """FFCV waits forever for the thread."""

        def raise_error(*_arguments):
            raise MemoryError("no room for an image")

        functions = {
            ("ffcv", "views"): (ffcv, "make_views"),
            ("ffcv", "buffers"): (ffcv, "allocate_workspace"),
            ("threads", "views"): (views, "write_views_of"),
            ("threads", "buffers"): (views, "allocate_buffers"),
        }
        monkeypatch.setattr(*functions[kind, stage], raise_error)
        with make_loader(beton) as loader, pytest.raises(MemoryError) as error:
            next(loader.iterate_from(0))
        assert str(error.value) == "no room for an image"

    def test_3_leaving_an_epoch_leaves_no_thread_behind(self, beton):
        """FFCV leaks one thread and its buffers per epoch."""
        expected = count_threads_and_files()
        for _ in range(6):
            with make_loader(beton) as loader:
                for _batch in loader.iterate_from(0):
                    break
        assert count_threads_and_files() == expected

    def test_3_deleting_a_loader_leaves_no_thread_behind(self, beton):
        expected = count_threads_and_files()
        loader = make_loader(beton)
        next(loader.iterate_from(0))
        assert threading.active_count() == expected[0] + 2
        del loader
        gc.collect()
        assert count_threads_and_files() == expected

    @pytest.mark.case(14)
    @pytest.mark.parametrize("damage", ["header", "scan", "other size", "no jpeg"])
    def test_4_a_damaged_image_is_replaced_and_counted(self, damage, small_beton):
        """FFCV returns a black image or one of an earlier batch, without a warning."""
        damaged = damage_images(small_beton, [5], damage)
        views = ViewsConfig(crops={"global": Crop(count=1, size=8)})
        options = {"global_batch_size": 12, "views": views}
        epoch = []
        with (
            make_loader(damaged, **options) as loader,
            warnings.catch_warnings(record=True) as messages,
        ):
            warnings.simplefilter("always")
            for batch in itertools.islice(loader.iterate_from(0), 2):
                epoch.append((batch.indices.tolist(), batch.labels, batch.views[0].clone()))
        assert loader.num_replaced == 1

        path = small_beton.full_path
        (message,) = [str(warning.message) for warning in messages]
        prefix = re.escape(f"{path}, image 5: {FAILURE_REASONS[damage]}; {path}, image ")
        replacement = int(re.fullmatch(prefix + r"(\d+) takes its place", message)[1])
        indices, labels, view = next(batch for batch in epoch if 5 in batch[0])
        assert replacement not in indices
        assert labels[indices.index(5)] == small_beton.label(replacement)

        # The other images of the batch are those of an intact file.
        intact_beton = write_beton(Path(path).parent / "intact" / "data", n=24)
        intact_loader = make_loader(intact_beton, 0, kind="folder", **options)
        read_image = intact_loader.source.read
        intact_loader.source.read = lambda index: read_image(replacement if index == 5 else index)
        expected = next(
            batch for batch in intact_loader.iterate_from(0) if 5 in batch.indices.tolist()
        )
        assert torch.equal(expected.views[0], view)

    @pytest.mark.case(14)
    def test_4_the_folder_loader_uses_the_same_replacement(self, small_beton):
        damaged = damage_images(small_beton, [5, 9], "no jpeg")
        options = {"global_batch_size": 10, "max_replaced": 10.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = digests(make_loader(damaged, 0, kind="folder", **options), 0, 4)
            assert digests(make_loader(damaged, **options), 0, 4) == expected

    @pytest.mark.case(14)
    def test_4_more_than_a_few_damaged_images_stop_the_run(self, small_beton):
        damaged = damage_images(small_beton, [5, 9], "no jpeg")
        with (
            make_loader(damaged) as loader,
            warnings.catch_warnings(),
            pytest.raises(ValueError) as error,
        ):
            warnings.simplefilter("ignore")
            for _ in loader.iterate_from(0):
                pass
        last = re.search(r"the last: (.* takes its place); ", str(error.value))[1]
        assert str(error.value) == (
            f"data.max_replaced: 2 of 24 images of {small_beton.full_path} could not be read in "
            f"one pass, more than the 1 that may be replaced (0.001 of the images); the last: "
            f"{last}; all images were readable when the file was written, so the file is damaged "
            "now; find the damaged images with `python -m ssl_pretrain.data.beton check`, then "
            "copy or write the file again"
        )

    def test_4_a_file_without_a_good_image_is_an_error(self, small_beton):
        damaged = damage_images(small_beton, range(24), "no jpeg")
        message = "no other readable image of the 24 in .*train.beton is left outside its"
        with (
            make_loader(damaged) as loader,
            pytest.raises(ValueError, match=f"not a JPEG; {message}"),
        ):
            next(loader.iterate_from(0))

    @pytest.mark.case(15)
    def test_5_an_unfinished_file_does_not_open(self, small_beton):
        """FFCV opens it and returns a million rows of garbage."""
        with open(small_beton.full_path, "r+b") as file:
            file.seek(16)  # offset of the table, which the writer sets last
            file.write(bytes(8))
        with pytest.raises(ValueError) as error:
            open_train(Path(small_beton.full_path))
        assert str(error.value) == (
            f"data.root: {small_beton.full_path} is unfinished, as its writer was stopped; "
            "run the same write command again to finish it"
        )

    def test_6_the_seed_determines_every_batch(self, beton, expected):
        """FFCV seeds its random numbers from the operating system."""
        assert digests(make_loader(beton, seed=3), 0, 2) == expected[:2]
        assert not set(digests(make_loader(beton, seed=4), 0, 10)) & set(expected)
        assert len(set(expected)) == 10


FAILURE_REASONS = {
    "header": "not a JPEG",
    "scan": "the JPEG is damaged",
    "other size": "the JPEG's size differs from its table entry",
    "no jpeg": "not a JPEG",
}


def count_threads_and_files() -> tuple[int, int]:
    """Return the numbers of threads and of open files of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def damage_images(source: Beton, indices: Iterable[int], damage: str) -> Source:
    """Damage JPEGs in the file of the source, and open it again.

    `damage` is a key of FAILURE_REASONS.
    """
    for index in indices:
        damage_image(source, index, damage)
    return open_train(Path(source.full_path))


def damage_image(source: Beton, index: int, damage: str) -> None:
    samples = source.samples
    offset, length = int(samples.offset[index]), int(samples.length[index])
    with open(source.full_path, "r+b") as file:
        file.seek(offset)
        content = bytearray(file.read(length))
        scan_start, frame_start = content.index(b"\xff\xda"), content.index(b"\xff\xc0")
        if damage == "header":
            content[4 : frame_start + 10] = bytes(frame_start + 6)
        elif damage == "scan":
            content[scan_start + 30 :] = bytes([0xFF, 0xD9]) * ((length - scan_start - 29) // 2)
        elif damage == "other size":
            content[frame_start + 5 : frame_start + 9] = bytes([0, 17, 0, 19])
        else:
            content[:2] = b"GI"
        file.seek(offset)
        file.write(bytes(content[:length]))


class TestFailures:
    @pytest.mark.case(16)
    def test_truncating_the_file_raises_an_error_that_names_it(self, kind, small_beton):
        with make_loader(small_beton, global_batch_size=24) as loader:
            last = int(np.argmax(small_beton.samples.offset))
            os.truncate(small_beton.full_path, int(small_beton.samples.offset[last]) + 10)
            with pytest.raises(ValueError) as error:  # a user's error: one line, no traceback
                next(loader.iterate_from(0))
        missing = int(small_beton.samples.length[last]) - 10
        messages = {
            "threads": f"data.root: {small_beton.full_path} was replaced or changed while it was "
            "being read; start the run again",
            "ffcv": f"data.root: {small_beton.full_path}, image {last}: the file was truncated "
            f"during the run, and the image lacks its last {missing:,} bytes; copy the file again, "
            "then start the run again",
        }
        assert str(error.value) == messages[kind]

    def test_a_deleted_file_is_named(self, small_beton):
        loader = make_loader(small_beton)
        os.unlink(small_beton.full_path)
        with pytest.raises(FileNotFoundError, match=re.escape(small_beton.full_path)):
            next(loader.iterate_from(0))

    def test_a_loader_can_start_again_after_an_exception(self, beton, expected, monkeypatch):
        loader = make_loader(beton)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(threads._Session, "_make_rows", lambda *_arguments: 1 // 0)
            next(loader.iterate_from(0))
        assert digests(loader, 0, 3) == expected[:3]


def run_python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter in the root of the repository."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
    )


KILL_AND_DELETE_LOADERS = """
import itertools, os, re, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests/data")
from test_threads import make_loader, open_train
source = open_train(Path(sys.argv[1]))
with make_loader(source) as loader:
    next(loader.iterate_from(0))
pids = {str(os.getpid())}
def count_resources():
    # Names of shared memory segments contain the ID of the process that created it.
    segments = [name for name in os.listdir("/dev/shm") if pids & set(re.split("[-_.]", name))]
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), sorted(segments)
time.sleep(2)  # the kernel removes a thread shortly after it has ended
before = count_resources()
for number in range(100):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        loader = make_loader(source)
        next(loader.iterate_from(number))
        os.write(write_end, b"x")
        time.sleep(60)
    os.close(write_end)
    pids.add(str(child))
    assert os.read(read_end, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read_end)
for number in range(100):
    loader = make_loader(source)
    next(loader.iterate_from(number))
    if number % 2:
        loader.close()
    del loader
deadline = time.monotonic() + 20
while before != count_resources() and time.monotonic() < deadline:
    time.sleep(0.1)
print(before == count_resources(), before, count_resources())
"""


@pytest.mark.full
def test_a_hundred_killed_or_deleted_loaders_leave_no_resources_behind(beton):
    result = run_python(KILL_AND_DELETE_LOADERS, beton.full_path, OPENBLAS_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True "), result.stdout


PRINT_RESIDENT_MEMORY = """
import gc, itertools, os, sys
from pathlib import Path
sys.path.insert(0, "tests/data")
import torch
torch.set_num_threads(1)
from test_threads import make_loader, open_train
with make_loader(open_train(Path(sys.argv[1])), global_batch_size=25) as loader:
    for step, batch in enumerate(loader.iterate_from(0)):
        if step in (4, 100):
            gc.collect()
            print(os.sysconf("SC_PAGESIZE") * int(Path("/proc/self/statm").read_text().split()[1]))
        if step == 100:
            break
"""


@pytest.mark.full
def test_memory_does_not_grow_over_50_epochs(beton):
    result = run_python(PRINT_RESIDENT_MEMORY, beton.full_path)
    assert result.returncode == 0, result.stderr
    after_2, after_50 = map(int, result.stdout.split())
    assert after_50 <= 1.02 * after_2


@pytest.mark.full
def test_compiled_code_is_cached_on_disk(kind, beton, expected):
    """Another process loads the code that this one compiled, and compiles nothing."""
    assert digests(make_loader(beton), 0, 1) == expected[:1]
    code = (
        "import sys; sys.path.insert(0, 'tests/data'); from test_threads import *; "
        "loader = make_loader(open_train(Path(sys.argv[1])), kind=sys.argv[2]); "
        "assert digests(loader, 0, 1); "
        "functions = (ffcv.make_views, views.write_views_of, ffcv.decode_image); "
        "print([sum(function.stats.cache_hits.values()) for function in functions])"
    )
    result = run_python(code, beton.full_path, kind)
    assert result.returncode == 0, result.stderr
    # `decode_image` is compiled into `make_views`.
    expected_hits = {"threads": "[0, 1, 0]\n", "ffcv": "[1, 0, 0]\n"}
    assert result.stdout == expected_hits[kind], result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_views(beton, tmp_path):
    config = ViewsConfig(crops={"global": Crop(count=2, size=24)})
    with (
        make_loader(beton, views=config, device="cuda") as gpu,
        make_loader(beton, views=config) as cpu,
    ):
        for _, batch, expected in zip(range(12), gpu.iterate_from(0), cpu.iterate_from(0)):
            views = [view.cpu() for view in batch.views]
            torch.testing.assert_close(views, expected.views, rtol=0, atol=0)
            assert torch.equal(batch.labels.cpu(), expected.labels)


def test_the_quasi_random_order_equals_that_of_processes(beton, monkeypatch):
    monkeypatch.setattr(order, "BLOCK_SIZE", 8)
    monkeypatch.setattr(threads, "BLOCK_SIZE", 8)
    options = {"window": 16, "global_batch_size": 12}
    calls = []
    advise = os.posix_fadvise

    def record_and_advise(file, offset, length, advice):
        calls.append((offset, length))
        return advise(file, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", record_and_advise)
    order._permutation.cache_clear()
    expected = digests(make_loader(beton, 0, kind="folder", **options), 0, 6)
    assert digests(make_loader(beton, 2, **options), 0, 6) == expected
    assert digests(make_loader(beton, 1, **options), 3, 3) == expected[3:]
    order._permutation.cache_clear()
    assert calls
    assert {offset for offset, _ in calls} <= {int(offset) for offset in beton.samples.offset}
    assert all(length > 0 for _, length in calls)
