"""tests/gpu/run.py where there is no GPU: what it writes of results, what it says of none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import run as gpu
import steps

STEP = {
    "versions": "a GPU; torch 9", "images": 512, "compiled": False, "ms": 100.0, "images_per_second": 5120.0, "views_per_second": 10240.0,
    "ms_color": 12.5, "bare_over_whole": 0.91, "peak_gib": 80.2, "seconds_to_first_step": 15.0, "loss_and_optimizer": 0.0215, "of_790_tflops": 0.31, "of_roofline": 0.5, "lightly": {"images_per_second": 2560.0, "ours_over_theirs": 2.0},
}  # fmt: skip


def test_a_page_without_results_is_what_the_script_writes():
    page, nothing = gpu.PAGE.read_text(), gpu.page({})
    assert gpu.COMMAND in page
    assert page == nothing or "Not run: no GPU was at hand." not in page


def test_every_stage_has_its_line():
    results = {
        "tests": {
            "status": 1,
            "passed": 40,
            "failed": 1,
            "which": ["tests/gpu/test_gpu_step.py::x"],
        },
        "simclr_resnet50": STEP,
        "dino_vit_base": {"error": "out of time"},
        "cifar10": {
            "done": True,
            "epochs": 200.0,
            "images_per_second": 20000.0,
            "data_wait": 0.01,
            "knn": "accuracy 85.0",
        },
    }
    page = gpu.page(results)
    for line in (
        "Tests: 40 passed, 1 failed; failed: tests/gpu/test_gpu_step.py::x.",
        "| simclr_resnet50 | 512 | 100.0 | 12.5 | 5,120 | 10,240 | 6500 | 0.91 | 2.1% | 50% | 31% | 80 | 15 |",
        "lightly's step of the same network, interleaved with ours: 2,560 images/s. Ours, without color, is 2.00 times as fast.",
        "dino_vit_base: out of time",
        "SimCLR, ResNet-18, CIFAR-10 on the device: 200 epochs, 20,000 images/s, waiting for data 1.0%.",
        "accuracy 85.0",
        "Not run: sanitizer, barlow_twins_vit_small, ",
    ):
        assert line in page, page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "tests/gpu/run.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "error: no CUDA device here; nothing was run\n")


def test_a_stage_that_takes_too_long_is_stopped():
    began = time.monotonic()
    status, out, _ = gpu.run(
        [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"], 8.0
    )
    assert (status, out) == (-15, "began\n")
    assert (
        time.monotonic() - began < 8.0
    )  # its grace is part of the limit: a call that overruns loses its last stage


def test_results_are_copied_after_every_stage(tmp_path, monkeypatch):
    """What a machine hands back at its limit holds all stages but the one that was cut off."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "runs" / "results.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "sanitizer", lambda seconds: {"status": 0, "tail": ""})

    def cut_off(name, seconds, images=0):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "step", cut_off)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "run.py",
            "--page",
            str(tmp_path / "gpu.md"),
            "--copy",
            str(tmp_path / "out"),
            "--only",
            "sanitizer",
            "simclr_resnet50",
        ],
    )
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {
        "sanitizer": {"status": 0, "tail": ""}
    }
    assert "sanitizer" not in (tmp_path / "out" / "gpu.md").read_text().partition("Not run:")[2]


def test_the_kit_refuses_a_data_set_that_is_not_there(tmp_path):
    command = [sys.executable, "tests/gpu/kit.py", "--data", str(tmp_path / "cifar10.zip")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    message = f"error: --data: there is no {tmp_path / 'cifar10.zip'}; name the zip of CIFAR-10, with train/CLASS and test/CLASS\n"
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.full
@pytest.mark.parametrize("name", steps.CONFIGS)
def test_a_step_is_measured_small(name):
    """On this machine's CPU and tiny networks, every figure of the table comes out."""
    found = steps.measured(name, torch.device("cpu"), tiny=True, compiled=False, repeats=1)
    assert found["images"] == 8 and found["ms"] > 0 and 0 < found["of_790_tflops"] < 1
    assert found["views_per_second"] / found["images_per_second"] == pytest.approx(
        len(steps.recipe.each(steps.run_of(name, True, False).views))
    )
    if name == "simclr_resnet50":
        assert found["lightly"] == "not installed" or found["lightly"]["images_per_second"] > 0
