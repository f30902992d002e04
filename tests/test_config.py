"""Messages about invalid configurations, compared as text, and what a resumed run may change."""

import dataclasses
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tiny

from ssl_pretrain import config, methods, schema
from ssl_pretrain.config import ConfigError, check, load
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.planning import run_settings
from ssl_pretrain.system import program
from ssl_pretrain.views.mask_recipe import Mask
from ssl_pretrain.views.recipe import Crop

CONFIGS = Path(__file__).parents[1] / "configs"
CHECKPOINT = "run/checkpoints/step_00000003"
NOT_INTERPOLATED = (
    "'${' is not allowed: values are not interpolated, so that no secret from the environment ends "
    "up in a logged configuration; write the value itself"
)
METHODS = ", ".join(methods.names())


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(tiny.YAML)
    return path


def error_of(path, *overrides, world_size=1) -> str:
    """Return the message that refuses a configuration."""
    with pytest.raises(ConfigError) as error:
        check(load(path, overrides), world_size)
    return str(error.value).replace(f"{path}", "run.yaml")


def field_names(kind) -> str:
    return ", ".join(field.name for field in fields(kind))


WRONG_OVERRIDES = {
    "optim.base_lrr=1": "run.yaml: optim.base_lrr: no such key. Did you mean 'base_lr'? "
    f"`{program.command('help optim')}` lists the keys there",
    "epoch=3": "run.yaml: epoch: no such key. Did you mean 'epochs'? "
    f"`{program.command('help')}` lists the keys",
    "optim.name=sdg": "run.yaml: optim.name: 'sdg' is not known; choose one of: "
    + ", ".join(get_args(get_type_hints(OptimConfig)["name"])),
    "optim.base_lr=fast": "run.yaml: optim.base_lr: 'fast' is not a number; "
    "write one such as 0.3 or 1e-6",
    "epochs=many": "run.yaml: epochs: 'many' is not a whole number; "
    "write one in decimal digits, such as 100",
    "method.name=simclrr": "run.yaml: method.name: 'simclrr' is not a method. Did you mean "
    f"'simclr'? `{program.command('list methods')}` lists all; a method of your own is "
    "package.module",
    "method.queue_size=3": "run.yaml: method.queue_size: no such key. "
    "It is one of moco, nnclr, swav. Allowed: name, temperature, projector_dims, without_projector",
    "optim": "'optim': not an override; give key=value without spaces, such as optim.base_lr=0.3",
    "log.name=${oc.env:WANDB_API_KEY}": f"log.name: {NOT_INTERPOLATED}",
}


def test_another_method_than_that_of_the_file_is_refused(path):
    inspect = f"`{program.command('inspect')} DATA --method dino --write my.yaml`"
    answer = (
        "run.yaml: method.name: dino would keep the learning rate, the views and the network that "
        f"this file has for simclr; take a recipe of dino (`{program.command('list configs')}`), "
        f"or write one for your images: {inspect}"
    )
    assert error_of(path, "method.name=dino") == answer
    assert error_of(path, "method={name: dino}") == answer
    assert error_of(path, "method={name: dino, momentum: 0.99}") == answer
    with pytest.raises(ConfigError) as error:
        run_settings.choose(path.parent / "run", path, "dino", {}, {})
    assert str(error.value) == answer.replace("run.yaml", str(path))
    assert config.load(path, ["method.name=simclr"]).method.name == "simclr"
    assert "would keep" in error_of(path, "method.name=debiased", "method.temperature=0.2")
    path.write_text("{method: {name: simclr}, epochs: 3}")  # suits any method
    assert config.load(path, ["method.name=dino"]).method.name == "dino"
    assert config.load(path, ["method={name: dino}"]).method.name == "dino"
    chosen = run_settings.choose(path.parent / "run", path, "dino", {}, {})
    assert (chosen.method.name, chosen.epochs) == ("dino", 3)


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_a_wrong_key_or_value_is_named(path, override):
    assert error_of(path, override) == WRONG_OVERRIDES[override]


