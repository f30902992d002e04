"""The command `embed`: the same features as by hand, in every format, and after any kill."""

import json
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_ranks
from PIL import Image
from untrained_run import load_in_float32, make_run, write_images

import ssl_pretrain
from ssl_pretrain.eval import embed, export
from ssl_pretrain.eval.embedding import (
    embedding_file,
    embedding_job,
    embedding_network,
    progress_line,
)
from ssl_pretrain.eval.embedding.progress_line import ProgressLine
from ssl_pretrain.eval.embedding.weights_digest import digest_of_network, digest_of_tensors

NAMES = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(5)]
SETTINGS = ["--device=cpu", "--batch-size=1", "parallel.precision=float32"]  # blocks of 4 images


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return make_run(folder, "backbone.name=test_vit", "data.subset=200")


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", NAMES)


def embed_images(run_folder, images, out, *arguments):
    embed.main([str(run_folder), str(images), str(out), *SETTINGS, *arguments])
    return embedding_file.read(out)


def features_by_hand(run_folder, images, names=NAMES):
    backbone, transform = ssl_pretrain.load_backbone(
        run_folder, device="cpu", parallel__precision="float32"
    )
    with torch.no_grad():
        features = [backbone(transform(images / name)[None]) for name in names]
    return torch.cat(features).numpy()


@pytest.mark.parametrize("suffix", embedding_file.SUFFIXES)
def test_features_are_those_of_load_backbone_in_every_format(run_folder, images, tmp_path, suffix):
    embeddings = embed_images(run_folder, images, tmp_path / f"out{suffix}")
    np.testing.assert_array_equal(embeddings.vectors, features_by_hand(run_folder, images))
    entries = embeddings.entries
    assert entries.names == [str(images / name) for name in NAMES]
    assert entries.labels.tolist() == 5 * [0] + 5 * [1]
    assert entries.classes == ["cat", "dog"]
    run = load_in_float32(run_folder)
    expected = {
        "network": "test_vit",
        "weights_sha256": digest_of_network(run.backbone),
        "feature": "pooled",
        "precision": "float32",
        "count": 10,
        "unreadable": {},
    }
    assert expected.items() <= entries.metadata.items()
    assert entries.metadata["transform"]["size"] == run.image_size
    assert embedding_file.read_metadata(tmp_path / f"out{suffix}") == entries.metadata
    assert not (tmp_path / f"out{suffix}.job").exists()


@pytest.mark.parametrize("feature", ["prefix", "patch_mean", "cls_mean", "last2", "patches"])
def test_a_named_feature_is_written_and_the_python_api_gives_the_same(
    run_folder, images, tmp_path, feature
):
    vectors = embed_images(run_folder, images, tmp_path / "o.npy", "--feature", feature).vectors
    backbone, _ = ssl_pretrain.load_backbone(
        run_folder, device="cpu", parallel__precision="float32"
    )
    expected = ssl_pretrain.embed(backbone, images, feature=feature, batch_size=1)
    np.testing.assert_array_equal(vectors, expected)
    assert vectors.ndim == (3 if feature == "patches" else 2)


