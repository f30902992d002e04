"""launch/pretrain.py as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny

from launch import local, pretrain
from ssl_pretrain import config

ROOT = Path(__file__).parents[1]


def test_it_trains_evaluates_and_reports(tmp_path):
    path = tiny.config(tmp_path)
    arguments = [str(path), "epochs=1", "launch.ranks=2"]
    result = subprocess.run([sys.executable, "launch/pretrain.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    run = tmp_path / "run"
    assert json.loads((run / "checkpoints" / "step_00000003" / "manifest.json").read_text())["machine"]["world_size"] == 2
    assert {"knn.json", "linear.json"} <= {file.name for file in (run / "eval").iterdir()}
    assert (run / "report.html").exists()
    assert [line for line in result.stdout.splitlines() if line.startswith("--- ")][:4] == [
        "--- pretraining",
        "--- knn",
        "--- linear",
        "--- report",
    ]


def test_hosts_print_the_exact_lines(tmp_path, capsys):
    path = tiny.config(tmp_path)
    assert pretrain.main([str(path), "launch.hosts=a,b", "launch.ranks=4", "seed=3"]) == 0
    meet = "torchrun --nnodes 2 --node-rank {} --master-addr a --master-port 29500 --nproc-per-node 4"
    train = f"-m ssl_pretrain.train {path} launch.ranks=4 seed=3"
    assert capsys.readouterr().out.splitlines() == ["# on a", f"{meet.format(0)} {train}", "# on b", f"{meet.format(1)} {train}"]


def test_a_plan_trains_nothing(tmp_path, capsys):
    path = tiny.config(tmp_path)
    assert pretrain.main([str(path), "--plan", "launch.ranks=2"]) == 0
    out = capsys.readouterr().out
    assert "embeddings per loss: 48 (2 views x 24 images); negatives per anchor: 46" in out
    assert "steps per epoch: 3 (78 images, the last incomplete batch dropped); 24 in 8 epochs" in out
    assert not (tmp_path / "run").exists()


def test_mistakes_are_one_line(tmp_path, capsys):
    path = tiny.config(tmp_path)
    assert pretrain.main([str(path), "evaluation.at_end=[knnn]"]) == 2
    assert capsys.readouterr().err == "error: evaluation.at_end: 'knnn' is not an evaluation; choose among: knn, linear, report\n"
    assert pretrain.main([str(path), "launch.ranks=5"]) == 2
    assert capsys.readouterr().err == "error: global_batch_size: 24 does not divide over 5 ranks; the nearest that do are 20 and 25\n"


def test_one_rank_needs_no_torchrun(tmp_path):
    path = str(tiny.config(tmp_path))
    assert local.train_command(path, ["seed=1"], 1) == [sys.executable, "-m", "ssl_pretrain.train", path, "seed=1"]
    assert "--standalone" in local.train_command(path, [], 2)
    assert local.ranks_here(config.load(path, ["launch.ranks=3"])) == 3
