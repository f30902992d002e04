"""Studies of configs/sweeps/: their runs are valid, and the table and plot show their numbers."""

import os
import signal
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path

import pytest
import tiny
import yaml
from matplotlib.figure import Figure
from PIL import Image
from study_runs import save_results
from suites import quick_and_full

from ssl_pretrain import config, methods
from ssl_pretrain.launch import study, study_columns, study_plan, study_table, sweep

ROOT = Path(__file__).parents[2]
LEARNING = ROOT / "configs/sweeps/learning.yaml"  # its variants have base configurations
PATHS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
STUDIES = {path.stem: path for path in PATHS if path != LEARNING}
BASES = ["configs/methods_digits.yaml", "configs/methods_cifar10_cpu.yaml"]


@pytest.mark.parametrize("base", quick_and_full(BASES[:1], BASES))
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_is_a_valid_configuration_with_its_own_folder(name, base):
    path = STUDIES[name]
    definition = study_plan.load(path)
    if name == "methods":
        base = definition.base  # the digits are too small for CPC's patches
    runs = study_plan.plan_runs(definition, path, str(ROOT / base), ["seed=0,1", "epochs=2"])
    assert len(runs) == 2 * len(definition.runs)
    assert len({run.config.output for run in runs}) == len(runs)
    settings = {variant.name: variant.set for variant in definition.runs}
    for run in runs:
        config.check(run.config, 1)
        assert run.config.epochs == 2
        assert run.config.evaluation.at_end == definition.evaluation_names()
        for override in settings[run.variant]:
            key, _, value = override.partition("=")
            actual = attrgetter(key)(run.config)
            assert str(actual).lower() == value.lower() or float(actual) == float(value)
        small = methods.find(run.config.method.name).SMALL_CONFIG
        for key in small.keys() - {"temperature", "momentum"}:
            assert getattr(run.config.method, key) == small[key]


def test_variants_may_have_base_configurations_of_their_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    definition = study_plan.load(LEARNING)
    runs = study_plan.plan_runs(definition, LEARNING, None, ["seed=0,1"])
    assert [run.config.method.name for run in runs[::2]] == [
        "lejepa",
        "mae",
        "ijepa",
        "temperature_free",
    ]
    assert runs[2].config.output == "runs/learning/mae_0"
    assert runs[-1].config.method.projector_dims == [256, 128]  # a small head
    for run in runs:
        config.check(run.config, 1)
        assert config.load(run.base, run.overrides) == run.config
    definition.runs.pop()  # the one that sets a method's name
    every_base = study_plan.plan_runs(definition, LEARNING, "configs/mae_cifar10.yaml", [])
    assert {run.config.backbone.name for run in every_base} == {"vit_tiny_patch16_224"}