def test_an_unreadable_image_is_named_and_has_no_features_of_another_image(
    run_folder, images, tmp_path, capsys
):
    expected = features_by_hand(run_folder, images)
    (images / "cat/3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    embeddings = embed_images(run_folder, images, tmp_path / "out.npz", "data.max_replaced=0.1")
    assert np.isnan(embeddings.vectors[3]).all()
    others = np.arange(10) != 3
    np.testing.assert_array_equal(embeddings.vectors[others], expected[others])
    name = str(images / "cat/3.png")
    assert list(embeddings.entries.metadata["unreadable"]) == [name]
    assert f"unreadable, its features are NaN: {name}: " in capsys.readouterr().err
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        features = ssl_pretrain.embed(run_folder, images)
    assert np.isnan(features[3]).all() and np.isfinite(features[others]).all()
    assert any(str(each.message).endswith("; its features are NaN") for each in caught)


def test_more_unreadable_images_than_allowed_end_the_command(run_folder, images, tmp_path):
    for number in range(3):
        (images / f"cat/{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError) as error:
        embed_images(run_folder, images, tmp_path / "out.npz")
    assert str(error.value).startswith("data.max_replaced: 2 of 10 images of ")


def test_the_limit_of_unreadable_images_is_that_of_the_whole_data_set_after_a_kill(
    run_folder, images, tmp_path, monkeypatch
):
    for name in ("dog/3.png", "dog/4.png"):  # both of the third and last block
        (images / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    whole = embed_images(run_folder, images, tmp_path / "whole.npz", "data.max_replaced=0.2")
    stop_after_blocks(monkeypatch, 2)
    with pytest.raises(SystemExit):
        embed_images(run_folder, images, tmp_path / "out.npz", "data.max_replaced=0.2")
    monkeypatch.undo()
    continued = embed_images(run_folder, images, tmp_path / "out.npz", "data.max_replaced=0.2")
    assert continued.entries.metadata["unreadable"] == whole.entries.metadata["unreadable"]


def test_the_unreadable_images_of_all_blocks_are_counted_together(
    run_folder, images, tmp_path, monkeypatch
):
    out = tmp_path / "out.npz"
    for name in ("cat/0.png", "dog/4.png"):  # of the first and of the last block
        (images / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    stop_after_blocks(monkeypatch, 2)
    with pytest.raises(SystemExit):
        embed_images(run_folder, images, out, "data.max_replaced=0.1")
    monkeypatch.undo()
    with pytest.raises(ValueError) as error:
        embed_images(run_folder, images, out, "data.max_replaced=0.1")
    assert str(error.value).startswith("data.max_replaced: 2 of 10 images of ")
    assert not out.exists()
    embed_images(run_folder, images, out, "data.max_replaced=0.2")


def stop_after_blocks(monkeypatch, number):
    """Let a command stop after it wrote some blocks, as Ctrl-C does."""
    write_block = embedding_job.EmbeddingJob._write_block

    def stop(job, block, *arguments):
        write_block(job, block, *arguments)
        if block == number - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(embedding_job.EmbeddingJob, "_write_block", stop)


def fork(function):
    """Run a function in a fork of this process and return its wait status."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    try:
        function()
        os._exit(0)
    except BaseException:
        os._exit(1)


def die_at_the_first_rename(folder, is_after):
    """Let this process kill itself right before or right after it renames a file in a folder."""
    rename = os.replace

    def replace(source, target):
        is_watched = folder in Path(target).parents
        if is_after or not is_watched:
            rename(source, target)
        if is_watched:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def kill_at_every_rename(run_folder, images, out):
    """Write a file with commands that are killed before and after every rename.

    Return the files of the job after each kill.
    """
    network = embedding_network.open_network(run_folder, SETTINGS[2:], "cpu")
    source, _ = embedding_network.open_images(images, network.transform.pixel_format)
    extractor, provenance = network.extractor("pooled"), network.provenance("pooled")

    def write(is_after=None):
        if is_after is not None:
            die_at_the_first_rename(out.parent, is_after)
        options = embedding_job.JobOptions(batch_size=1)
        embedding_job.embed_to_file(extractor, source, out, provenance, options)

    job_files = []
    for is_after in 5 * (False, True):  # job.json, three blocks, and the file itself
        assert not out.exists()
        assert fork(lambda is_after=is_after: write(is_after)) == signal.SIGKILL
        job_files.append(sorted(os.listdir(f"{out}.job")))
    assert out.exists()
    assert fork(write) == 0
    return job_files


def test_a_killed_command_continues_and_writes_the_same_bytes(run_folder, images, tmp_path):
    embed_images(run_folder, images, tmp_path / "whole.npz")
    folder = tmp_path / "killed"
    folder.mkdir()
    (job_files,) = run_ranks(
        kill_at_every_rename, run_folder, images, folder / "out.npz", world_size=1
    )
    assert job_files[0] == [".job.json.part"]
    assert job_files[4] == [".block_000001.npz.part", "block_000000.npz", "job.json"]
    assert os.listdir(folder) == ["out.npz"]
    assert (folder / "out.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_finished_blocks_are_not_computed_again(run_folder, images, tmp_path, capsys, monkeypatch):
    out, calls = tmp_path / "out.npz", []
    whole = embed_images(run_folder, images, tmp_path / "whole.npz")
    write_block = embedding_job.EmbeddingJob._write_block
    stop_after_blocks(monkeypatch, 2)
    with pytest.raises(SystemExit) as status:
        embed_images(run_folder, images, out)
    assert status.value.code == 130
    assert "stopped; the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(
        embedding_job.EmbeddingJob,
        "_write_block",
        lambda job, block, *arguments: (calls.append(block), write_block(job, block, *arguments)),
    )
    continued = embed_images(run_folder, images, out)
    assert calls == [2]
    assert f"{out}.job: continues after 8 of 10 images" in capsys.readouterr().err
    np.testing.assert_array_equal(continued.vectors, whole.vectors)


def interrupt_job(run_folder, images, out, *arguments):
    """Leave a job with one finished block."""
    embed_images(run_folder, images, out, *arguments)
    content = {
        "metadata": embedding_file.read_metadata(out),
        "block_images": 4,
    }
    out.unlink()
    folder = out.with_name(f"{out.name}.job")
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(content))
    return folder


def test_a_job_is_not_continued_with_other_features_or_images(run_folder, images, tmp_path):
    out = tmp_path / "out.npz"
    folder = interrupt_job(run_folder, images, out, "--feature=patch_mean")
    with pytest.raises(ValueError) as error:
        embed_images(run_folder, images, out)
    assert str(error.value) == (
        f"{folder}: is an unfinished job with other vectors (feature: patch_mean in the file,"
        " pooled in this command); give what it was started with, another OUT, or --overwrite to"
        " start again"
    )
    Image.new("RGB", (12, 12)).save(images / "cat/0.png")
    with pytest.raises(ValueError, match=r"\(images: \w{12} in the file, \w{12} in this command"):
        embed_images(run_folder, images, out, "--feature=patch_mean")
    embed_images(run_folder, images, out, "--overwrite")
    assert not folder.exists()


def test_a_job_is_not_continued_with_other_weights(run_folder, images, tmp_path):
    folder = interrupt_job(run_folder, images, tmp_path / "out.npz")
    other = make_run(tmp_path / "other", "backbone.name=test_vit", weights_seed=2)
    digests = [digest_of_network(load_in_float32(run).backbone) for run in (run_folder, other)]
    with pytest.raises(ValueError) as error:
        embed_images(other, images, tmp_path / "out.npz")
    assert str(error.value) == (
        f"{folder}: is an unfinished job with other vectors (weights: {digests[0][:12]} in the"
        f" file, {digests[1][:12]} in this command); give what it was started with, another OUT, or"
        " --overwrite to start again"
    )


def test_a_finished_file_is_kept_and_only_replaced_on_request(run_folder, images, tmp_path, capsys):
    out = tmp_path / "out.npz"
    embed_images(run_folder, images, out)
    content = out.read_bytes()
    embed_images(run_folder, images, out)
    assert f"{out}: is complete, nothing to do" in capsys.readouterr().err
    with pytest.raises(ValueError) as error:
        embed_images(run_folder, images, out, "--dtype=float16")
    assert str(error.value) == (
        f"OUT: {out} exists with other vectors (dtype: float32 in the file, float16 in this"
        " command); give another name, or --overwrite to replace it"
    )
    assert out.read_bytes() == content
    embedded = embed_images(run_folder, images, out, "--dtype=float16", "--overwrite")
    assert embedded.vectors.dtype == np.float16


def test_blocks_that_another_process_computes_survive_a_command_that_finds_the_file_complete(
    run_folder, images, tmp_path
):
    out = tmp_path / "out.npz"
    embed_images(run_folder, images, out)
    flock = embedding_job.FolderFlock(tmp_path / "out.npz.job")
    flock.folder.mkdir()
    assert flock.try_take()  # as a process with --overwrite does
    embed_images(run_folder, images, out)
    assert flock.folder.exists()
    flock.release()
    embed_images(run_folder, images, out)
    assert not flock.folder.exists()


def test_names_that_an_npz_stores_at_the_longest_ones_width_are_refused(
    run_folder, images, tmp_path, monkeypatch
):
    longest = len(str(images / NAMES[0]))
    monkeypatch.setattr(embedding_file, "MAX_NPZ_CHARACTERS", 10 * longest - 1)
    with pytest.raises(ValueError) as error:
        embed_images(run_folder, images, tmp_path / "out.npz")
    assert str(error.value) == (
        f"OUT: {tmp_path / 'out.npz'} would store 10 names with the {longest} characters of the"
        " longest one each; give OUT as .parquet"
    )
    assert not (tmp_path / "out.npz.job").exists()
    embed_images(run_folder, images, tmp_path / "out.parquet")


def test_features_that_the_network_could_not_compute_are_named(
    run_folder, images, tmp_path, monkeypatch, capsys
):
    call = embedding_job.FeatureExtractor.__call__
    black = images / "dog/1.png"
    Image.new("RGB", (12, 12)).save(black)

    def overflow(extractor, pixels):
        features = call(extractor, pixels)
        features[(pixels == 0).flatten(1).all(dim=1)] = torch.inf
        return features

    monkeypatch.setattr(embedding_job.FeatureExtractor, "__call__", overflow)
    (images / "cat/3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    embeddings = embed_images(run_folder, images, tmp_path / "out.npz", "data.max_replaced=0.1")
    assert embeddings.entries.metadata["not_finite"] == [str(black)]
    assert (
        "not finite: the network computed NaN or infinite features of 1 readable images, such as"
        f" {black}"
    ) in capsys.readouterr().err


def test_two_processes_do_not_write_the_same_file(run_folder, images, tmp_path):
    folder = interrupt_job(run_folder, images, tmp_path / "out.npz")
    flock = embedding_job.FolderFlock(folder)
    assert flock.try_take()
    with pytest.raises(ValueError) as error:
        embed_images(run_folder, images, tmp_path / "out.npz")
    flock.release()
    assert str(error.value) == (
        f"OUT: another process is writing {tmp_path / 'out.npz'}; wait until it ends, or give"
        " another name"
    )


def test_a_name_without_a_known_ending_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError) as error:
        embed.main(["no run", "no images", str(tmp_path / "out.csv")])
    assert str(error.value) == (
        f"OUT: {tmp_path / 'out.csv'} ends in none of .npz, .npy, .parquet, .safetensors; give a"
        " name that does, such as features.npz"
    )


def test_numbers_that_float16_cannot_hold_are_refused(run_folder, images, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_job, "MAX_FLOAT16", 1e-3)
    with pytest.raises(ValueError, match=r"--dtype float16: .*0\.png has a feature of .*; give"):
        embed_images(run_folder, images, tmp_path / "out.npz", "--dtype=float16")


def test_an_export_gives_the_features_and_the_digest_of_its_run(run_folder, images, tmp_path):
    export.export(load_in_float32(run_folder), tmp_path / "export", [], force=True)
    from_run = embed_images(run_folder, images, tmp_path / "run.npz")
    from_export = embed_images(tmp_path / "export", images, tmp_path / "export.npz")
    np.testing.assert_allclose(from_export.vectors, from_run.vectors, atol=1e-6)
    for key in ("weights_sha256", "transform", "feature"):
        assert from_export.entries.metadata[key] == from_run.entries.metadata[key]


def test_the_built_in_digits_and_one_column_of_a_table_are_embedded(run_folder, tmp_path):
    digits = embed_images(run_folder, "digits", tmp_path / "o.npy", "data.subset=3")
    assert len(digits.vectors) == 3 and digits.entries.has_labels
    unlabeled = np.zeros((2, 12, 12, 3), np.uint8)
    np.savez(tmp_path / "images.npz", scan=unlabeled, other=unlabeled + 255)
    column = embed_images(
        run_folder, tmp_path / "images.npz", tmp_path / "o.npz", "data.image_column=scan"
    )
    assert len(column.vectors) == 2 and not column.entries.has_labels


def embed_on_a_rank(run_folder, images, out):
    embed.main([str(run_folder), str(images), str(out), *SETTINGS[1:]])


@pytest.mark.full
def test_ranks_write_the_bytes_of_one_process(run_folder, images, tmp_path):
    embed_images(run_folder, images, tmp_path / "one.npz")
    run_ranks(embed_on_a_rank, run_folder, images, tmp_path / "three.npz", world_size=3)
    assert (tmp_path / "three.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def embed_on_a_late_rank(run_folder, images, out):
    """Let rank 1 look for missing blocks only after rank 0 has written one."""
    is_finished = embedding_job.EmbeddingJob._is_finished

    def look_late(job, block):
        deadline = time.monotonic() + 20
        while not job._path(0).is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        return is_finished(job, block)

    if torch.distributed.get_rank() == 1:
        embedding_job.EmbeddingJob._is_finished = look_late
    embed_on_a_rank(run_folder, images, out)


def test_a_late_rank_computes_its_share_of_the_same_blocks(run_folder, images, tmp_path):
    embed_images(run_folder, images, tmp_path / "one.npz")
    run_ranks(embed_on_a_late_rank, run_folder, images, tmp_path / "two.npz", world_size=2)
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_the_progress_line_has_the_speed_and_the_time_left(monkeypatch, capsys):
    seconds = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: next(seconds))
    line = ProgressLine(1000, num_done=200)
    line.add(400)
    line.add(200)
    # The average speed gives the newer batch, at 100 images/s, a weight of 0.1.
    assert line.text() == "800 of 1,000 images  182 images/s  ETA 0:00:01"


def test_photographs_in_a_zip_are_embedded_as_by_hand(shared_data, run_folder, tmp_path):
    archive = shared_data("imagenet_sample.zip")
    embeddings = embed_images(run_folder, archive, tmp_path / "out.npz", "data.subset=8")
    folder = tmp_path / "unpacked"
    shutil.unpack_archive(archive, folder)
    names = [os.path.relpath(name, archive) for name in embeddings.entries.names]
    expected = features_by_hand(run_folder, folder, names)
    np.testing.assert_array_equal(embeddings.vectors, expected)


def test_the_digest_accepts_a_name_with_and_without_the_prefix():
    tensors = {"model.norm.bias": torch.zeros(2), "norm.bias": torch.ones(2)}
    assert len(digest_of_tensors(tensors)) == 64
