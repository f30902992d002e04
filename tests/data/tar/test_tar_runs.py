"""Training processes that are stopped and killed continue on fewer ranks with the same views.

The ranks are processes that train over gloo. The loader has its shipped settings. Before each step
a rank records the digest of every image's views. The `full` tests have 60,000 images in 60 shards.
"""

import importlib.util
import random
import threading
from pathlib import Path

import pytest
from recorded_runs import RecordedRun
from servers import (
    FaultyProxy,
    S3Server,
    client_settings,
    restart_server,
    s3_server,
)
from tars import encode_jpeg, make_tar

from ssl_pretrain.system.exit_status import STOPPED

NUM_STEPS = 15  # 3 epochs of 5 steps
OPTIONS = ("global_batch_size=12", "epochs=3", "checkpoint.every_epochs=0.4")
MANY_OPTIONS = ("global_batch_size=240", "epochs=2", "checkpoint.every_epochs=0.1")
NUM_MANY_STEPS = 500
MISSING = [name for name in ("moto", "s3fs", "flask") if importlib.util.find_spec(name) is None]
needs_store = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}, of the extras remote and dev"
)


def write_shards(folder: Path, num_images: int, num_shards: int) -> Path:
    """Write shards of labeled JPEGs, of which at most 500 differ."""
    encoded = [encode_jpeg(number, 12, 9) for number in range(min(500, num_images))]
    generator = random.Random(0)
    per_shard = num_images // num_shards
    for shard in range(num_shards):
        members = []
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            image = generator.choice(encoded)
            members += [(f"{number:06d}.jpg", image), (f"{number:06d}.cls", b"%d" % (number % 10))]
        make_tar(folder / f"train-{shard:06d}.tar", members)
    return folder


def train_undisturbed(
    root: Path, num_steps: int, batch_size: int, *options: str
) -> dict[int, list[str]]:
    """Train on one rank from local shards, and return the digests of all steps, all different."""
    run = RecordedRun(root.parent / "undisturbed", str(root), *options)
    assert run.train(1) == [0], run.output
    assert sorted(run.steps) == list(range(num_steps))
    digests = {digest for rows in run.steps.values() for digest in rows}
    assert len(digests) == batch_size * num_steps
    return run.steps


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("runs") / "shards", 60, 5)


@pytest.fixture(scope="module")
def undisturbed(shards) -> dict[int, list[str]]:
    return train_undisturbed(shards, NUM_STEPS, 12, *OPTIONS)


@pytest.mark.full
@needs_store
def test_a_run_over_a_faulty_store_continues_on_2_ranks_and_on_1(
    shards,
    undisturbed,
    s3_server,
    tmp_path,
):
    proxy = FaultyProxy(s3_server.port)
    run = RecordedRun(tmp_path / "run", s3_server.put_folder(shards, "run"), *OPTIONS)
    environment = client_settings(proxy)
    stop, kill = random.Random(1).randint(2, 4), random.Random(2).randint(6, 8)
    statuses = run.train(3, "--fake-preempt", str(stop), environment=environment)
    assert statuses == [STOPPED] * 3, run.output
    assert run.train(2, kill_at=kill, environment=environment) == [-9, -9], run.output
    assert run.num_repeated == 0
    restart = threading.Thread(target=restart_server, args=(s3_server, proxy))
    statuses = run.train(1, hold_at=kill, during_hold=restart.start, environment=environment)
    restart.join()
    assert statuses == [0], run.output
    assert run.num_repeated > 0
    assert run.steps == undisturbed
    assert all(proxy.counts.values()), proxy.counts


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("many") / "shards", 60_000, 60)


@pytest.fixture(scope="module")
def many_steps(many_shards) -> dict[int, list[str]]:
    return train_undisturbed(many_shards, NUM_MANY_STEPS, 240, *MANY_OPTIONS)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_60000_images_resume_on_3_2_and_1_ranks(many_shards, many_steps, tmp_path):
    run = RecordedRun(tmp_path / "run", str(many_shards), *MANY_OPTIONS)
    kills = sorted(random.Random(5).sample(range(40, NUM_MANY_STEPS), 4))
    for world_size, kill in zip((3, 2, 1, 3), kills):
        statuses = run.train(world_size, kill_at=kill)
        assert statuses == [-9] * world_size, run.output
    assert run.train(2, "data.loader=folder", "data.num_workers=1") == [0, 0], run.output
    assert run.num_repeated > 0
    assert run.steps == many_steps


@needs_store
@pytest.mark.full
@pytest.mark.timeout(1800)
def test_60000_images_in_a_faulty_store_resume_on_3_2_and_1_ranks(
    many_shards,
    many_steps,
    s3_server,
    tmp_path,
):
    """The first ranks request every image by its range. The others copy the shards to a cache."""
    proxy = FaultyProxy(s3_server.port)
    run = RecordedRun(tmp_path / "run", s3_server.put_folder(many_shards, "many"), *MANY_OPTIONS)
    environment = client_settings(proxy)
    hold, stop, kill = sorted(random.Random(7).sample(range(10, 100, 10), 3))
    restart = threading.Thread(target=restart_server, args=(s3_server, proxy))
    statuses = run.train(
        3,
        *("--fake-preempt", str(stop)),
        hold_at=hold,
        during_hold=restart.start,
        environment=environment,
    )
    restart.join()
    assert statuses == [STOPPED] * 3, run.output
    assert all(proxy.counts.values()), proxy.counts
    cached = "data.remote_cache_gb=1"
    assert run.train(2, cached, kill_at=kill, environment=environment) == [-9, -9], run.output
    for path in (run.folder / "cache" / "shards").glob("*.tar"):
        path.unlink()
    statuses = run.train(1, cached, environment=environment)
    assert statuses == [0], run.output
    assert run.num_repeated > 0
    assert run.steps == many_steps
    print(hold, stop, kill, proxy.counts)
