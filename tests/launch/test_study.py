"""A study of configs/sweeps/: its runs are real configurations, and its table and plot hold the numbers of its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ssl_pretrain import config, methods
from ssl_pretrain.eval import results, spectrum
from ssl_pretrain.launch import study, sweep

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
ABOUT = {"checkpoint": "step_00000007", "step": 7, "network": "student"}


@pytest.mark.parametrize(
    "base", ["configs/methods_digits.yaml", "configs/methods_cifar10_cpu.yaml"]
)
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_is_a_configuration_of_its_own(path, base):
    found = study.load(path)
    planned = study.plan(found, path, str(ROOT / base), ["seed=0,1", "epochs=2"])
    assert len(planned) == 2 * len(found.runs) and len(
        {run.output for _, run, _ in planned}
    ) == len(planned)
    for name, run, _ in planned:
        config.check(run, 1)
        assert run.epochs == 2 and run.evaluation.at_end == ["linear", "spectrum"]
        for override in next(one.set for one in found.runs if one.name == name):
            key, _, value = override.partition("=")
            assert str(study.value_at(run, key)).lower() == value.lower() or float(
                study.value_at(run, key)
            ) == float(value)
        small = {
            key: value
            for key, value in methods.find(run.method.name).SMALL.items()
            if key != "temperature"
        }
        assert all(
            getattr(run.method, key) == value for key, value in small.items() if key != "momentum"
        )


def test_the_temperatures_and_the_parts_asked_for_are_there():
    by_name = {path.stem: study.load(path) for path in STUDIES}
    assert {"0.03", "0.2"} <= {run.name for run in by_name["temperature"].runs}
    switched_off = {value for run in by_name["ablation"].runs for value in run.set}
    assert {
        "method.without_projector=true",
        "method.without_stop_gradient=true",
        "method.without_queue=true",
    } <= switched_off


def written(run: Path, linear: float, share: float) -> None:
    rows = [
        results.Row("raw pixels", {"all labels": 90.0}),
        results.Row(results.BETTER_RANDOM, {"all labels": 80.0}),
    ]
    results.save(
        run, "linear", {}, [*rows, results.Row("pretrained", {"all labels": linear})], ABOUT, 1.0
    )
    numbers = {
        f"{what}, {kind}": share
        for what in ("embeddings", "features")
        for kind in ("top-5 of all", "rank", "variance")
    }
    results.save(run, "spectrum", {}, [results.Row("pretrained", numbers)], ABOUT, 1.0)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_table_has_means_over_seeds_and_says_what_is_missing(
    path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    found = study.load(path)
    planned = study.plan(found, path, None, ["seed=0,1", f"output={tmp_path / 'runs'}"])
    for number, (_, run, _) in enumerate(planned[:-2]):
        written(Path(run.output), linear=90 + number, share=30 + number)
    arguments = [
        str(path),
        "seed=0,1",
        f"output={tmp_path / 'runs'}",
        "--table",
        str(tmp_path / "table.md"),
        "--table-only",
    ]
    assert sweep.main(arguments) == 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| {found.runs[1].name} |"))
    assert row.startswith(f"| {found.runs[1].name} | 2 | 92.5 ± 0.7 | 32.5 ± 0.7 |")
    assert (
        f"Not run: {found.runs[-1].name}." in lines
        and "raw pixels reach 90.0, the random backbone 80.0" in "\n".join(lines)
    )
    assert str(tmp_path) not in "\n".join(lines) and f"![{found.title}](table.png)" in lines
    with Image.open(tmp_path / "table.png") as plot:
        assert (
            plot.width > 900 and len(set(plot.convert("RGB").reduce(8).getdata())) > 20
        )  # not empty


def test_what_all_runs_share_is_judged_once_a_seed(tmp_path, monkeypatch):
    found = study.load(STUDIES[0])
    planned = study.plan(
        found, STUDIES[0], str(ROOT / found.base), ["seed=0,1", f"output={tmp_path}"]
    )[:4]
    asked = []

    def run(config, _base, _overrides, options):
        asked.append((config.seed, options))
        written(Path(config.output), 90, 30)
        return 0, {}

    monkeypatch.setattr(study.pretrain, "pretrain_and_evaluate", run)
    alone = {"linear": ["--rows", "pretrained"]}
    assert study.run_all(planned[:3], "base.yaml") == []
    assert asked == [(0, {}), (1, {}), (0, alone)]
    study.run_all(planned, "base.yaml")
    assert asked[3:] == [(1, alone)]


def test_mistakes_are_one_line(tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text("title: x\nruns: []\n")
    assert sweep.main([str(path)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {path}: runs: is empty; give each a name and what it sets\n"
    )
    path.write_text("titel: x\nruns: [{name: a}]\n")
    assert sweep.main([str(path)]) == 2
    assert "titel" in capsys.readouterr().err
    assert sweep.main([str(ROOT / "configs/simclr_digits.yaml")]) == 2
    assert (
        capsys.readouterr().err
        == "error: give the values to try, such as seed=0,1, or a study of configs/sweeps/\n"
    )


def test_the_spectrum_by_hand():
    """Two orthogonal directions, one with three times the other's variance, and a third that all share."""
    vectors = torch.tensor(
        [
            [1.0, 1, 0],
            [1, -1, 0],
            [1, 1, 0],
            [1, -1, 0],
            [1, 1, 0],
            [1, -1, 0],
            [1, 0, 1],
            [1, 0, -1],
        ]
    )
    values = spectrum.spectrum(5 * vectors)
    assert values.tolist() == pytest.approx(
        [6 / 16, 2 / 16, 0], abs=1e-12
    )  # of unit vectors: half of each squared length
    found = spectrum.measures("z", vectors)
    assert found["z, top-5 of all"] == pytest.approx(100) and found["z, rank"] == pytest.approx(
        0.75**-0.75 * 0.25**-0.25
    )
    assert found["z, variance"] == pytest.approx(50)
    wide = torch.randn(20000, 20, generator=torch.Generator().manual_seed(0))
    assert spectrum.measures("z", wide)["z, top-5 of all"] == pytest.approx(25, abs=2)
    assert spectrum.measures("z", wide)["z, variance"] == pytest.approx(100, abs=0.1)
    assert spectrum.measures("z", torch.ones(10, 4))["z, variance"] == pytest.approx(
        0, abs=1e-9
    )  # collapsed to a point
