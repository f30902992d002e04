"""A configuration is loud when wrong: every message as text."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tiny

from ssl_pretrain import config, methods
from ssl_pretrain.config import ConfigError, check, load
from ssl_pretrain.optim.optimizers import OptimConfig


@pytest.fixture
def path(tmp_path):
    written = tmp_path / "run.yaml"
    written.write_text(tiny.YAML)
    return written


def refused(path, *overrides, world_size=None) -> str:
    with pytest.raises(ConfigError) as error:
        loaded = load(path, overrides)
        check(loaded, world_size or 1)
    return str(error.value).replace(f"{path}", "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.base_lrr=1",
            f"run.yaml: optim.base_lrr: no such key. Did you mean 'base_lr'? Allowed: {', '.join(f.name for f in fields(OptimConfig))}",
        ),
        (
            "epoch=3",
            f"run.yaml: epoch: no such key. Did you mean 'epochs'? Allowed: {', '.join(f.name for f in fields(config.RunConfig))}",
        ),
        (
            "optim.name=sdg",
            f"run.yaml: optim.name: 'sdg' is not known; choose one of: {', '.join(get_args(get_type_hints(OptimConfig)['name']))}",
        ),
        (
            "optim.base_lr=fast",
            "run.yaml: optim.base_lr: 'fast' is not a number; write one such as 0.3 or 1e-6",
        ),
        (
            "epochs=many",
            "run.yaml: epochs: 'many' is not a whole number; write one in decimal digits, such as 100",
        ),
        (
            "method.name=simclrr",
            f"run.yaml: method.name: 'simclrr' is not a method; choose one of: {', '.join(methods.names())}",
        ),
        (
            "method.queue_size=3",
            "run.yaml: method.queue_size: no such key. Allowed: name, temperature, projector_dims, without_projector",
        ),
        ("optim", "'optim': an override is key=value, such as optim.base_lr=0.3"),
        (
            "log.name=${oc.env:WANDB_API_KEY}",
            "log.name: '${' is not allowed: nothing is interpolated, so that no secret of the environment enters a logged config",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(path, override, message):
    assert refused(path, override) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "epochs: 1\nseed: 2\nepochs: 3\n",
            "run.yaml: not valid YAML at line 3: found duplicate key epochs. Write each key once, as 'key: value'",
        ),
        (
            "epochs: [1\n",
            "run.yaml: not valid YAML at line 2: did not find expected ',' or ']'. Write each key once, as 'key: value'",
        ),
        ("", f"run.yaml: method.name is missing; choose one of: {', '.join(methods.names())}"),
        ("- 1\n", "run.yaml: a configuration is a mapping of keys, got a list"),
        (
            "log: {name: '${oc.env:HOME}'}\n",
            "run.yaml: '${' is not allowed: nothing is interpolated, so that no secret of the environment enters a logged config",
        ),
    ],
)
def test_a_wrong_file_is_named(path, text, message):
    path.write_text(text)
    assert refused(path) == message


def test_a_missing_file_lists_its_neighbours(path):
    with pytest.raises(ConfigError) as error:
        load(path.with_name("other.yaml"))
    assert str(error.value) == f"{path.with_name('other.yaml')}: no such file. There are: {path}"


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["global_batch_size=8192"],
            12,
            "global_batch_size: 8192 does not divide over 12 ranks; the nearest that do are 8184 and 8196",
        ),
        (
            ["global_batch_size=2"],
            4,
            "global_batch_size: 2 does not divide over 4 ranks; the nearest that does is 4",
        ),
        (
            ["micro_batch_size=most"],
            1,
            "micro_batch_size: 'most'; choose a number of images, 0 for a rank's whole share, or auto",
        ),
        (
            ["micro_batch_size=5"],
            2,
            "micro_batch_size: 5 does not divide this rank's share of 12 (global_batch_size 24 / 2 ranks)",
        ),
        (
            ["micro_batch_size=6"],
            1,
            "micro_batch_size: 6 splits batch norm's groups of 24 images, which cannot be accumulated exactly; set micro_batch_size=24, "
            "or parallel.bn_group_images=6, which departs from the recipe's global",
        ),
        (
            ["parallel.bn_group_images=7"],
            1,
            "parallel.bn_group_images: 7; choose global or a divisor of global_batch_size 24",
        ),
        (
            ["parallel.bn_group_images=node"],
            1,
            "parallel.bn_group_images: 'node'; choose global or a divisor of global_batch_size 24",
        ),
        (
            ["epochs=0"],
            1,
            "run.yaml: epochs: 0 is out of range; give a whole number >= 1 and <= 2147483647",
        ),
    ],
)
def test_keys_that_do_not_fit_each_other_are_named(path, overrides, world_size, message):
    assert refused(path, *overrides, world_size=world_size) == message


def test_values_are_typed_as_written(path):
    path.write_text(
        tiny.YAML.replace("base_lr: 4.0", "base_lr: 1e-3")
    )  # YAML 1.1 reads 1e-3 as a string
    loaded = load(path, ["optim.weight_decay=1e-6", "views.crops.global.size=32"])
    assert (loaded.optim.base_lr, loaded.optim.weight_decay, loaded.views.crops["global"].size) == (
        0.001,
        1e-6,
        32,
    )
    assert loaded.output == "runs/run"


def test_off_is_a_word(path):
    path.write_text(tiny.YAML.replace('"off"', "off"))
    assert load(path).log.wandb == load(path, ["log.wandb=off"]).log.wandb == "off"


def test_a_config_survives_its_manifest(path):
    loaded = load(path)
    assert config.from_dict(config.to_dict(loaded)) == loaded


@pytest.mark.case(25)
def test_what_may_change_on_a_resume_is_free_warned_or_refused(path):
    saved = config.to_dict(load(path))
    config.compare_for_resume(
        saved,
        load(
            path,
            ["data.num_workers=3", "log.every_steps=7", "micro_batch_size=24", "output=elsewhere"],
        ),
        "c",
    )
    with pytest.warns(
        UserWarning, match="^epochs: 8 then, 9 now: the schedule changes from here on$"
    ):
        config.compare_for_resume(saved, load(path, ["epochs=9"]), "c")
    checkpoint = Path("runs/a/checkpoints/step_00000003")
    with pytest.raises(ConfigError) as error:
        config.compare_for_resume(
            saved,
            load(path, ["optim.base_lr=0.5", "method.temperature=0.5", "epochs=9"]),
            str(checkpoint),
        )
    assert str(error.value) == (
        "runs/a/checkpoints/step_00000003 was made by another configuration: method.temperature: 0.2 then, 0.5 now; optim.base_lr: 4.0 then, 0.5 now. "
        "Give a new output, or start a new run from its weights with backbone.init=runs/a"
    )


def test_a_key_that_the_saved_version_did_not_know_was_at_its_default(tmp_path):
    run = config.load(tiny.config(tmp_path))
    saved = config.to_dict(run)
    del saved["method"]["without_projector"]
    config.compare_for_resume(saved, run, "run/checkpoints/step_00000003")
    other = config.load(tmp_path / "tiny.yaml", ["method.without_projector=true"])
    with pytest.raises(
        config.ConfigError, match=r"method\.without_projector: False then, True now"
    ):
        config.compare_for_resume(saved, other, "run/checkpoints/step_00000003")


def test_a_crops_option_that_the_saved_version_did_not_know_was_at_its_default(tmp_path):
    run = config.load(tiny.config(tmp_path))
    saved = config.to_dict(run)
    for crop in saved["views"]["crops"].values():
        del crop["crop_sampler"], crop["antialias"]
    config.compare_for_resume(saved, run, "run/checkpoints/step_00000003")
    name = next(iter(saved["views"]["crops"]))
    other = config.load(tmp_path / "tiny.yaml", [f"views.crops.{name}.antialias=false"])
    with pytest.raises(
        config.ConfigError, match=rf"views\.crops\.{name}\.antialias: True then, False now"
    ):
        config.compare_for_resume(saved, other, "run/checkpoints/step_00000003")
    more = config.load(tmp_path / "tiny.yaml", ["views.crops.extra.size=4"])
    with pytest.raises(config.ConfigError, match=r"views\.crops\.extra\.size: None then, 4 now"):
        config.compare_for_resume(saved, more, "run/checkpoints/step_00000003")


@pytest.mark.parametrize("eps", ["0", "-1e-8"])
def test_an_eps_that_divides_by_nothing_is_refused(tmp_path, eps):
    with pytest.raises(ConfigError) as error:
        config.load(tiny.config(tmp_path), [f"optim.eps={eps}"])
    assert str(error.value).endswith(
        f": optim.eps: {float(eps)} is out of range; give a finite number > 0"
    )


@pytest.mark.parametrize("name", ["dino", "moco_v3_vit"])
def test_the_authors_first_weights_do_not_replace_loaded_ones(name):
    run = config.load(
        Path(__file__).parents[1] / f"configs/{name}_imagenet.yaml",
        ["data.root=/data", "backbone.init=runs/a"],
    )
    with pytest.raises(ConfigError) as error:
        config.check(run, 1)
    assert str(error.value) == (
        "method.vit_starts: authors would replace weights that backbone.init=runs/a loads; set method.vit_starts=as_built"
    )