def test_reference_rows_are_shared_within_one_base_only(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    definition = study_plan.load(LEARNING)
    runs = study_plan.plan_runs(definition, LEARNING, None, [f"output={tmp_path}"])
    calls = []

    def pretrain_and_evaluate(config, base, _overrides, options):
        calls.append((Path(base).stem, options))
        save_results(Path(config.output), 90, 30)
        return 0

    monkeypatch.setattr(study.pretrain, "pretrain_and_evaluate", pretrain_and_evaluate)
    assert study.run_all(runs) == 0
    bases = ["lejepa_cifar10_cpu", "mae_cifar10", "ijepa_cifar10", "methods_cifar10_cpu"]
    assert calls == [(base, {}) for base in bases]


def test_variants_with_different_recipes_are_described_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    definition = study_plan.load(LEARNING)
    runs = study_plan.plan_runs(definition, LEARNING, None, [f"output={tmp_path}"])[1:3]
    for run in runs:
        save_results(Path(run.config.output), 90, 30)
    comparison = study_table.Comparison(
        definition.title, ["linear, %"], [(run.variant, run.config) for run in runs]
    )
    text = study_table.describe(comparison)
    assert text.startswith(
        "MAE: vit_tiny_patch16_224, cifar10, batch 128, 5 epochs, adamw. "
        "I-JEPA: vit_tiny_patch16_224, cifar10, batch 64, 14 epochs, adamw. "
        "One seed per row, so there is no deviation.\n\n- linear, %: "
    )
    assert not any(comparison.references("linear, %").values())


def test_the_runs_of_a_study_are_one_group_in_wandb_unless_they_have_one():
    path = STUDIES["ablation"]
    definition = study_plan.load(path)
    base = str(ROOT / "configs/methods_digits.yaml")
    runs = study_plan.plan_runs(definition, path, base, ["seed=0,1"])
    assert {run.config.log.group for run in runs} == {"ablation_methods_digits"}
    assert all(config.load(base, run.overrides) == run.config for run in runs)
    runs = study_plan.plan_runs(definition, path, base, ["log.group=mine", "output=runs/other"])
    assert {run.config.log.group for run in runs} == {"mine"}


@pytest.mark.parametrize("name", methods.image_methods())
def test_every_method_fits_the_cpu_preset(name):
    overrides = study_plan.small_model_overrides([f"method.name={name}"])
    run = config.load(ROOT / "configs/methods_cifar10_cpu.yaml", overrides)
    config.check(run, 2)
    assert run.method.name == name
    assert run.data.subset == 10000


def test_the_studies_have_the_variants_that_the_documentation_discusses():
    variants = {name: study_plan.load(path).runs for name, path in STUDIES.items()}
    assert {"0.03", "0.2"} <= {variant.name for variant in variants["temperature"]}
    assert [variant.name for variant in variants["methods"]] == methods.image_methods()
    assert {
        "method.without_projector=true",
        "method.without_stop_gradient=true",
        "method.without_queue=true",
    } <= {override for variant in variants["ablation"] for override in variant.set}


@pytest.mark.parametrize("name", STUDIES)
def test_the_table_has_means_over_seeds_and_names_missing_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    definition = study_plan.load(STUDIES[name])
    arguments = ["seed=0,1", f"output={tmp_path / 'runs'}"]
    runs = study_plan.plan_runs(definition, STUDIES[name], None, arguments)
    runs.sort(key=lambda run: [variant.name for variant in definition.runs].index(run.variant))
    for number, run in enumerate(runs[:-2]):
        save_results(Path(run.config.output), accuracy=90 + number, spectrum_number=30 + number)
    table = tmp_path / "table.md"
    if name != "ablation":  # one study draws its plots, which takes seconds
        monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
    command = [str(STUDIES[name]), *arguments, "--table", str(table), "--table-only"]
    assert sweep.main(command) == 0
    text = table.read_text()
    lines = text.splitlines()
    variant = definition.runs[1].name
    (row,) = [line for line in lines if line.startswith(f"| {variant} |")]
    assert row.startswith(f"| {variant} | 2 | 92.5 ± 0.7 | 32.5 ± 0.7 |")
    missing = definition.runs[-1].name
    assert f"Not run: {missing}." in lines
    assert any(line.startswith(f"| {missing} | 0 | not run |") for line in lines)
    references = [line for line in lines if line.startswith(("| random b", "| raw pixels"))]
    assert [line.split(" | ")[:3] for line in references] == [
        ["| random backbone", "2", "80.0 ± 0.0"],
        ["| raw pixels", "2", "90.0 ± 0.0"],
    ]
    assert str(tmp_path) not in text
    assert f"![{definition.title}, results](table.png)" in lines
    if name == "ablation":
        with Image.open(tmp_path / "table.png") as plot:
            assert plot.width > 1200
    assert {"table.svg", "table.csv", "table.tex"} <= {file.name for file in tmp_path.iterdir()}


def test_the_columns_of_the_methods_study_show_the_saved_results(tmp_path):
    save_results(tmp_path, accuracy=92.5, spectrum_number=12.5)
    run = study_columns.RunResults(tmp_path)
    columns = study_plan.load(STUDIES["methods"]).columns
    assert {column: study_columns.COLUMNS[column].value(run) for column in columns} == {
        "k-NN, %": 92.5,
        "RankMe": 12.5,
        "k-NN above random": 12.5,
        "k-NN in the run, %": pytest.approx(30),
        "minutes": 2.0,
    }


def test_a_table_without_rows_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    table, folder = tmp_path / "table.md", tmp_path / "runs"
    table.write_text("numbers of many hours\n")
    arguments = [str(STUDIES["methods"]), f"output={folder}", "--table-only"]
    assert sweep.main([*arguments, "--table", str(table)]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder}: no run of this study has been evaluated, so no table was written; "
        "run the study first\n"
    )
    assert table.read_text() == "numbers of many hours\n"


