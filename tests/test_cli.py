"""The command `ssl-pretrain`: dispatch, help, lists, typos and completion."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import ssl_pretrain
from ssl_pretrain import cli, config
from ssl_pretrain.command import option_specs, reference_files, subcommands
from ssl_pretrain.command.completion import complete
from ssl_pretrain.config import ConfigError
from ssl_pretrain.schema import config_file, key_reference, presets
from ssl_pretrain.schema.key_entries import SECTION, SECTIONS

ROOT = Path(__file__).resolve().parents[1]
EARLIER_RUN = ROOT / "tests/golden/earlier_run/run"
HEAVY = ["torch", "timm", "numba", "matplotlib", "numpy"]

# Runs several command lines in one process, in which an import of the heavy packages fails.
WITHOUT_TORCH = f"""
import contextlib, io, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise AssertionError("imported " + name)

sys.meta_path.insert(0, Blocker())
sys.argv[0] = "ssl-pretrain"
from ssl_pretrain import cli
results = []
for arguments in json.loads(sys.argv[1]):
    out, status = io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = cli.main(arguments)
        except SystemExit as exit:
            status = exit.code
    results.append((status, out.getvalue()))
print(json.dumps(results))
"""


def run_without_torch(*command_lines: str) -> list[tuple[int, str]]:
    arguments = json.dumps([line.split() for line in command_lines])
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_help_lists_completion_and_typos_need_no_torch():
    expected = {
        "--help": (0, "usage: ssl-pretrain COMMAND"),
        "--version": (0, f"ssl-pretrain {ssl_pretrain.__version__}"),
        "help": (0, "global_batch_size"),
        "help optim.clip_by": (0, "optim.clip_by (whole | tensor, default whole)"),
        "help knn": (0, "usage: ssl-pretrain knn"),
        "list methods": (0, "arXiv:2002.05709"),
        "list optimizers lion": (0, "timm:lion"),
        "list configs": (0, "simclr_cifar10"),
        "completion bash": (0, "complete -o default"),
        "__complete train simclr_cifar10 optim.b": (0, "optim.base_lr="),
        "trian": (2, "error: 'trian' is not a sub-command. Did you mean 'train'?"),
        "train simclr_digit": (2, "error: simclr_digit: no such file or preset."),
        "train simclr_digits optim.base_lrr=1": (2, "Did you mean 'base_lr'?"),
        "pretrain simclr_digits epochs=many": (2, "epochs: 'many' is not a whole number"),
        "plan simclr_digits optim.name=sdg": (2, "optim.name: 'sdg' is not known"),
        "train simclr_digits method.name=simcrl": (2, "Did you mean 'simclr'?"),
        "sweep simclr_digits seed=0,1 optim.base_lrr=1,2": (2, "Did you mean 'base_lr'?"),
        "train simclr_digits --pln": (2, "unrecognized arguments: --pln"),
        **{
            f"{name} --help": (0, f"usage: ssl-pretrain {name}") for name in subcommands.SUBCOMMANDS
        },
    }
    results = run_without_torch(*expected)
    for (line, (status, text)), (actual_status, output) in zip(expected.items(), results):
        assert actual_status == status, f"{line}: {output}"
        assert text in output, line
    train_help = results[list(expected).index("train --help")][1]
    entries = key_reference.keys().items()
    sections = [key for key, entry in entries if entry["type"] == SECTION and "." not in key]
    assert not [section for section in sections if f"\n{section} " not in train_help]


TYPOS = [
    ["optim.base_lrr=1"],
    ["epoch=3"],
    ["optim.name=sdg"],
    ["optim.base_lr=fast"],
    ["epochs=many"],
    ["epochs=0"],
    ["method.name=simcrl"],
    ["method.queue_size=3"],
    ["method.name=moco", "method.temprature=1"],
    ["views.crops.global.sise=3"],
    ["views.crops.global.size=3.5"],
    ["optim.milestones=3"],
    ["data.range=[a,b]"],
    ["optim.final_weight_decay=x"],
    ["log=x"],
    ["backbone.init.x=3"],
    ["seed=${x}"],
    ["optim"],
]


@pytest.mark.parametrize("overrides", TYPOS, ids=str)
def test_a_typo_has_the_same_message_without_the_classes_of_the_package(overrides):
    messages = []
    for load in (config.load, lambda *a: config_file.load(*a, key_reference.declarations())):
        with pytest.raises(ConfigError) as error:
            load("simclr_digits", overrides)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_every_preset_passes_the_check_without_the_classes_of_the_package():
    for path in presets.folder().glob("*.yaml"):
        config_file.load(path.stem, [], key_reference.declarations())


def test_the_keys_of_a_method_of_ones_own_are_left_to_its_module(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("method: {name: package.module, alpha: 3}\n")
    run = config_file.load(path, ["method.beta=4"], key_reference.declarations())
    assert run.method == {"name": "package.module", "alpha": 3, "beta": 4}


def test_the_generated_files_are_current():
    """`python -m ssl_pretrain.command.reference_files` writes them."""
    for path, text in reference_files.generate_files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date"


def test_a_parser_that_is_built_from_its_description_has_the_same_options(monkeypatch):
    monkeypatch.setenv("SSL_PRETRAIN_PROGRAM", "ssl-pretrain")
    for name, spec in option_specs.read_specs().items():
        parser = option_specs.find_parser(name)
        assert json.loads(json.dumps(option_specs.describe_parser(parser))) == spec, name
        assert "usage: ssl-pretrain" in parser.format_help(), name
    assert "--range VALUE [VALUE ...]" in option_specs.find_parser("inspect").format_help()


def list_entries():
    yield from key_reference.keys().items()
    for name, method in key_reference.methods().items():
        yield from ((f"method.{name}.{key}", entry) for key, entry in method["keys"].items())


def test_every_key_has_a_text_a_policy_and_allowed_values_and_every_number_a_unit():
    for key, entry in list_entries():
        assert entry["help"].endswith((".", ")")), f"{key} has no help"
        assert entry["on_resume"] in ("same", "free", "warn"), key
        if entry["type"] in (SECTION, SECTIONS):
            continue
        assert "default" in entry, key
        if re.search(r"\b(int|float)\b", entry["type"]):
            assert entry["unit"], f"{key} needs unit=..., or unit=DIMENSIONLESS"
            assert "low" in entry["bounds"], key
        if "choice" in entry["type"]:
            assert entry["choices"], key


def test_every_method_has_a_description_and_a_paper():
    for name, method in key_reference.methods().items():
        assert method["summary"].endswith("."), name
        assert re.search(r"\(.*(19|20)\d\d", method["paper"]), name


def test_a_preset_is_found_by_its_name_and_an_existing_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("simclr_digits", "simclr_digits.yaml", "configs/simclr_digits.yaml"):
        run = config.load(name)
        assert (run.output, run.global_batch_size) == ("runs/simclr_digits", 256)
    Path("simclr_digits.yaml").write_text("method: {name: byol}\n")
    assert config.load("simclr_digits.yaml").method.name == "byol"
    assert config.load("simclr_digits").method.name == "simclr"


def test_a_subcommand_runs_its_module_and_returns_its_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SSL_PRETRAIN_PROGRAM", "")
    monkeypatch.setattr(sys, "argv", ["/bin/ssl-pretrain"])
    with pytest.raises(SystemExit) as exit:
        cli.main(["compare", str(tmp_path)])
    assert exit.value.code == 2
    assert "a comparison needs two or more runs" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path), "3"]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["replay", str(tmp_path), "x"])
    assert "`/bin/ssl-pretrain replay --help` lists the options" in capsys.readouterr().err


def test_embed_writes_one_row_per_image(tmp_path, capsys):
    images, file = tiny.write_images(tmp_path / "images"), tmp_path / "features.npz"
    assert cli.main(["embed", str(EARLIER_RUN), str(images), str(file)]) == 0
    saved = np.load(file)
    features, names = saved["features"], saved["names"]
    assert features.shape == (len(names), 12)
    assert features.dtype == np.float32
    assert Path(names[0]).is_file()
    assert f"features of {len(names)} images, 12 numbers each" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        cli.main(["embed", str(EARLIER_RUN), str(images), "features.csv"])
    assert error.value.code == 2
    assert (
        "OUT: features.csv ends in none of .npz, .npy, .parquet, .safetensors; give a name that "
        "does, such as features.npz" in capsys.readouterr().err
    )


def test_completion_follows_the_configuration():
    assert complete(["train", "simclr_ci"]) == [
        "simclr_cifar10",
        "simclr_cifar10_cpu",
        "simclr_cifar10_resnet50_adamw",
    ]
    assert complete(["train", "dino_imagenet", "method.center"]) == ["method.center_momentum="]
    section = "method={name: moco, momentum: 0.9}"
    assert complete(["train", "dino_imagenet", section, "method.queue"]) == ["method.queue_size="]
    assert complete(["train", "dino_imagenet", "method.name=moco", "method.queue"]) == [
        "method.queue_size="
    ]
    assert complete(["plan", "simclr_digits", "views.crops.global.si"]) == [
        "views.crops.global.size="
    ]
    assert complete(["knn", "runs/a", "--backend", ""]) == ["auto", "faiss", "torch"]
    assert complete(["help", "method.simclr.temp"]) == ["method.simclr.temperature"]
    assert complete(["beton", "w"]) == ["write"]
    assert complete(["train", "no_such_preset", "optim."]) == []


def test_bash_completes_subcommands_options_presets_keys_and_values(tmp_path):
    lines = {
        "ssl-pretrain spe": "spectrum",
        "ssl-pretrain knn --ch": "--checkpoint",
        "ssl-pretrain train simclr_dig": "simclr_digits",
        "ssl-pretrain train simclr_digits optim.ba": "optim.base_lr=",
        "ssl-pretrain train simclr_digits optim.clip_by=": "tensor whole",
    }
    calls = [
        f"COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; _ssl_pretrain; echo \"${{COMPREPLY[*]}}\""
        for line in lines
    ]
    code = "\n".join(['eval "$(ssl-pretrain completion bash)"; IFS=" "', *calls])
    result = _run_shell(tmp_path, "bash", "-c", code)
    assert result.stdout.splitlines() == list(lines.values()), result.stderr


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes_subcommands_presets_keys_and_values(tmp_path):
    lines = {
        "ssl-pretrain spe": "spectrum",
        "ssl-pretrain train simclr_dig": "simclr_digits",
        "ssl-pretrain train simclr_digits optim.ba": "optim.base_lr=",
        "ssl-pretrain train simclr_digits optim.clip_by=w": "optim.clip_by=whole",
    }
    calls = [f"echo (complete -C '{line}')" for line in lines]
    code = "\n".join(["ssl-pretrain completion fish | source", *calls])
    result = _run_shell(tmp_path, "fish", "--no-config", "-c", code)
    assert result.stdout.splitlines() == list(lines.values()), result.stderr


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_completes_subcommands_presets_and_keys(tmp_path):
    lines = {
        "ssl-pretrain spe": "ssl-pretrain spectrum ",
        "ssl-pretrain train simclr_dig": "ssl-pretrain train simclr_digits ",
        "ssl-pretrain train simclr_digits optim.ba": (
            "ssl-pretrain train simclr_digits optim.base_lr="
        ),
    }
    # A completion needs a terminal, so zsh starts another zsh in one of its own. This widget
    # completes the line and prints it between two markers.
    setup = """autoload -U compinit; compinit -u -D; eval "$(ssl-pretrain completion zsh)"
show() { zle complete-word; print -r -- "<$BUFFER>"; BUFFER=""; zle accept-line }
zle -N show; bindkey "^I" show; print -r "<re""ady>"
"""
    code = "\n".join(
        [
            f"zmodload zsh/zpty; zpty shell {shlex.quote('zsh -f -i')}; answer=",
            f"zpty -w shell {shlex.quote(setup)}; zpty -r -m shell answer '*<ready>*'",
            *[
                f"zpty -n -w shell {shlex.quote(line)}$'\\t'; "
                "zpty -r -m shell answer '*<ssl*>*'; print -r -- $answer"
                for line in lines
            ],
        ]
    )
    result = _run_shell(tmp_path, "zsh", "-f", "-c", code)
    assert re.findall("<(ssl.*?)>", result.stdout) == list(lines.values()), result.stdout


def _run_shell(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command that finds an `ssl-pretrain` of this clone on its path."""
    script, folder = tmp_path / "bin/ssl-pretrain", tmp_path / "empty"
    script.parent.mkdir()
    folder.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m ssl_pretrain.cli "$@"\n')
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=60
    )
