"""Compiled threads give the bytes of worker processes, without the faults of FFCV's loader."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import warnings
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
from ssl_pretrain.data.loader import Loader, build
from ssl_pretrain.data.native import decode, threads
from ssl_pretrain.data.readers import choose_reader
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.recipe import Crop, ViewsConfig

pytestmark = [needs_ffcv, pytest.mark.timeout(120)]

VIEWS = ViewsConfig(
    crops={
        "global": Crop(
            count=2,
            size=24,
            jitter=0.8,
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.1,
            grayscale=0.2,
            blur=0.5,
        ),
        "local": Crop(count=2, size=10, scale=[0.1, 0.4], interpolation="bicubic", solarize=0.5),
    }
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Beton:
    return write_beton(tmp_path_factory.mktemp("threads") / "data")


@pytest.fixture
def damageable(tmp_path) -> Beton:
    return write_beton(tmp_path / "data", n=24)


def loader(source, num_workers=2, kind="ffcv", views=VIEWS, **options) -> Loader:
    return build_loader(source, views, kind, num_workers=num_workers, **options)


@pytest.fixture(scope="module")
def expected(stored) -> list[str]:
    """Return the digests of steps 0 to 9, read without FFCV from the same file."""
    return digests(loader(stored, num_workers=0, kind="folder"), 0, 10)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_threads_gives_the_bytes_of_processes(num_workers, stored, expected):
    assert digests(loader(stored, num_workers), 0, 10) == expected


def test_a_folder_gives_the_batches_of_the_file_written_from_it(stored, expected):
    source = open_train(Path(stored.where).parent / "data", loader="folder")
    assert source.fingerprint == stored.fingerprint
    assert digests(loader(source, num_workers=0, kind="folder"), 0, 10) == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_make_up_the_global_batch(world_size, stored, expected):
    ranks = [loader(stored, rank=rank, world_size=world_size) for rank in range(world_size)]
    iterators = [batches.starting_at(0) for batches in ranks]
    for step in range(5):
        parts = [next(batches) for batches in iterators]
        views = [torch.cat(rows) for rows in zip(*(part.views for part in parts))]
        whole = Batch(
            views,
            torch.cat([part.labels for part in parts]),
            torch.cat([part.indices for part in parts]),
        )
        assert digest(whole) == expected[step]
    for batches in ranks:
        batches.close()


@pytest.mark.parametrize("first", range(1, 10))
def test_batches_resumed_at_any_step_equal_uninterrupted_ones(first, stored, expected):
    assert digests(loader(stored), first, 10 - first) == expected[first:]


def test_a_second_start_ends_the_first_batches(stored, expected):
    with loader(stored) as batches:
        before = batches.starting_at(0)
        next(before)
        assert [digest(batch) for batch in itertools.islice(batches.starting_at(3), 3)] == expected[
            3:6
        ]
        assert list(before) == []


def _digests_of(path: str, first: int, count: int) -> list[str]:
    return digests(loader(open_train(Path(path))), first, count)


def test_a_closed_loader_can_start_again(stored, expected):
    batches = loader(stored)
    assert digests(batches, 0, 2) == expected[:2]
    assert digests(batches, 2, 2) == expected[2:4]


def test_a_spawned_process_gives_the_same_bytes(stored, expected):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_digests_of, (stored.where, 2, 3)) == expected[2:5]


def test_a_batch_larger_than_a_threads_share_is_whole(stored):
    views = ViewsConfig(crops={"global": Crop(count=1, size=8)})
    rows = digests(loader(stored, 3, global_batch_size=50, views=views), 0, 2)
    assert rows == digests(
        loader(stored, 0, global_batch_size=50, views=views, kind="folder"), 0, 2
    )


@pytest.mark.parametrize(
    "options",
    [
        {"crop_sampler": "tensorflow", "antialias": False, "interpolation": "bicubic"},
        {"crop_sampler": "clipped", "antialias": False},
        {"crop_sampler": "tensorflow", "scale": [0.2, 0.6]},
    ],
)
def test_samplers_and_plain_resizes_are_those_of_processes(options, stored):
    views = ViewsConfig(
        crops={
            "global": Crop(count=2, size=24, **options),
            "local": Crop(count=1, size=10, **options),
        }
    )
    rows = digests(loader(stored, views=views), 0, 3)
    assert rows == digests(loader(stored, 0, views=views, kind="folder"), 0, 3)
    plain = ViewsConfig(crops={"global": Crop(count=2, size=24), "local": Crop(count=1, size=10)})
    assert not set(rows) & set(digests(loader(stored, views=plain), 0, 3))


def test_raw_pixels_are_read_as_they_are(tmp_path):
    from ssl_pretrain.data.beton import writer as beton_writer
    from ssl_pretrain.data.beton.encoder import Settings
    from ssl_pretrain.data.sources import open_source

    digits = open_source(DataConfig("digits"), "val")
    beton_writer.write(digits, tmp_path / "train.beton", Settings(), num_workers=1)
    source = open_train(tmp_path / "train.beton")
    assert isinstance(source, Beton) and source.samples.mode.tolist() == [1] * 500
    assert digests(loader(source), 0, 4) == digests(loader(digits, 0, kind="folder"), 0, 4)


def test_shards_are_read_as_one_file(tmp_path, stored, expected):
    from ssl_pretrain.data.beton.__main__ import main

    root = Path(stored.where).parent / "data"
    for shard in (2, 0, 1):
        assert (
            main(
                [
                    "write",
                    str(root),
                    str(tmp_path / "train.beton"),
                    "--shards",
                    "3",
                    "--shard",
                    str(shard),
                    "--workers",
                    "1",
                ]
            )
            == 0
        )
    source = open_train(tmp_path)
    assert isinstance(source, Beton) and len(source.samples.paths) == 3
    assert source.fingerprint == stored.fingerprint
    assert digests(loader(source), 0, 10) == expected
    (tmp_path / "train-00001-of-00003.beton").unlink()
    with pytest.raises(ValueError) as caught:
        open_train(tmp_path)
    first = tmp_path / "train-00000-of-00003.beton"
    assert (
        str(caught.value)
        == f"data.root: 1 of 3 shards are missing beside {first}: train-00001-of-00003.beton; "
        "write them, or wait"
    )


class TestChoice:
    def test_auto_says_what_it_took_and_why(self, stored, capsys):
        config = DataConfig(root=stored.where, num_workers=1)
        build(config, VIEWS, seed=3, global_batch_size=12, device="cpu").close()
        assert capsys.readouterr().err.endswith(
            f"\ndata.loader: ffcv: {stored.where} is a .beton, and FFCV is installed\n"
        )

    def test_a_folder_is_read_as_a_folder(self, stored):
        source = open_train(Path(stored.where).parent / "data", loader="folder")
        where = Path(stored.where).parent / "data" / "train"
        assert choose_reader(DataConfig(), source) == (
            "folder",
            f"{where} is not a .beton; python -m ssl_pretrain.data.beton write writes one, "
            "which is read faster",
        )
        with pytest.raises(ValueError) as caught:
            choose_reader(DataConfig(loader="ffcv"), source)
        assert str(caught.value) == (
            f"data.loader: ffcv reads .beton files, and {where} is none; "
            "python -m ssl_pretrain.data.beton write writes one, or set data.loader=folder"
        )

    def test_without_ffcv_the_file_is_read_all_the_same(self, stored, expected, monkeypatch):
        monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
        message = f"FFCV is not installed; {decode.INSTALL}"
        how, why = choose_reader(DataConfig(), stored)
        assert (how, why) == (
            "folder",
            f"a .beton, but not by FFCV ({message}, or set data.loader=folder)",
        )
        assert digests(loader(stored, num_workers=0, kind=how), 0, 2) == expected[:2]
        with pytest.raises(ValueError) as caught:
            choose_reader(DataConfig(loader="ffcv"), stored)
        assert str(caught.value) == f"data.loader: {message}, or set data.loader=folder"


class TestFaultsOfFFCV:
    """Each ends in a right batch or a clear error, within the time limit of this file."""

    @pytest.mark.case(18)
    def test_1_the_order_of_operations_cannot_be_wrong(self, stored, expected):
        """FFCV never returns for one order. Here the order of the recipe's keys changes nothing."""
        written = yaml.safe_dump(
            {name: dict(reversed(asdict(crop).items())) for name, crop in VIEWS.crops.items()},
            sort_keys=False,
        )
        read = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(ViewsConfig), {"crops": OmegaConf.create(written)})
        )
        assert isinstance(read, ViewsConfig)
        assert digests(loader(stored, views=read), 0, 2) == expected[:2]

    @pytest.mark.case(17)
    @pytest.mark.parametrize("function", ["make", "allocate_scratch"])
    def test_2_an_exception_of_a_thread_is_the_trainers(self, function, stored, monkeypatch):
        """FFCV's consumer waits for ever."""

        def broken(*_arguments):
            raise MemoryError("no room for an image")

        monkeypatch.setattr(threads.decode, function, broken)
        with loader(stored) as batches, pytest.raises(MemoryError) as caught:
            next(batches.starting_at(0))
        assert str(caught.value) == "no room for an image"

    def test_3_leaving_an_epoch_leaves_no_thread_behind(self, stored):
        """FFCV keeps one thread and its buffers for each."""
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(6):
            with loader(stored) as batches:
                for _batch in batches.starting_at(0):
                    break
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before

    def test_3_forgetting_a_loader_leaves_no_thread_behind(self, stored):
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        batches = loader(stored)
        next(batches.starting_at(0))
        assert threading.active_count() == before[0] + 2
        del batches
        gc.collect()
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before

    @pytest.mark.case(14)
    @pytest.mark.parametrize("damage", ["header", "scan", "other size", "no jpeg"])
    def test_4_a_damaged_image_is_replaced_and_counted(self, damage, damageable):
        """FFCV gives a black image, or that of an earlier batch, and says nothing."""
        ruin(damageable, 5, damage)
        plain = ViewsConfig(crops={"global": Crop(count=1, size=8)})
        with (
            loader(damageable, global_batch_size=12, views=plain) as batches,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            two = list(
                itertools.islice(
                    (
                        (batch.indices, batch.labels, batch.views[0].clone())
                        for batch in batches.starting_at(0)
                    ),
                    2,
                )
            )
        reason = {
            "header": "not a JPEG",
            "scan": "the JPEG is damaged",
            "no jpeg": "not a JPEG",
        }.get(damage, "the JPEG has another size than its entry")
        path = damageable.where
        (message,) = [str(warning.message) for warning in caught]
        match = re.fullmatch(
            re.escape(f"{path}, image 5: {reason}; {path}, image ") + r"(\d+) takes its place",
            message,
        )
        assert match is not None and batches.num_replaced == 1
        spare = int(match[1])
        indices, labels, views = next(batch for batch in two if 5 in batch[0].tolist())
        assert spare not in indices.tolist()
        assert labels[indices.tolist().index(5)] == damageable.label(spare)
        whole = loader(
            write_beton(Path(path).parent / "again" / "data", n=24),
            0,
            kind="folder",
            global_batch_size=12,
            views=plain,
        )
        source = whole.source
        read = source.read
        source.read = lambda index: read(spare if index == 5 else index)
        expected = next(batch for batch in whole.starting_at(0) if 5 in batch.indices.tolist())
        assert torch.equal(expected.views[0], views)  # all others are their own

    @pytest.mark.case(14)
    def test_4_the_folder_loader_takes_the_same_image_in_its_place(self, damageable):
        ruin(damageable, 5, "no jpeg")
        ruin(damageable, 9, "no jpeg")
        damageable = open_train(Path(damageable.where))  # as it is now
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_threads = digests(loader(damageable, global_batch_size=10, max_replaced=10.0), 0, 4)
            assert by_threads == digests(
                loader(damageable, 0, kind="folder", global_batch_size=10, max_replaced=10.0), 0, 4
            )

    @pytest.mark.case(14)
    def test_4_more_than_a_few_damaged_images_stop_the_run(self, damageable):
        for index in (5, 9):
            ruin(damageable, index, "no jpeg")
        with (
            loader(damageable) as batches,
            warnings.catch_warnings(),
            pytest.raises(ValueError) as caught,
        ):
            warnings.simplefilter("ignore")
            for _ in batches.starting_at(0):
                pass
        last = re.search(r"the last: (.* takes its place); ", str(caught.value))[1]
        assert str(caught.value) == (
            f"data.max_replaced: 2 of 24 images of {damageable.where} could not be read in one "
            f"pass, more than the 1 that may be replaced (0.001 of the images); the last: {last}; "
            "all of them could be read when the file was written, so it is damaged now; "
            "`python -m ssl_pretrain.data.beton check` names them; copy or write it again"
        )

    def test_4_a_file_without_a_good_image_is_an_error(self, damageable):
        for index in range(24):
            ruin(damageable, index, "no jpeg")
        message = (
            r"not a JPEG; no other readable image of the 24 in .*train.beton is left outside its"
        )
        with loader(damageable) as batches, pytest.raises(ValueError, match=message):
            next(batches.starting_at(0))

    @pytest.mark.case(15)
    def test_5_an_unfinished_file_does_not_open(self, damageable):
        """FFCV opens it, with a million rows of garbage."""
        with open(damageable.where, "r+b") as file:
            file.seek(16)
            file.write(bytes(8))  # the place of the table, which the writer sets last
        with pytest.raises(ValueError) as caught:
            open_train(Path(damageable.where))
        assert str(caught.value) == (
            f"data.root: {damageable.where} was never finished: its writer was stopped; "
            "run the same write again to finish it"
        )

    def test_6_the_seed_decides_everything(self, stored, expected):
        """FFCV's draws come from the operating system."""
        assert digests(loader(stored, seed=3), 0, 2) == expected[:2]
        assert not set(digests(loader(stored, seed=4), 0, 10)) & set(expected)
        assert len(set(expected)) == 10


def ruin(source: Beton, index: int, damage: str) -> None:
    samples = source.samples
    place, length = int(samples.place[index]), int(samples.length[index])
    with open(source.where, "r+b") as file:
        file.seek(place)
        content = bytearray(file.read(length))
        scan, size = content.index(b"\xff\xda"), content.index(b"\xff\xc0")
        if damage == "header":
            content[4 : size + 10] = bytes(size + 6)
        elif damage == "scan":
            content[scan + 30 :] = bytes([0xFF, 0xD9]) * ((length - scan - 29) // 2)
        elif damage == "other size":
            content[size + 5 : size + 9] = bytes([0, 17, 0, 19])
        else:
            content[:2] = b"GI"
        file.seek(place)
        file.write(bytes(content[:length]))


class TestFailures:
    @pytest.mark.case(16)
    def test_a_file_that_becomes_shorter_names_the_image(self, damageable):
        with loader(damageable, global_batch_size=24) as batches:
            last = int(np.argmax(damageable.samples.place))
            os.truncate(damageable.where, int(damageable.samples.place[last]) + 10)
            with pytest.raises(ValueError) as caught:  # a user's error: one line, no traceback
                next(batches.starting_at(0))
        missing = int(damageable.samples.length[last]) - 10
        assert str(caught.value) == (
            f"data.root: {damageable.where}, image {last}: the file ends {missing:,} bytes before "
            "the image does, and it did not when the run began; copy it again, then start "
            "the run again"
        )

    def test_a_deleted_file_is_named(self, damageable):
        batches = loader(damageable)
        os.unlink(damageable.where)
        with pytest.raises(FileNotFoundError, match=re.escape(damageable.where)):
            batches.starting_at(0)

    def test_after_an_exception_it_starts_again(self, stored, expected, monkeypatch):
        batches = loader(stored)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(threads._Run, "_make_rows", lambda *_arguments: 1 // 0)
            next(batches.starting_at(0))
        assert digests(batches, 0, 3) == expected[:3]


KILLED = """
import itertools, os, re, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests/data")
from test_threads import loader, open_train
source = open_train(Path(sys.argv[1]))
with loader(source) as batches:
    next(batches.starting_at(0))
pids = {str(os.getpid())}
def held():
    # Names of shared memory contain the number of the process that made it.
    shared = [name for name in os.listdir("/dev/shm") if pids & set(re.split("[-_.]", name))]
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), sorted(shared)
time.sleep(2)    # the system forgets a thread a moment after it has ended
before = held()
for number in range(100):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        batches = loader(source)
        next(batches.starting_at(number))
        os.write(writing, b"x")
        time.sleep(60)
    os.close(writing)
    pids.add(str(child))
    assert os.read(reading, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
for number in range(100):
    batches = loader(source)
    next(batches.starting_at(number))
    if number % 2:
        batches.close()
    del batches
until = time.monotonic() + 20
while before != held() and time.monotonic() < until:
    time.sleep(0.1)
print(before == held(), before, held())
"""


@pytest.mark.full
def test_killed_or_dropped_a_hundred_times_it_leaves_nothing_behind(stored):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, stored.where]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True "), result.stdout


EPOCHS = """
import gc, itertools, os, sys
from pathlib import Path
sys.path.insert(0, "tests/data")
import torch
torch.set_num_threads(1)
from test_threads import loader, open_train
with loader(open_train(Path(sys.argv[1])), global_batch_size=25) as batches:
    for step, batch in enumerate(batches.starting_at(0)):
        if step in (4, 100):
            gc.collect()
            print(os.sysconf("SC_PAGESIZE") * int(Path("/proc/self/statm").read_text().split()[1]))
        if step == 100:
            break
"""


def test_memory_does_not_grow_over_50_epochs(stored):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", EPOCHS, stored.where],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stderr
    after_2, after_50 = map(int, result.stdout.split())
    assert after_50 <= 1.02 * after_2


def test_what_is_compiled_is_kept_on_disk(stored, expected):
    """Another process loads the code that this one compiled, and compiles nothing."""
    assert digests(loader(stored), 0, 1) == expected[:1]
    code = (
        "import sys; sys.path.insert(0, 'tests/data'); from test_threads import *; "
        "assert digests(loader(open_train(Path(sys.argv[1]))), 0, 1); "
        "print([sum(code.stats.cache_hits.values()) for code in (decode.make, decode.decode)])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, stored.where],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.stdout, result.returncode) == ("[1, 0]\n", 0), (
        result.stderr
    )  # decode is part of make


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_views(stored, tmp_path):
    plain = ViewsConfig(crops={"global": Crop(count=2, size=24)})
    with loader(stored, views=plain, device="cuda") as gpu, loader(stored, views=plain) as cpu:
        for _, batch, expected in zip(range(12), gpu.starting_at(0), cpu.starting_at(0)):
            torch.testing.assert_close(
                [view.cpu() for view in batch.views], expected.views, rtol=0, atol=0
            )
            assert torch.equal(batch.labels.cpu(), expected.labels)


def test_the_quasi_random_order_is_exact_too(stored, monkeypatch):
    monkeypatch.setattr(order, "BLOCK", 8)
    monkeypatch.setattr(threads, "BLOCK", 8)
    options = {"window": 16, "global_batch_size": 12}
    calls = []
    advise = os.posix_fadvise
    monkeypatch.setattr(
        os, "posix_fadvise", lambda *arguments: calls.append(arguments[1:3]) or advise(*arguments)
    )
    order._permutation.cache_clear()
    expected = digests(loader(stored, 0, kind="folder", **options), 0, 6)
    assert digests(loader(stored, 2, **options), 0, 6) == expected
    assert digests(loader(stored, 1, **options), 3, 3) == expected[3:]
    order._permutation.cache_clear()
    ends = {
        (int(place), int(length))
        for place, length in zip(stored.samples.place, stored.samples.length)
    }
    assert calls and all(
        any(begin == place for place, _ in ends) and span > 0 for begin, span in calls
    )
