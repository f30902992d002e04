"""Settings that need an optional package name its install lines if it is missing."""

import sys

import pytest

from ssl_pretrain import config as configuration
from ssl_pretrain.eval.detection import metrics
from ssl_pretrain.launch import dashboard, slurm_job
from ssl_pretrain.monitoring.wandb import run as wandb_run
from ssl_pretrain.system import optional_packages

DIGITS = "configs/simclr_digits.yaml"


@pytest.fixture
def without(monkeypatch):
    """Return a function that hides a package from `import`, as if it were not installed."""
    return lambda *packages: [monkeypatch.setitem(sys.modules, name, None) for name in packages]


@pytest.fixture
def api_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


def install_lines(extra: str) -> str:
    return (
        f"install it with `pip install '.[{extra}]'` in a clone, or with "
        f"`pip install 'ssl_pretrain-0.1.0-py3-none-any.whl[{extra}]'` where the wheel is"
    )


def message_of(function, *arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_that_requests_wandb_without_it_is_refused(without, api_key, mode):
    without("wandb")
    config = configuration.load(DIGITS, [f"log.wandb={mode}"])
    assert message_of(configuration.check, config, 1) == (
        f"log.wandb={mode}: wandb is not installed; {install_lines('wandb')}, or set log.wandb=off"
    )


def test_auto_without_wandb_is_off_and_says_so_only_to_those_with_a_key(
    without, api_key, monkeypatch
):
    without("wandb")
    message = f"W&B: off, because wandb is not installed; {install_lines('wandb')}"
    assert wandb_run.resolve_mode("auto") == ("off", message)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", "nothing")
    assert wandb_run.resolve_mode("auto") == ("off", "")
    configuration.check(configuration.load(DIGITS), 1)


def test_wandb_that_the_environment_turns_off_is_not_needed(without, api_key, monkeypatch):
    without("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    configuration.check(configuration.load(DIGITS, ["log.wandb=online"]), 1)


def test_slurm_without_submitit_is_refused(without, tmp_path):
    without("submitit")
    config = configuration.load(DIGITS, ["launch.cluster=slurm", f"output={tmp_path}/run"])
    assert message_of(slurm_job.submit, config, DIGITS, []) == (
        f"launch.cluster: slurm: submitit is not installed; {install_lines('slurm')}, "
        "or set launch.cluster=local"
    )
    assert list(tmp_path.iterdir()) == []


def test_coco_and_masks_without_pycocotools_are_refused(without):
    without("pycocotools")
    hint = f"pycocotools is not installed; {install_lines('detection')}"
    assert message_of(metrics.require_packages, "coco", predicts_masks=False) == (
        f"--metric coco: {hint}, or use --metric voc12"
    )
    assert message_of(metrics.require_packages, "voc12", predicts_masks=True) == (
        f"--protocol with masks: {hint}, or use a protocol without masks"
    )
    metrics.require_packages("voc12", predicts_masks=False)


def test_the_dashboard_without_its_package_is_refused(without, capsys):
    without("wandb_workspaces")
    assert dashboard.main(["project"]) == 2
    assert capsys.readouterr().err == (
        f"error: dashboard: wandb-workspaces is not installed; {install_lines('dashboard')}\n"
    )


def test_a_folder_with_the_name_of_a_package_is_not_that_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not optional_packages.is_installed("no_such_package")
    (tmp_path / "no_such_package" / "__init__.py").touch()
    assert optional_packages.is_installed("no_such_package")