WRONG_FILES = {
    "epochs: 1\nseed: 2\nepochs: 3\n": "run.yaml: not valid YAML at line 3: "
    "found duplicate key epochs. Write each key once, as 'key: value'",
    "epochs: [1\n": "run.yaml: not valid YAML at line 2: "
    "did not find expected ',' or ']'. Write each key once, as 'key: value'",
    "": f"run.yaml: method.name is missing; choose one of: {METHODS}",
    "- 1\n": "run.yaml: a configuration must be a mapping of keys, got a list; "
    "write each key as 'key: value'",
    "log: {name: '${oc.env:HOME}'}\n": f"run.yaml: {NOT_INTERPOLATED}",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_file_is_named(path, text):
    path.write_text(text)
    assert error_of(path) == WRONG_FILES[text]


def test_an_unknown_preset_or_file_names_the_nearest(path):
    with pytest.raises(ConfigError) as error:
        load("simclr_digit")
    assert str(error.value) == (
        "simclr_digit: no such file or preset. The nearest are simclr_digits, simclr_imagenet, "
        f"simclr_cifar10; `{program.command('list configs')}` lists all presets"
    )
    with pytest.raises(ConfigError, match=f"run2.yaml: no such .* The nearest are {path}, "):
        load(path.with_name("run2.yaml"))


@pytest.mark.parametrize(
    ("override", "world_size", "expected"),
    [
        (
            "global_batch_size=8192",
            12,
            "global_batch_size: 8192 does not divide evenly over 12 ranks; give 8184 or 8196",
        ),
        (
            "global_batch_size=2",
            4,
            "global_batch_size: 2 does not divide evenly over 4 ranks; give 4",
        ),
        (
            "micro_batch_size=most",
            1,
            "micro_batch_size: 'most' is not a number of images; "
            "give a number, 0 for a rank's whole share, or auto",
        ),
        (
            "micro_batch_size=5",
            2,
            "micro_batch_size: 5 does not divide this rank's share of 12 "
            "(global_batch_size 24 / 2 ranks); give a divisor of 12, 0 for the whole share, "
            "or auto",
        ),
        (
            "micro_batch_size=6",
            1,
            "micro_batch_size: 6 splits batch norm's groups of 24 images, which cannot be "
            "accumulated exactly; set micro_batch_size=24, or parallel.bn_group_images=6, which "
            "departs from the recipe's global",
        ),
        (
            "parallel.bn_group_images=7",
            1,
            "parallel.bn_group_images: 7 is not valid; choose global or a divisor of "
            "global_batch_size 24",
        ),
        (
            "parallel.bn_group_images=node",
            1,
            "parallel.bn_group_images: 'node' is not valid; choose global or a divisor of "
            "global_batch_size 24",
        ),
        (
            "epochs=0",
            1,
            "run.yaml: epochs: 0 is out of range; give a whole number >= 1 and <= 2147483647",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_explained(path, override, world_size, expected):
    assert error_of(path, override, world_size=world_size) == expected


@pytest.mark.parametrize("eps", ["0", "-1e-8"])
def test_an_eps_that_is_not_positive_is_refused(path, eps):
    expected = f"optim.eps: {float(eps)} is out of range; give a finite number > 0"
    assert error_of(path, f"optim.eps={eps}") == f"run.yaml: {expected}"


@pytest.mark.parametrize("name", ["dino", "moco_v3_vit"])
def test_the_authors_initial_weights_do_not_replace_loaded_ones(name):
    overrides = ["data.root=/data", "backbone.init=runs/a"]
    assert error_of(CONFIGS / f"{name}_imagenet.yaml", *overrides) == (
        "method.vit_starts: authors would replace weights that backbone.init=runs/a loads; "
        "set method.vit_starts=as_built"
    )


def test_masks_have_the_patches_of_the_backbone(path):
    overrides = ["backbone.name=vit_tiny_patch16_224", "backbone.stem=imagenet"]
    overrides += ["views.crops.global.size=96", "views.crops.global.mask.kind=random"]
    assert error_of(path, *overrides, "views.crops.global.mask.patch_size=8") == (
        "views.crops.global.mask.patch_size: 8 is not the patch size of backbone.name "
        "vit_tiny_patch16_224; give 16"
    )
    check(load(path, overrides), 1)
    run = load(path, [*overrides, "views.crops.global.mask.kind=none"])
    assert run.views.crops["global"].mask == Mask()


def test_a_batch_in_which_masks_hide_nothing_is_refused(path):
    overrides = ["backbone.name=vit_tiny_patch16_224", "backbone.stem=imagenet"]
    overrides += ["views.crops.global.size=96", "views.crops.global.mask.kind=blocks"]
    overrides += ["views.crops.global.mask.probability=0.1", "parallel.bn_group_images=global"]
    assert error_of(path, *overrides, "global_batch_size=4") == (
        "global_batch_size: 4 with views.crops.global.mask.probability 0.1 masks 0.8 of a step's 8 "
        "views, which is rounded down to none; give 5 or more, or a higher probability"
    )
    check(load(path, [*overrides, "global_batch_size=5"]), 1)


def test_values_have_the_declared_types(path):
    path.write_text(tiny.YAML.replace("base_lr: 4.0", "base_lr: 1e-3"))  # text in YAML 1.1
    run = load(path, ["optim.weight_decay=1e-6", "views.crops.global.size=32"])
    assert (run.optim.base_lr, run.optim.weight_decay) == (0.001, 1e-6)
    assert run.views.crops["global"].size == 32
    assert run.output == "runs/run"


def test_an_unquoted_off_is_read_as_text(path):
    path.write_text(tiny.YAML.replace('"off"', "off"))
    assert load(path).log.wandb == load(path, ["log.wandb=off"]).log.wandb == "off"


def test_a_config_survives_conversion_to_a_dict_and_back(path):
    run = load(path)
    assert config.from_dict(config.to_dict(run)) == run


def walk_config_classes(kind):
    """Yield a dataclass of settings and all dataclasses nested in it."""
    yield kind
    for hint in schema.field_types(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from walk_config_classes(hint)


def test_every_setting_has_help_and_a_resume_policy():
    kinds = {*walk_config_classes(config.RunConfig), *walk_config_classes(Crop)}
    kinds |= {methods.find(name).Config for name in methods.names()}
    for kind in kinds:
        for field in fields(kind):
            metadata = schema.field_metadata(kind, field.name)
            setting = f"{kind.__module__}.{kind.__name__}.{field.name}"
            assert metadata.get("help", "").endswith((".", ")")), f"{setting} has no help"
            assert metadata["on_resume"] in ("same", "free", "warn"), setting


def test_a_key_is_explained():
    assert config.explain_key("log.every_steps") == (
        "log.every_steps (int, default 10)\n"
        "  Steps between two records of metrics.\n"
        "  Unit: steps. Allowed: >= 1.\n"
        "  A resumed run may change this value."
    )
    assert config.explain_key("method.dino.center_momentum").startswith(
        "method.dino.center_momentum (float, default 0.9)\n"
    )
    assert "views.crops.global.size (int | list[int], default 224)" in config.explain_key(
        "views.crops.global.size"
    )
    lines = config.explain_key("optim").splitlines()
    listed_names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert ", ".join(listed_names) == field_names(OptimConfig)


def test_a_key_that_does_not_exist_is_not_explained():
    with pytest.raises(ValueError, match=r"^optim\.base_lrr: no such key\. Did you mean"):
        config.explain_key("optim.base_lrr")


@pytest.mark.full
def test_printing_the_help_of_a_key_into_a_closed_pipe_ends_quietly():
    """A user may run `--help optim | head -1`."""
    command = f"set -o pipefail; {sys.executable} -m ssl_pretrain.train --help optim | true"
    process = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_a_former_key_is_accepted_with_a_notice(path):
    path.write_text(tiny.YAML + "local_batch_size: 12\nplan: {calibration: a.json, gpu: here}\n")
    notice = (
        f"{path}: local_batch_size is now micro_batch_size; "
        "plan.calibration: a.json no longer has an effect; "
        "plan.gpu: here no longer has an effect"
    )
    with pytest.warns(UserWarning) as caught:
        run = load(path)
    assert [str(warning.message) for warning in caught] == [notice]
    assert (run.micro_batch_size, run.plan.gpu) == (12, "")


@pytest.mark.parametrize(
    ("override", "notice"),
    [
        ("local_batch_size=8", "local_batch_size is now micro_batch_size"),
        ("plan.gpu=here", "plan.gpu=here no longer has an effect"),
    ],
)
def test_a_former_key_on_the_command_line_is_accepted_with_a_notice(path, override, notice):
    path.write_text(tiny.YAML + "micro_batch_size: 12\n")
    with pytest.warns(UserWarning) as caught:
        run = load(path, [override])
    assert [str(warning.message) for warning in caught] == [notice]
    assert (run.micro_batch_size, run.plan.gpu) == (8 if "local" in override else 12, "")


def test_a_key_under_both_names_is_refused(path):
    path.write_text(tiny.YAML + "micro_batch_size: 12\nlocal_batch_size: 12\n")
    assert error_of(path) == (
        "run.yaml: local_batch_size is the former name of micro_batch_size; give only the latter"
    )


def test_the_stored_config_of_an_old_run_compares_equal():
    run = load(CONFIGS / "dino_imagenet.yaml")
    saved = config.to_dict(run)
    saved["local_batch_size"] = saved.pop("micro_batch_size")
    saved["method"]["centre_momentum"] = saved["method"].pop("center_momentum")
    saved["plan"]["calibration"] = "runs/calibration.json"
    with pytest.warns(UserWarning) as caught:
        config.check_resume_config(saved, run, CHECKPOINT)
        assert config.from_dict(saved) == run
    assert len(caught) == 2
    assert "method.centre_momentum is now method.center_momentum" in str(caught[0].message)


@pytest.mark.case(25)
def test_a_setting_is_free_warned_about_or_refused_on_a_resume(path):
    saved = config.to_dict(load(path))
    free = ["data.num_workers=3", "log.every_steps=7", "micro_batch_size=24", "output=elsewhere"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.check_resume_config(saved, load(path, free), "c")
    expected = "^epochs was 8 and is now 9; the schedule changes from this step on$"
    with pytest.warns(UserWarning, match=expected):
        config.check_resume_config(saved, load(path, ["epochs=9"]), "c")
    other = load(path, ["optim.base_lr=0.5", "method.temperature=0.5", "epochs=9"])
    with pytest.raises(ConfigError) as error:
        config.check_resume_config(saved, other, f"runs/a/{CHECKPOINT.removeprefix('run/')}")
    assert str(error.value) == (
        "runs/a/checkpoints/step_00000003 was saved with a different configuration: "
        "method.temperature was 0.2 and is now 0.5; optim.base_lr was 4.0 and is now 0.5. "
        "Choose a new output, or start a new run from its weights with backbone.init=runs/a"
    )


def test_a_key_that_the_saving_version_lacked_was_at_its_default(path):
    run = load(path)
    saved = config.to_dict(run)
    del saved["method"]["without_projector"]
    config.check_resume_config(saved, run, CHECKPOINT)
    other = load(path, ["method.without_projector=true"])
    with pytest.raises(ConfigError, match=r"method\.without_projector was False and is now True"):
        config.check_resume_config(saved, other, CHECKPOINT)


def test_a_crop_option_that_the_saving_version_lacked_was_at_its_default(path):
    run = load(path)
    saved = config.to_dict(run)
    for crop in saved["views"]["crops"].values():
        del crop["crop_sampler"], crop["antialias"], crop["mask"]
    config.check_resume_config(saved, run, CHECKPOINT)
    key = f"views.crops.{next(iter(saved['views']['crops']))}.antialias"
    with pytest.raises(ConfigError, match=f"{key} was True and is now False"):
        config.check_resume_config(saved, load(path, [f"{key}=false"]), CHECKPOINT)
    with pytest.raises(ConfigError, match=r"views\.crops\.extra\.size was None and is now 4"):
        config.check_resume_config(saved, load(path, ["views.crops.extra.size=4"]), CHECKPOINT)
