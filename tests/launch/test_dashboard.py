"""The dashboard up to the call of W&B's API: what is built names only what is logged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssl_pretrain.launch import dashboard
from ssl_pretrain.methods import find, names
from ssl_pretrain.monitoring import collapse, metric_names

workspaces = pytest.importorskip(
    "wandb_workspaces.workspaces",
    reason="wandb-workspaces is not installed: pip install 'ssl_pretrain[dashboard]'",
)
LOGGED = {"replaced_images", "loss", "knn", "probe", "lr", "weight_decay", "gradient_norm", "images_per_second", "seconds_per_step", "data_wait", "memory_gib",
          "model_tflops", "flops_utilization", "teacher_distance", "straggler", "straggler_seconds"}  # fmt: skip  # tests/monitoring/test_logger.py and test_health.py see them logged


def shown(workspace):
    """Section name -> metric names of its panels."""
    return {
        section.name: [y for panel in section.panels for y in getattr(panel, "y", None) or []]
        for section in workspace.sections
    }


def test_every_panel_names_a_metric_that_is_logged():
    z = torch.randn(16, 4)
    embeddings = {"z_a": z, "z_b": z, "scores": torch.randn(16, 2, 5)}
    measured, _ = collapse.measure(embeddings, z, collapse.HealthConfig())
    parts = {part for part in dashboard.PARTS if any(part in parts_of(name) for name in names())}
    assert parts == set(dashboard.PARTS)
    network = {f"{prefix}{part}" for prefix in metric_names.PREFIXES for part in parts}
    logged = {metric_names.name(key) for key in LOGGED | measured.keys() | network} | {
        dashboard.SPREAD
    }
    found = shown(dashboard.build("p", "e"))
    assert {str(getattr(y, "name", y)) for panels in found.values() for y in panels} == logged
    assert list(found) == [*metric_names.GROUPS, "Pictures"]


def parts_of(name):
    """The top parts of a method that are trained, as its source names them."""
    text = Path(find(name).__file__).read_text()
    return {part for part in dashboard.PARTS if f"self.{part} = " in text or part == "backbone"}


def test_evaluations_and_pictures_have_their_places():
    workspace = dashboard.build("p", "e")
    by_name = {section.name: section for section in workspace.sections}
    (evaluations,) = by_name["Evaluation"].panels
    assert (
        evaluations.metric_regex == "Evaluation/.*"
        and str(getattr(evaluations.x, "name", evaluations.x)) == "evaluated_step"
    )
    assert metric_names.evaluation("knn", "clean") == "Evaluation/knn, clean"
    assert by_name["Pictures"].panels[0].media_keys == [
        "Pictures/views",
        "Pictures/nearest neighbours",
    ]


def test_a_dry_run_prints_what_would_be_sent_without_an_account(capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert dashboard.main(["digits", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text) and "Collapse/RankMe" in text and "digits" in text


def test_bad_input_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments, message in (
        ([], "PROJECT: give the W&B project"),
        (["digits"], "W&B has no key here: run `wandb login`"),
        (["--send", str(tmp_path)], "error: "),
    ):
        assert dashboard.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_the_saved_workspace_is_the_one_that_was_built(monkeypatch):
    sent = []
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ValueError, match="W&B was told to send nothing"):
        dashboard.create("digits", "team")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(
        workspaces.Workspace,
        "save",
        lambda self: sent.append(self) or SimpleNamespace(url="its address"),
    )
    assert dashboard.create("digits", "team") == "its address"
    assert shown(sent[0]) == shown(dashboard.build("digits", "team"))
