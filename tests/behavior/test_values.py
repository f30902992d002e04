"""The type of a key determines how its value is parsed, and invalid values are rejected."""

from pathlib import Path

import pytest
import yaml
from commands import run, run_modules, write_class_folders, write_config


def read_planned_config(config: Path, *overrides: str) -> dict:
    """Return the configuration that `--plan` prints."""
    ((status, out, err),) = run_modules([["ssl_pretrain.train", str(config), *overrides, "--plan"]])
    assert status == 0, err
    return yaml.safe_load(out.split("# plan")[0])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("values")
    write_class_folders(folder / "photos #1", "train")
    return write_config(folder, "'" + str(folder / "photos #1") + "'")


# YAML reads each of these texts as another type, cuts it off or rejects it.
TEXTS = ["010", "1e5", "1_000", "0x1F", "1:30", "true", "no", "null", "2026-01-01", "1e-3"]
TEXTS += ["/data/photos #1", "/data/a: b", "@x", "*x", "runs/a=b", "{a", "[a]", "a ", "~", ".nan"]
KEYS = ["output", "data.root", "data.cache_dir", "data.train", "data.val"]
KEYS += ["log.name", "log.project", "log.group"]


@pytest.mark.full
def test_text_keys_take_overrides_verbatim(config):
    for first in range(0, len(TEXTS), len(KEYS)):
        expected = dict(zip(KEYS, TEXTS[first:]))
        values = read_planned_config(config, *(f"{key}={text}" for key, text in expected.items()))
        for key, text in expected.items():
            section, _, name = key.rpartition(".")
            assert (values[section] if section else values)[name] == text


def test_text_keys_take_plain_scalars_of_a_yaml_file_verbatim(config):
    path = config.with_name("plain.yaml")
    log = "wandb: off, project: 1e3, name: null, tags: [010, no, 2026-01-01]"
    text = config.read_text().replace('wandb: "off"', log)
    text = text.replace(f"output: {config.parent / 'run'}", "output: 010")
    path.write_text(f"{text}launch: {{hosts: 007}}\n")
    overrides = ("optim.final_weight_decay=null", "views.crops.global.size=24")
    values = read_planned_config(path, *overrides)
    assert values["output"] == "010"
    assert values["log"]["wandb"] == "off"
    assert values["log"]["project"] == "1e3"
    assert values["log"]["name"] == "null"
    assert values["log"]["tags"] == ["010", "no", "2026-01-01"]
    assert values["launch"]["hosts"] == "007"
    assert values["optim"]["final_weight_decay"] is None
    assert values["views"]["crops"]["global"]["size"] == 24
    assert values["optim"]["base_lr"] == 4.0


def test_a_number_may_be_written_in_any_decimal_form(config):
    optim = ("optim.base_lr=1e-3", "optim.weight_decay=0")
    values = read_planned_config(
        config, *optim, "seed=010", "checkpoint.resume=no", "micro_batch_size=8"
    )
    assert values["optim"]["base_lr"] == 0.001
    assert values["optim"]["weight_decay"] == 0.0
    assert values["seed"] == 10
    assert values["checkpoint"]["resume"] is False
    assert values["micro_batch_size"] == 8


@pytest.mark.full
def test_a_run_and_its_evaluation_accept_a_folder_with_a_number_sign(config):
    output, root = config.parent / "010", config.parent / "photos #1"
    training = run("-m", "ssl_pretrain.train", config, f"output={output}")
    assert training.status == 0, training.text
    knn = ("-m", "ssl_pretrain.eval.knn", output, f"data.root={root}", "evaluation.k=3")
    evaluation = run(*knn, "--split", "train", "--rows", "raw")
    assert evaluation.status == 0, evaluation.text


@pytest.mark.full
def test_a_sweep_keeps_its_folder_verbatim_and_splits_only_at_unescaped_commas(config):
    values = ("output=runs/010,b #1", r"log.name=a\,b,c", "seed=0,1")
    result = run("launch/sweep.py", config, *values, "--list")
    assert result.status == 0, result.text
    names = [f"name={name},seed={seed}" for name in ("a,b", "c") for seed in (0, 1)]
    assert result.stdout.splitlines() == [f"runs/010,b #1/{name}" for name in names]


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
        "seed: 99999999999999999999999 is out of range; "
        "give a whole number >= 0 and <= 9223372036854775807"
    ),
    f"seed={'9' * 400}": (
        f"seed: {'9' * 400} is out of range; give a whole number >= 0 and <= 9223372036854775807"
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
        "method.projector_dims[0]: 1000000000000 is out of range; "
        "give a whole number >= 1 and <= 1048576"
    ),
    "method.temperature=0": "method.temperature: 0.0 is out of range; give a finite number > 0",
    "views.mean=[.nan, 0, 0]": "views.mean[0]: '.nan' is not a finite number; give one such as 0.3",
    "optim.betas=[0.9, 1]": (
        "optim.betas[1]: 1.0 is out of range; give a finite number >= 0 and < 1"
    ),
    "optim.nesterov=maybe": "optim.nesterov: 'maybe' is not a boolean; give true or false",
    "launch=4": "launch: '4' is not a section; write its keys below it, or as {key: value}",
    "log.tags=a": "log.tags: 'a' is not a list; write it as [a, b]",
    "optim.base_lr=null": "optim.base_lr: 'null' is not a number; write one such as 0.3 or 1e-6",
    "data.root.x=1": "data.root.x: no such key. data.root is a single value",
}


def test_invalid_values_are_rejected_before_the_run(config):
    command = ["ssl_pretrain.train", str(config), "--stop-after", "2"]
    results = run_modules([[*command, mistake] for mistake in MISTAKES])
    for message, (status, _, err) in zip(MISTAKES.values(), results, strict=True):
        assert (status, err) == (2, f"error: {config}: {message}\n")
    assert not (config.parent / "run").exists()


FILES = {
    "a text": (
        b"just text\n",
        "a configuration must be a mapping of keys, got the text 'just text'; write each key as "
        "'key: value'",
    ),
    "a list": (
        b"- a\n- b\n",
        "a configuration must be a mapping of keys, got a list; write each key as 'key: value'",
    ),
    "another encoding": (
        b"seed: 1\nlog: {name: caf\xe9}\n",
        "not UTF-8 text: byte 0xe9 at line 2. Save the file as UTF-8",
    ),
    "a NUL": (
        b"seed: 1\nlog: {name: a\0b}\n",
        "not valid YAML at line 2: control characters are not allowed. "
        "Write each key once, as 'key: value'",
    ),
    "an alias of itself": (
        b"log: &a {tags: *a}\n",
        "not valid YAML at line 1: an alias contains itself. Write each key once, as 'key: value'",
    ),
}


def test_files_that_are_not_configurations_are_rejected(tmp_path):
    paths = [tmp_path / f"{name}.yaml" for name in FILES]
    for path, (content, _) in zip(paths, FILES.values(), strict=True):
        path.write_bytes(content)
    results = run_modules([["ssl_pretrain.train", str(path), "--plan"] for path in paths])
    for path, (_, message), result in zip(paths, FILES.values(), results, strict=True):
        assert result == (2, "", f"error: {path}: {message}\n")


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


def test_options_of_commands_reject_values_out_of_range():
    results = run_modules([[name, "x", option, value] for name, option, value in OPTIONS])
    for (_, option, value), (status, _, err) in zip(OPTIONS, results, strict=True):
        assert status == 2, err
        assert f"argument {option}" in err
        assert f"'{value}' is out of range; give a " in err