def test_raw_pixels_are_evaluated_once_and_the_random_backbone_once_per_seed(tmp_path, monkeypatch):
    path = STUDIES["ablation"]
    definition = study_plan.load(path)
    overrides = ["seed=0,1", f"output={tmp_path}"]
    runs = study_plan.plan_runs(definition, path, str(ROOT / definition.base), overrides)[:4]
    calls = []

    def pretrain_and_evaluate(config, _base, _overrides, options):
        calls.append((config.seed, options))
        save_results(Path(config.output), 90, 30)
        return 0

    monkeypatch.setattr(study.pretrain, "pretrain_and_evaluate", pretrain_and_evaluate)
    pretrained_only = {"linear": ["--rows", "pretrained"]}
    assert study.run_all(runs[:3]) == 0
    new_seed = {"linear": ["--rows", "random", "pretrained"]}  # raw pixels have no seed
    assert calls == [(0, {}), (1, new_seed), (0, pretrained_only)]
    study.run_all(runs)
    assert calls[3:] == [(1, pretrained_only)]


def test_a_stopped_study_continues_with_the_runs_that_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    calls = []

    def pretrain_and_evaluate(config, *_):
        calls.append(Path(config.output).name)
        if len(calls) == 2:  # SIGTERM during the second run
            return 75
        save_results(Path(config.output), 90, 30)
        return 0

    monkeypatch.setattr(study.pretrain, "pretrain_and_evaluate", pretrain_and_evaluate)
    arguments = [str(STUDIES["ablation"]), f"output={tmp_path}"]
    assert sweep.main(arguments) == 75
    assert calls == ["simclr_0", "simclr_no_projector_0"]
    assert "stopped in run 2 of 7; run the same command to continue" in capsys.readouterr().out
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
    assert sweep.main(arguments) == 0
    assert calls[2:] == [Path(run).name for run in _folders(arguments, capsys)[1:]]
    assert sweep.main(arguments) == 0
    assert len(calls) == 8  # nothing is repeated


def _folders(arguments, capsys):
    capsys.readouterr()
    assert sweep.main([*arguments, "--list"]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_study_with_seeds_may_run_seed_by_seed(capsys):
    arguments = [str(STUDIES["collapse"]), "output=runs/x"]
    folders = _folders(arguments, capsys)
    assert folders[:2] == ["runs/x/simclr_0", "runs/x/simclr_no_projector_0"]
    assert [folder[-2:] for folder in folders] == ["_0"] * 11 + ["_1"] * 11 + ["_2"] * 11
    assert len(_folders([*arguments, "seed=5"], capsys)) == 11


def test_results_of_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    definition = study_plan.load(STUDIES["ablation"])
    run = study_plan.plan_runs(definition, STUDIES["ablation"], None, [f"output={tmp_path}"])[0]
    folder = Path(run.config.output)
    save_results(folder, 90, 30)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(run.config)))
    arguments = [str(STUDIES["ablation"]), f"output={tmp_path}", "--table-only"]
    assert sweep.main([*arguments, "epochs=61"]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder} is finished, with a different configuration: epochs was 60 and is now "
        "61. Give the study another output, or delete this folder\n"
    )
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
    assert sweep.main([*arguments, "launch.ranks=2"]) == 0  # the same numbers


def test_runs_are_trained_even_if_every_column_is_a_training_metric(tmp_path, monkeypatch):
    path = tmp_path / "study.yaml"
    path.write_text("title: x\ncolumns: [RankMe]\nruns: [{name: a}]\n")
    monkeypatch.chdir(ROOT)
    (run,) = study_plan.plan_runs(study_plan.load(path), path, None, [f"output={tmp_path}"])
    assert run.config.evaluation.at_end == []
    assert not run.is_evaluated()


@pytest.mark.full
def test_a_killed_study_is_continued_and_finished_runs_are_not_repeated(tmp_path):
    data = tiny.write_images(tmp_path / "images")
    path, output = tmp_path / "study.yaml", tmp_path / "runs"
    path.write_text(
        "title: Two\nsmall_heads: true\nseeds: [0, 1]\ncolumns: [RankMe]\n"
        "runs: [{name: VICReg, set: [method.name=vicreg]}]\n"
    )
    settings = ["data.source=folder", "data.subset=0", "global_batch_size=24", "epochs=4"]
    settings += [f"data.root={data}", "launch.ranks=1", "parallel.threads=1", f"output={output}"]
    settings += ["online.k=3", "health.every_steps=1", "views.crops.global.size=16"]
    settings += ["checkpoint.every_epochs=1", "--base", f"{ROOT}/configs/methods_cifar10_cpu.yaml"]
    command = [sys.executable, "-m", "ssl_pretrain.launch.sweep", str(path), *settings]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        while not any((output / "vicreg_1/checkpoints").glob("step_*")):  # the second run has begun
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    first = (output / "vicreg_0/metrics.jsonl").read_bytes()
    assert not (output / "study.csv").exists()
    subprocess.run(command, check=True, cwd=ROOT)
    assert (output / "vicreg_0/metrics.jsonl").read_bytes() == first
    assert "VICReg,2," in (output / "study.csv").read_text()


