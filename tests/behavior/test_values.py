"""The type of a key decides how its value is read, and obvious mistakes are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commands import class_folders, each, run, write_config


def plan(config: Path, *overrides: str) -> dict:
    """The configuration that `--plan` prints."""
    ((status, out, err),) = each([["ssl_pretrain.train", str(config), *overrides, "--plan"]])
    assert status == 0, err
    return yaml.safe_load(out.split("# plan")[0])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("values")
    class_folders(folder / "photos #1", "train")
    return write_config(folder, "'" + str(folder / "photos #1") + "'")


TEXTS = ["010", "1e5", "1_000", "0x1F", "1:30", "true", "no", "null", "2026-01-01", "1e-3"]
TEXTS += ["/data/photos #1", "/data/a: b", "@x", "*x", "runs/a=b", "{a", "[a]", "a ", "~", ".nan"]


KEYS = [
    "output",
    "data.root",
    "data.cache_dir",
    "log.name",
    "log.project",
    "launch.hosts",
    "data.train",
    "data.val",
]


def test_text_keys_take_the_text_of_an_override_as_it_is(config):
    for first in range(0, len(TEXTS), len(KEYS)):
        wanted = dict(zip(KEYS, TEXTS[first:]))
        found = plan(config, *(f"{key}={text}" for key, text in wanted.items()))
        for key, text in wanted.items():
            section, _, name = key.rpartition(".")
            assert (found[section] if section else found)[name] == text


def test_text_keys_take_the_text_of_a_yaml_as_it_is(config):
    written = config.with_name("plain.yaml")
    text = config.read_text().replace(
        'wandb: "off"', "wandb: off, project: 1e3, name: null, tags: [010, no, 2026-01-01]"
    )
    written.write_text(text.replace(f"output: {config.parent / 'run'}", "output: 010"))
    found = plan(
        written,
        "optim.final_weight_decay=null",
        "launch.hosts=007",
        "views.crops.global.size=24",
    )
    assert (found["output"], found["log"]["wandb"], found["log"]["project"]) == (
        "010",
        "off",
        "1e3",
    )
    assert (found["log"]["name"], found["log"]["tags"]) == ("null", ["010", "no", "2026-01-01"])
    assert (found["optim"]["final_weight_decay"], found["launch"]["hosts"]) == (None, "007")
    assert (found["views"]["crops"]["global"]["size"], found["optim"]["base_lr"]) == (24, 4.0)


def test_a_number_may_be_written_in_any_decimal_form(config):
    found = plan(
        config,
        "optim.base_lr=1e-3",
        "optim.weight_decay=0",
        "seed=010",
        "checkpoint.resume=no",
        "micro_batch_size=8",
    )
    assert (found["optim"]["base_lr"], found["optim"]["weight_decay"], found["seed"]) == (
        0.001,
        0.0,
        10,
    )
    assert (found["checkpoint"]["resume"], found["micro_batch_size"]) == (False, 8)


@pytest.mark.full
def test_a_run_and_its_evaluation_find_a_folder_with_a_number_sign(config):
    trained = run("-m", "ssl_pretrain.train", config, f"output={config.parent}/010")
    assert trained.status == 0, trained.text
    root = config.parent / "photos #1"
    knn = run(
        "-m",
        "ssl_pretrain.eval.knn",
        config.parent / "010",
        f"data.root={root}",
        "evaluation.k=3",
        "--split",
        "train",
        "--rows",
        "raw",
    )
    assert knn.status == 0, knn.text


def test_a_sweep_takes_its_folder_as_it_is_and_splits_only_at_plain_commas(config):
    done = run(
        "launch/sweep.py", config, "output=runs/010,b #1", r"log.name=a\,b,c", "seed=0,1", "--list"
    )
    assert done.status == 0, done.text
    assert done.stdout.splitlines() == [
        f"runs/010,b #1/name={name},seed={seed}" for name in ("a,b", "c") for seed in (0, 1)
    ]


MISTAKES = {
    "optim.base_lr=-1": "optim.base_lr: -1.0 is out of range; give a finite number >= 0",
    "optim.weight_decay=-1": "optim.weight_decay: -1.0 is out of range; give a finite number >= 0",
    "optim.warmup_epochs=-5": (
        "optim.warmup_epochs: -5.0 is out of range; give a finite number >= 0"
    ),
    "optim.warmup_epochs=nan": (
        "optim.warmup_epochs: 'nan' is not a finite number; give one such as 0.3"
    ),
    "checkpoint.every_epochs=.nan": (
        "checkpoint.every_epochs: '.nan' is not a finite number; give one such as 0.3"
    ),
    "parallel.threads=-1": (
        "parallel.threads: -1 is out of range; give a whole number >= 0 and <= 1024"
    ),
    "parallel.timeout_seconds=.inf": (
        "parallel.timeout_seconds: '.inf' is not a finite number; give one such as 0.3"
    ),
    "seed=99999999999999999999999": (
        "seed: 99999999999999999999999 is out of range; give a whole number >= "
        "0 and <= 9223372036854775807"
    ),
    "seed=-1": "seed: -1 is out of range; give a whole number >= 0 and <= 9223372036854775807",
    "epochs=1000000000000000000000": (
        "epochs: 1000000000000000000000 is out of range; give a whole number >= 1 and <= 2147483647"
    ),
    "guard.max_skipped_steps=0": (
        "guard.max_skipped_steps: 0 is out of range; give a whole number >= 1 and <= 2147483647"
    ),
    "log.every_steps=0": (
        "log.every_steps: 0 is out of range; give a whole number >= 1 and <= 2147483647"
    ),
    "epochs=1e3": "epochs: '1e3' is not a whole number; write one in decimal digits, such as 100",
    "method.projector_dims=[1000000000000]": (
        "method.projector_dims[0]: 1000000000000 is out of range; give a whole number >= 1 and "
        "<= 1048576"
    ),
    "method.temperature=0": "method.temperature: 0.0 is out of range; give a finite number > 0",
    "views.mean=[.nan, 0, 0]": "views.mean[0]: '.nan' is not a finite number; give one such as 0.3",
    "optim.betas=[0.9, 1]": (
        "optim.betas[1]: 1.0 is out of range; give a finite number >= 0 and < 1"
    ),
    "optim.nesterov=maybe": "optim.nesterov: 'maybe' is not a truth value; give true or false",
    "launch=4": "launch: '4' is not a section; write its keys below it, or as {key: value}",
    "log.tags=a": "log.tags: 'a' is not a list; write it as [a, b]",
    "optim.base_lr=null": "optim.base_lr: 'null' is not a number; write one such as 0.3 or 1e-6",
    "data.root.x=1": "data.root.x: no such key. data.root is a single value",
}


def test_a_value_that_can_only_be_a_mistake_is_refused(config):
    results = each(
        [["ssl_pretrain.train", str(config), mistake, "--stop-after", "2"] for mistake in MISTAKES]
    )
    for message, (status, _, err) in zip(MISTAKES.values(), results, strict=True):
        assert (status, err) == (2, f"error: {config}: {message}\n")
    assert not (config.parent / "run").exists()


FILES = {
    "a text": (b"just text\n", "a configuration is a mapping of keys, got the text 'just text'"),
    "a list": (b"- a\n- b\n", "a configuration is a mapping of keys, got a list"),
    "another encoding": (
        b"seed: 1\nlog: {name: caf\xe9}\n",
        "not UTF-8 text: byte 0xe9 at line 2. Save the file as UTF-8",
    ),
    "a NUL": (
        b"seed: 1\nlog: {name: a\0b}\n",
        (
            "not valid YAML at line 2: control characters are not allowed. Write "
            "each key once, as 'key: value'"
        ),
    ),
    "an alias of itself": (
        b"log: &a {tags: *a}\n",
        "not valid YAML at line 1: an alias contains itself. Write each key once, as 'key: value'",
    ),
}


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    commands = []
    for number, (content, _) in enumerate(FILES.values()):
        (tmp_path / f"{number}.yaml").write_bytes(content)
        commands.append(["ssl_pretrain.train", str(tmp_path / f"{number}.yaml"), "--plan"])
    for number, ((_, message), result) in enumerate(
        zip(FILES.values(), each(commands), strict=True)
    ):
        assert result == (2, "", f"error: {tmp_path}/{number}.yaml: {message}\n")


OPTIONS = [
    ("ssl_pretrain.train", "--stop-after", "0"),
    ("ssl_pretrain.train", "--stop-after", "-3"),
    ("ssl_pretrain.train", "--fake-preempt", "0"),
    ("eval.knn", "--temperature", "nan"),
    ("eval.knn", "--k", "0"),
    ("eval.linear", "--lrs", "-0.1"),
    ("eval.linear", "--weight-decays", "inf"),
    ("eval.semi", "--percent", "101"),
]


def test_options_of_commands_take_only_values_that_mean_something():
    for (_, option, value), (status, _, err) in zip(
        OPTIONS, each([[name, "x", option, value] for name, option, value in OPTIONS])
    ):
        assert (
            status == 2
            and f"argument {option}" in err
            and f"'{value}' is out of range; give a " in err
        ), err
