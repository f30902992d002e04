"""Batches do not depend on workers, ranks or the first step, and failures are clear."""

import gc
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import build_loader, digest, digests
from PIL import Image

from ssl_pretrain.data import loader, workers
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.loader import Loader, build
from ssl_pretrain.data.readers import read_images
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views import crops, masks
from ssl_pretrain.views.batch import Batch, concatenate
from ssl_pretrain.views.mask_recipe import Mask
from ssl_pretrain.views.recipe import Crop, ViewsConfig

# PyTorch warns on machines with few cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

VIEWS = ViewsConfig(
    crops={
        "global": Crop(
            count=2,
            size=12,
            jitter=0.8,
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.1,
            grayscale=0.2,
            blur=0.5,
            mask=Mask("blocks", patch_size=3),
        ),
        "local": Crop(count=1, size=6, scale=[0.1, 0.4], solarize=0.5),
    },
    mean=[0.5, 0.4, 0.3],
    std=[0.2, 0.3, 0.4],
)


def write_images(root: Path, n: int) -> DataConfig:
    generator = np.random.default_rng(0)
    for index in range(n):
        folder = root / f"class_{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        size = (int(generator.integers(8, 24)), int(generator.integers(8, 24)), 3)
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(
            folder / f"{index:03d}.png"
        )
    return DataConfig(root=str(root), cache_dir=str(root.parent / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return open_source(write_images(tmp_path_factory.mktemp("loader") / "data", 50), "train")


def make_loader(
    source: Source, num_workers: int = 0, views: ViewsConfig = VIEWS, **options
) -> Loader:
    return build_loader(source, views, num_workers=num_workers, **options)


@pytest.fixture(scope="module")
def expected(source) -> list[str]:
    """Return the digests of steps 0 to 9 in one process, which are two and a half epochs."""
    return digests(make_loader(source), 0, 10)


def test_a_batch_has_normalized_views_labels_and_indices(source):
    batch = next(make_loader(source).iterate_from(0))
    assert [tuple(view.shape) for view in batch.views] == [(12, 3, 12, 12)] * 2 + [(12, 3, 6, 6)]
    assert all(view.dtype == torch.float32 and torch.isfinite(view).all() for view in batch.views)
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.labels.tolist() == [source.label(index) for index in batch.indices.tolist()]
    assert not torch.equal(batch.views[0], batch.views[1])
    low, high = (0 - 0.5) / 0.2, (1 - 0.5) / 0.2  # red, normalized
    assert low - 1e-5 <= batch.views[0][:, 0].min() and batch.views[0][:, 0].max() <= high + 1e-5


def test_views_are_the_crops_of_the_recipe(source):
    views_config = ViewsConfig(crops={"global": Crop(count=2, size=12)})
    batch = next(make_loader(source, views=views_config, seed=5).iterate_from(6))  # epoch 1, step 2
    for row, index in enumerate(batch.indices.tolist()):
        image = torch.from_numpy(source.read(index)).permute(2, 0, 1)
        for number in range(2):
            crop = views_config.crops["global"]
            box = crops.draw_box(crop, 5, 1, index, number, *image.shape[1:])
            torch.testing.assert_close(
                batch.views[number][row], crops.apply(image, box, crop) / 255
            )


def test_a_batch_has_the_masks_of_its_step(source):
    batch = next(make_loader(source, rank=1, world_size=2).iterate_from(6))  # epoch 1
    expected = masks.draw(
        VIEWS,
        masks.Position(
            seed=3,
            epoch=1,
            step=6,
            indices=batch.indices.numpy(),
            first_slot=6,
            global_batch_size=12,
        ),
    )
    assert [(mask_set.name, mask_set.view) for mask_set in batch.masks] == [
        ("masked", 0),
        ("masked", 1),
    ]
    assert any(mask_set.valid.any() for mask_set in batch.masks)
    for mask_set, other in zip(batch.masks, expected, strict=True):
        assert torch.equal(mask_set.indices, other.indices)
        assert torch.equal(mask_set.valid, other.valid)


def test_the_description_of_masks_follows_that_of_their_view(source):
    batches = make_loader(source)
    batch = next(batches.iterate_from(0))
    for row, texts in enumerate(batches.describe_views(0, 3)):
        assert len(texts) == 5  # two views with masks and a local view
        for view in range(2):
            assert " pixels at (" in texts[2 * view]
            count = int(batch.masks[view].valid[row].sum())
            assert texts[2 * view + 1] == f"masks of view {view + 1}: masked {count} of 16 patches"


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_change_nothing(num_workers, source, expected):
    assert digests(make_loader(source, num_workers), 0, 10) == expected


def test_a_zip_gives_the_batches_of_its_folder(source, expected, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for index in range(len(source)):
            archive.write(
                source.name(index), Path(source.name(index)).relative_to(source.full_path)
            )
    zip_source = open_source(
        DataConfig(root=str(tmp_path / "data.zip"), cache_dir=str(tmp_path)), "train"
    )
    zip_source.read(0)  # the archive is open in this process, and each worker has to open it anew
    assert digests(make_loader(zip_source, 2), 0, 10) == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_make_up_the_global_batch(world_size, source, expected):
    iterators = [
        make_loader(source, rank=rank, world_size=world_size).iterate_from(0)
        for rank in range(world_size)
    ]
    for step in range(5):
        local_batches = [next(iterator) for iterator in iterators]
        assert digest(concatenate(local_batches)) == expected[step]


@pytest.mark.parametrize("first", [1, 4, 6])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_batches_equal_uninterrupted_ones(first, num_workers, source, expected):
    assert digests(make_loader(source, num_workers), first, 10 - first) == expected[first:]


def test_a_second_iterator_uses_the_same_workers(source, expected):
    with make_loader(source, 2) as batches:
        next(batches.iterate_from(0))
        pids = list_child_pids()
        assert [
            digest(batch) for batch in itertools.islice(batches.iterate_from(3), 3)
        ] == expected[3:6]
        assert list_child_pids() == pids


def test_batches_differ_between_steps_epochs_and_seeds(source, expected):
    assert len({*expected, *digests(make_loader(source, seed=4), 0, 10)}) == 20


def test_chunks_do_not_change_a_batch(source):
    options = {"global_batch_size": 50}
    expected = digests(make_loader(source, **options), 0, 2)
    assert digests(make_loader(source, 2, **options), 0, 2) == expected  # chunks of 25
    assert digests(make_loader(source, 3, **options), 0, 2) == expected  # 17, 17 and 16


def test_the_trainers_random_state_does_not_change(source):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    digests(make_loader(source, 1), 0, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_build_follows_the_config(tmp_path, expected):
    config = write_images(tmp_path / "data", 50)
    config.num_workers = 0
    batches = build(config, VIEWS, seed=3, global_batch_size=12, device="cpu")
    assert (batches.steps_per_epoch, len(batches.source), batches.num_replaced) == (4, 50, 0)
    assert digests(batches, 0, 10) == expected


def test_digits_need_no_worker():
    views = ViewsConfig(crops={"global": Crop(size=8)})
    with build(
        DataConfig("digits", num_workers=0), views, seed=0, global_batch_size=256, device="cpu"
    ) as batches:
        indices = torch.cat(
            [
                batch.indices
                for batch in itertools.islice(batches.iterate_from(0), batches.steps_per_epoch)
            ]
        )
    assert len(indices.unique()) == 5 * 256


def test_slices_of_a_batch_are_equal_and_complete(source):
    batch = next(make_loader(source).iterate_from(0))
    slices = [batch.slice(number, 3) for number in range(3)]
    assert [len(batch_slice) for batch_slice in slices] == [4, 4, 4]
    for name in ("labels", "indices"):
        assert torch.equal(
            torch.cat([getattr(batch_slice, name) for batch_slice in slices]), getattr(batch, name)
        )
    for number, view in enumerate(batch.views):
        assert torch.equal(torch.cat([batch_slice.views[number] for batch_slice in slices]), view)
    with pytest.raises(ValueError) as caught:
        batch.slice(0, 5)
    assert str(caught.value) == "a batch of 12 images does not divide into 5 equal slices"


class WithUnreadableImages:
    """Images 3, 4 and the last cannot be read."""

    @pytest.fixture
    def source(self, tmp_path):
        source = open_source(write_images(tmp_path / "data", 24), "train")
        for index in (3, 4):
            Path(source.name(index)).write_bytes(b"")
        Path(source.name(23)).unlink()
        return source


class TestUnreadable(WithUnreadableImages):
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_image_outside_the_batch_replaces_an_unreadable_one(self, num_workers, source):
        views_config = ViewsConfig(crops={"global": Crop(count=1, size=6)})
        options = {"seed": 0, "global_batch_size": 8, "max_replaced": 1.0}
        with make_loader(source, num_workers, views_config, **options) as batches:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                steps = list(itertools.islice(batches.iterate_from(0), 6))
            assert batches.num_replaced == 6  # three images, in each of two epochs
        messages = [
            str(warning.message) for warning in caught if "takes its place" in str(warning.message)
        ]
        assert len(messages) == 3  # one per image
        assert any(
            message.startswith(f"{source.name(3)}: the file is empty; ") for message in messages
        )
        assert any(
            message.startswith(f"{source.name(23)}: No such file or directory; ")
            for message in messages
        )
        for step, batch in enumerate(steps):
            numbers = [
                find_shown_image(source, views_config.crops["global"], step // 3, batch, row)
                for row in range(8)
            ]
            assert len(set(numbers)) == 8 and not set(numbers) & {3, 4, 23}
            indices = batch.indices.tolist()
            assert all(
                number == index or number not in indices for number, index in zip(numbers, indices)
            )
            assert batch.labels.tolist() == [source.label(number) for number in numbers]

    def test_replacement_does_not_depend_on_workers_or_ranks(self, source):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = list(
                itertools.islice(make_loader(source, max_replaced=1.0).iterate_from(0), 4)
            )
            assert [digest(batch) for batch in expected] == digests(
                make_loader(source, 2, max_replaced=1.0), 0, 4
            )
            iterators = [
                itertools.islice(
                    make_loader(source, rank=rank, world_size=3, max_replaced=1.0).iterate_from(0),
                    4,
                )
                for rank in range(3)
            ]
            for batch, *local_batches in zip(expected, *iterators):
                assert all(
                    torch.equal(
                        torch.cat([local.views[view] for local in local_batches]), batch.views[view]
                    )
                    for view in range(3)
                )

    def test_a_batch_of_all_images_leaves_no_replacement(self, source):
        batches = make_loader(source, global_batch_size=24, max_replaced=1.0)
        with batches, warnings.catch_warnings(), pytest.raises(ValueError) as caught:
            warnings.simplefilter("ignore")
            next(batches.iterate_from(0))
        assert "no other readable image of the 24" in str(
            caught.value
        ) and "give a smaller global_batch_size" in str(caught.value)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_more_replacements_than_the_limit_stop_the_run(self, num_workers, source):
        with (
            make_loader(source, num_workers) as batches,
            warnings.catch_warnings(),
            pytest.raises(ValueError) as caught,
        ):
            warnings.simplefilter("ignore")
            list(itertools.islice(batches.iterate_from(0), 2))
        # The number at the error depends on the chunk size.
        message = re.sub("^data.max_replaced: 3", "data.max_replaced: 2", str(caught.value))
        assert message.startswith(
            f"data.max_replaced: 2 of 24 images of {source.full_path} could not be read in one "
            "pass, more than the 1 that may be replaced (0.01 of the images); the last: "
        )
        assert message.endswith(
            "; restore the files, remove them from the data set, or raise data.max_replaced"
        )

    def test_replacements_within_the_limit_do_not_stop_the_run(self, source):
        with make_loader(source, max_replaced=0.13) as batches, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            list(itertools.islice(batches.iterate_from(0), 8))  # three of 24 in each of four epochs
        assert batches.num_replaced == 12

    def test_no_image_may_be_replaced_if_max_replaced_is_zero(self, source):
        for index in (3, 4):
            Path(source.name(index)).write_bytes(Path(source.name(5)).read_bytes())
        with (
            make_loader(source, max_replaced=0.0) as batches,
            warnings.catch_warnings(),
            pytest.raises(ValueError) as caught,
        ):
            warnings.simplefilter("ignore")
            list(itertools.islice(batches.iterate_from(0), 2))
        assert "more than the 0 that may be replaced" in str(caught.value)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_no_readable_image_is_an_error(self, num_workers, source):
        for index in range(23):
            Path(source.name(index)).write_bytes(b"")
        with (
            make_loader(source, num_workers, max_replaced=1.0) as batches,
            pytest.raises(ValueError) as caught,
        ):
            next(batches.iterate_from(0))
        assert (
            f"no other readable image of the 24 in {source.full_path} is left outside its batch"
            in str(caught.value)
        )

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_folder_that_disappears_is_named(self, num_workers, source):
        with make_loader(source, num_workers) as batches:
            os.rename(source.full_path, f"{source.full_path}.gone")
            with pytest.raises(
                FileNotFoundError,
                match=re.escape(
                    f"data.root: {source.full_path} no longer exists, but existed when the "
                    "run began"
                ),
            ):
                for _ in batches.iterate_from(0):
                    pass


def find_shown_image(source: Source, crop: Crop, epoch: int, batch: Batch, row: int) -> int:
    """Return the number of the image that a row shows, found by comparing all images' views."""
    index = int(batch.indices[row])
    for number in range(len(source)):
        try:
            image = torch.from_numpy(source.read(number)).permute(2, 0, 1)
        except UnreadableImage:
            continue
        view = crops.apply(image, crops.draw_box(crop, 0, epoch, index, 0, *image.shape[1:]), crop)
        if torch.equal((batch.views[0][row] * 255).round().to(torch.uint8), view):
            return number
    raise AssertionError("the row shows no image of the source")


class FailingSource(Source):
    """A source of 8 gray images. Image 5 raises an unexpected error."""

    def __init__(self):
        super().__init__("nowhere", np.zeros(8), ["a"])

    def read(self, index):
        if index == 5:
            raise KeyError("a mistake in the code")
        return np.full((4, 4, 3), index, np.uint8)

    def name(self, index):
        return f"image_{index}.png"

    def check_present(self):
        pass

    def _identity(self):
        return b"failing"


class TestFailures:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_error_names_the_image(self, num_workers):
        start = time.monotonic()
        with (
            make_loader(FailingSource(), num_workers, global_batch_size=8) as batches,
            pytest.raises(RuntimeError) as caught,
        ):
            next(batches.iterate_from(0))
        assert "image 5, image_5.png: KeyError: 'a mistake in the code'" in str(caught.value)
        assert time.monotonic() - start < 60

    def test_a_killed_worker_raises_an_error(self, source):
        with make_loader(source, 2) as batches:
            steps = batches.iterate_from(0)
            next(steps)
            os.kill(min(list_child_pids()), signal.SIGKILL)
            with pytest.raises(workers.LostWorkerError) as caught:
                for _ in range(100):
                    next(steps)
        assert re.fullmatch(
            r"data\.num_workers: a process that reads images was killed( by SIGKILL)?, which "
            "happens when memory runs out; give the job more memory or lower data.num_workers, "
            "then repeat the command",
            str(caught.value),
        )

    @pytest.mark.full
    def test_workers_outlive_the_signals_that_stop_a_run(self):
        """Train in a separate process, because the forkserver of this one may obey signals."""
        pipe = subprocess.PIPE
        trainer = subprocess.Popen(
            [sys.executable, "-c", SIGNALED_TRAINER],
            stdin=pipe,
            stdout=pipe,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert trainer.stdout is not None and trainer.stdin is not None
        pids = trainer.stdout.readline().split()
        assert len(pids) == 3
        for name in ("TERM", "INT", "USR1", "USR2"):
            # Another process sends it, because workers obey signals from the trainer.
            subprocess.run(["kill", f"-{name}", *pids], check=True)
        time.sleep(1.5)
        output, _ = trainer.communicate("go on\n", timeout=120)
        views = ViewsConfig(crops={"global": Crop(size=8)})
        with build(
            DataConfig("digits", num_workers=0), views, seed=0, global_batch_size=32, device="cpu"
        ) as batches:
            expected = [
                batch.views[0].sum().item()
                for batch in itertools.islice(batches.iterate_from(0), 40)
            ]
        assert trainer.returncode == 0 and [float(word) for word in output.split()] == expected

    def test_a_worker_killed_while_sending_raises_the_same_error(self):
        def lose_connection():
            yield "a chunk"
            raise ConnectionResetError

        chunks = workers.raise_worker_errors(lose_connection())
        assert next(chunks) == "a chunk"
        with pytest.raises(
            workers.LostWorkerError,
            match=r"^data.num_workers: a process that reads images was killed, which",
        ):
            next(chunks)


class TestProcesses:
    def test_close_leaves_no_process(self, source):
        batches = make_loader(source, 2)
        next(batches.iterate_from(0))
        pids = list_child_pids()
        threads = threading.active_count()
        assert len(pids) == 2
        batches.close()
        batches.close()
        assert not list_child_pids() and not any(is_alive(pid) for pid in pids)
        assert threading.active_count() <= threads

    def test_a_dropped_loader_leaves_no_process(self, source):
        batches = make_loader(source, 1)
        next(batches.iterate_from(0))
        del batches
        gc.collect()
        assert not list_child_pids()

    @pytest.mark.parametrize(
        "end", ["killed", pytest.param("ended without closing", marks=pytest.mark.full)]
    )
    def test_a_trainer_that_ended_leaves_no_process(self, end):
        root = Path(__file__).parents[2]
        pipe = subprocess.PIPE
        trainer = subprocess.Popen(
            [sys.executable, "-c", TRAINER], stdin=pipe, stdout=pipe, text=True, cwd=root
        )
        assert trainer.stdout is not None and trainer.stdin is not None
        pids = [int(word) for word in trainer.stdout.readline().split()]
        assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
        if end == "killed":
            trainer.kill()
        trainer.stdin.close()
        trainer.wait(60)
        deadline = time.monotonic() + 20
        while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(is_alive(pid) for pid in pids)

    def test_workers_compute_on_one_thread(self):
        with make_loader(ThreadCountSource(), 1, global_batch_size=4) as batches:
            assert next(batches.iterate_from(0)).labels.tolist() == [1] * 4


class ThreadCountSource(FailingSource):
    def read(self, index):
        return np.zeros((4, 4, 3), np.uint8)

    def label(self, index):
        return torch.get_num_threads()


TRAINER = """
import multiprocessing, sys, time
from ssl_pretrain.data.loader import build
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.views.recipe import Crop, ViewsConfig
if __name__ == "__main__":
    views = ViewsConfig(crops={"global": Crop(size=8)})
    data = DataConfig("digits", num_workers=2)
    batches = build(data, views, seed=0, global_batch_size=32, device="cpu")
    next(batches.iterate_from(0))
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""

SIGNALED_TRAINER = """
import itertools, multiprocessing, sys
from multiprocessing import forkserver
from ssl_pretrain.data.loader import build
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.views.recipe import Crop, ViewsConfig
if __name__ == "__main__":
    views = ViewsConfig(crops={"global": Crop(size=8)})
    data = DataConfig("digits", num_workers=2)
    with build(data, views, seed=0, global_batch_size=32, device="cpu") as batches:
        steps = batches.iterate_from(0)
        first = next(steps)
        workers = [child.pid for child in multiprocessing.active_children()]
        print(forkserver._forkserver._forkserver_pid, *workers, flush=True)
        sys.stdin.readline()
        first_40 = [first, *itertools.islice(steps, 39)]
        print(*(batch.views[0].sum().item() for batch in first_40), flush=True)
"""


def list_child_pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class TestReadImages:
    """One pass in order, as in evaluations."""

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_each_image_is_read_once_in_order(self, num_workers, source):
        batches = list(
            read_images(
                source,
                None,
                partial(crops.evaluation_view, size=8),
                batch_size=16,
                num_workers=num_workers,
            )
        )
        assert [tuple(pixels.shape) for pixels, _ in batches] == [(16, 3, 8, 8)] * 3 + [
            (2, 3, 8, 8)
        ]
        assert torch.cat([labels for _, labels in batches]).tolist() == source.labels.tolist()
        expected = [
            crops.evaluation_view(torch.from_numpy(source.read(index)).permute(2, 0, 1), size=8)
            for index in range(len(source))
        ]
        pixels = torch.cat([pixels for pixels, _ in batches])
        assert pixels.dtype == torch.uint8 and torch.equal(pixels, torch.stack(expected))
        assert not list_child_pids()

    def test_indices_choose_the_images(self, source):
        ((_, labels),) = read_images(
            source, [7, 3, 7], partial(crops.evaluation_view, size=8), batch_size=16, num_workers=0
        )
        assert labels.tolist() == [source.label(7), source.label(3), source.label(7)]

    def test_an_early_exit_leaves_no_process(self, source):
        batches = read_images(
            source, None, partial(crops.evaluation_view, size=8), batch_size=4, num_workers=2
        )
        next(batches)
        batches.close()
        assert not list_child_pids()

    def test_no_images_give_no_batches(self, source):
        assert (
            list(
                read_images(
                    source, [], partial(crops.evaluation_view, size=8), batch_size=4, num_workers=2
                )
            )
            == []
        )


class TestUnreadableInEvaluation(WithUnreadableImages):
    def test_an_unreadable_image_and_its_label_are_replaced(self, source):
        with pytest.warns(UserWarning, match="the file is empty; .* takes its place"):
            ((_, labels),) = read_images(
                source, [2, 3], partial(crops.evaluation_view, size=8), batch_size=4, num_workers=0
            )
        assert labels.tolist() == [source.label(2), source.label(5)]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_more_replacements_than_the_limit_end_the_pass(self, num_workers, source):
        batches = read_images(source, None, partial(crops.evaluation_view, size=8), 4, num_workers)
        with warnings.catch_warnings(), pytest.raises(ValueError) as caught:
            warnings.simplefilter("ignore")
            list(batches)
        assert f" of 24 images of {source.full_path} could not be read in one pass" in str(
            caught.value
        )


class TestMessages:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"global_batch_size": 64},
                "global_batch_size: 64 is more than the 50 images of the data set; give at most 50",
            ),
            (
                {"world_size": 5},
                "global_batch_size: 12 does not divide evenly over 5 ranks; give 10 or 15",
            ),
        ],
    )
    def test_batch_sizes_that_do_not_fit_are_refused(self, options, message, source):
        with pytest.raises(ValueError) as caught:
            make_loader(source, **options)
        assert str(caught.value) == message

    def test_views_without_crops_are_refused(self, source):
        with pytest.raises(ValueError, match=r"views\.crops"):
            make_loader(source, views=ViewsConfig())


def test_the_hint_to_write_a_beton_is_given_for_large_data_sets_only(capsys, monkeypatch):
    def messages():
        config = DataConfig("digits", num_workers=0)
        build(config, VIEWS, seed=0, global_batch_size=32, device="cpu").close()
        return capsys.readouterr().err

    assert "data: training" in messages() and "data.loader" not in messages()
    monkeypatch.setattr(loader, "MIN_IMAGES_OF_LOADER_HINT", 1297)
    assert "data.beton write creates one, which is read faster" in messages()
