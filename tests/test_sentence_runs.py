"""Whole runs on texts without images: their batches, their resumption, and their messages."""

import itertools
import json

import pytest
import tiny
import torch

from ssl_pretrain import build, config, replay
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.data import image_source
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.planning import inspect, plan
from ssl_pretrain.train import train

pytest.importorskip("transformers", reason="transformers is not installed")
CPU = torch.device("cpu")


def load(folder, *overrides, texts="pairs"):
    return config.load(tiny.write_sentence_config(folder, texts), list(overrides))


def read_metrics(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("texts", ["sentences", "pairs", "triplets"])
def test_a_run_on_texts_trains_and_measures_collapse(texts, tmp_path):
    run = load(tmp_path, texts=texts)
    assert train(run, CPU) == 24
    records = read_metrics(tmp_path / "run")
    losses = [record["loss"] for record in records]
    assert len(losses) == 24 and losses[-1] < losses[0]
    assert "embedding_rank" in records[1] or any("rank" in key for key in records[1])
    assert not (tmp_path / "run" / "views.png").exists()


def test_a_stopped_run_continues_bit_for_bit(tmp_path):
    whole, stopped = load(tmp_path / "whole"), load(tmp_path / "stopped")
    train(whole, CPU, stop_after=8)
    for step in (3, 8):
        assert train(stopped, CPU, stop_after=step if step == 3 else 5) == step
    states = [
        read_checkpoint(tmp_path / name / "run" / "checkpoints" / "step_00000008")[1]
        for name in ("whole", "stopped")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_workers_yield_the_same_batches_as_the_trainer(tmp_path):
    batches = []
    for num_workers in (0, 2):
        run = load(tmp_path, f"data.num_workers={num_workers}", texts="triplets")
        with build.build_loader(run, Execution.resolve(run.parallel, CPU)) as loader:
            batches.append(list(itertools.islice(loader.iterate_from(1), 4)))
    for ours, expected in zip(*batches):
        assert ours.views == [] and len(ours) == 24 and len(ours.texts) == 3
        assert torch.equal(ours.indices, expected.indices)
        for text, expected_text in zip(ours.texts, expected.texts):
            assert torch.equal(text.ids, expected_text.ids)
            assert torch.equal(text.valid, expected_text.valid)


def test_captions_are_read_without_their_images(tmp_path, monkeypatch):
    root = tiny.write_images(tmp_path / "images")
    files = sorted(path.relative_to(root / "train") for path in (root / "train").rglob("*.png"))
    rows = [f"{path},a picture of number {number}" for number, path in enumerate(files)]
    table = root / "train" / "captions.csv"
    table.write_text("\n".join(["path,caption", *rows]) + "\n")
    run = load(tmp_path, "data.source=folder", f"data.root={table}", texts="sentences")
    monkeypatch.setattr(image_source.ImageFiles, "read", None)
    assert train(run, CPU, stop_after=2) == 2


def test_a_step_is_replayed(tmp_path):
    run = load(tmp_path)
    train(run, CPU, stop_after=3)
    train(run, CPU, stop_after=2)
    (loss,) = (line for line in replay.replay(tmp_path / "run", 4) if line.startswith("  loss"))
    assert float(loss.split()[1]) == pytest.approx(read_metrics(tmp_path / "run")[3]["loss"], 1e-5)


def test_the_plan_counts_texts_and_negatives(tmp_path):
    lines = plan.describe(load(tmp_path, "plan.gpu=H100", texts="triplets")).splitlines()
    assert "texts per item: 3 of 12 tokens; negatives per anchor: 47" in lines
    assert any(line.startswith("steps per epoch: 3 (78 items") for line in lines)
    assert any("78 groups of 3 texts" in line for line in lines)
    assert any(line.startswith("time per step:") for line in lines)


def test_a_micro_batch_is_found_by_trial(tmp_path):
    assert train(load(tmp_path, "micro_batch_size=auto"), CPU, stop_after=1) == 1


def test_inspect_shows_texts_and_names_the_recipes(tmp_path, capsys):
    path = tiny.write_texts(tmp_path / "texts.csv", 2)
    assert inspect.main([str(path), "--source", "texts"]) == 0
    output = capsys.readouterr().out
    assert "78 groups of 2 texts, no labels" in output
    assert "the recipes simcse_wiki (texts) and simcse_nli (groups of 2 or 3 texts)" in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["views.crops.global.size=32"],
            "views.crops: global would be ignored, because method simcse takes texts and no "
            "images; leave the section views out",
        ),
        (
            ["backbone.name=resnet18"],
            "backbone.name: resnet18 would be ignored, because method simcse takes texts and no "
            "images; leave it out, and set text_encoder.* for its network",
        ),
        (
            ["data.cache=device"],
            "data.cache: device reads images, and method simcse takes none; leave it out",
        ),
        (
            ["data.loader=threads"],
            "data.loader: threads reads images, and method simcse takes none; leave it out",
        ),
    ],
)
def test_settings_of_images_are_refused(overrides, message, tmp_path):
    with pytest.raises(config.ConfigError) as error:
        config.check(load(tmp_path, *overrides), world_size=1)
    assert str(error.value) == message


def test_texts_are_refused_by_a_method_of_images(tmp_path):
    path = tiny.write_config(tmp_path)
    overrides = ["data.source=wordnet", "data.root=''"]
    with pytest.raises(config.ConfigError) as error:
        config.check(config.load(path, overrides), world_size=1)
    assert str(error.value) == (
        "data.source: wordnet has texts and no images, and method simclr takes images; give a "
        "source of images, or set method.name=simcse"
    )


@pytest.mark.parametrize("begin", [lambda run: train(run, CPU), plan.describe])
def test_another_number_of_texts_is_refused_before_the_first_step(begin, tmp_path):
    run = load(tmp_path, "method.texts=triplets")
    with pytest.raises(ValueError) as error:
        begin(run)
    assert str(error.value) == (
        f"data.text_columns: {tmp_path / 'texts.csv'} has 2 texts per item, and method simcse "
        "takes 3; name as many columns as it takes"
    )