@pytest.mark.full
def test_one_command_trains_evaluates_and_writes_the_table(tmp_path):
    data = tiny.write_images(tmp_path / "images")
    path = tmp_path / "study.yaml"
    path.write_text(
        "title: One method\nsmall_heads: true\ncolumns: ['k-NN, %', minutes]\n"
        "runs: [{name: VICReg, set: [method.name=vicreg]}]\n"
    )
    overrides = [
        f"data.root={data}",
        "data.source=folder",
        "data.subset=0",
        "global_batch_size=24",
        "epochs=1",
        "launch.ranks=1",
        "evaluation.k=3",
        "online.k=3",
        "health.every_steps=1",
        "views.crops.global.size=16",
        f"output={tmp_path / 'runs'}",
    ]
    base = str(ROOT / "configs/methods_cifar10_cpu.yaml")
    assert sweep.main([str(path), *overrides, "--base", base]) == 0
    assert "| VICReg | 1 |" in (tmp_path / "runs/study.md").read_text()


def test_a_mistake_is_reported_in_one_line(tmp_path, capsys):
    path = tmp_path / "study.yaml"
    for text, message in {
        "title: x\nruns: []\n": (
            "runs: the list is empty; add runs, each with the keys name and set"
        ),
        "runs: [{name: a}]\ncolumns: [speed]\n": (
            f"columns: ['speed']; choose one or more of: {list(study_columns.COLUMNS)}"
        ),
    }.items():
        path.write_text(text)
        assert sweep.main([str(path)]) == 2
        assert capsys.readouterr().err == f"error: {path}: {message}\n"
    path.write_text("titel: x\nruns: [{name: a}]\n")
    assert sweep.main([str(path)]) == 2
    assert "titel" in capsys.readouterr().err
    path = ROOT / "configs/simclr_digits.yaml"
    assert sweep.main([str(path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {path}: there are no values to combine; add some, such as seed=0,1, or give a "
        "study in configs/sweeps/\n"
    )


def write_study(path, *names, **entries):
    """Write a study of one run per name."""
    runs = [{"name": name, "set": ["method.name=simclr"]} for name in names]
    path.write_text(yaml.safe_dump({"runs": runs, **entries}))
    return path


@pytest.mark.parametrize(
    ("names", "entries", "overrides", "message"),
    [
        (
            ["a-b", "a b"],
            {},
            [],
            "{path}: runs: 'a-b' and 'a b' have the same output "
            "runs/study_methods_digits/a_b_0; give them names that differ in letters or digits",
        ),
        (
            ["a"],
            {"plot_against": "method.temprature"},
            [],
            "{path}: plot_against: method.temprature is None for 'a'; give a key that is a number "
            "in every run, such as method.temperature",
        ),
        (
            ["a"],
            {},
            ["seed=0,00"],
            "seed: '0,00' is not a list of distinct whole numbers; give such as seed=0,1,2",
        ),
        (
            ["a"],
            {"seeds": []},
            [],
            "seed: '' is not a list of distinct whole numbers; give such as seed=0,1,2",
        ),
    ],
)
def test_a_study_whose_table_could_not_be_written_is_refused_before_training(
    names, entries, overrides, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    path = write_study(tmp_path / "study.yaml", *names, **entries)
    with pytest.raises(config.ConfigError) as error:
        study_plan.plan_runs(study_plan.load(path), path, None, overrides)
    assert str(error.value) == message.format(path=path)


def test_seeds_may_have_spaces_and_names_letters_of_any_alphabet(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = write_study(tmp_path / "study.yaml", "ö=1", "ü=1", seed_by_seed=True)
    runs = study_plan.plan_runs(study_plan.load(path), path, None, ["seed=0, 1", "output=runs/s"])
    assert [run.config.output for run in runs] == [
        f"runs/s/{name}_{seed}" for seed in (0, 1) for name in ("ö_1", "ü_1")
    ]
