"""The dashboard, up to the call to W&B's API."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from ssl_pretrain.launch import dashboard
from ssl_pretrain.methods.base import Monitored
from ssl_pretrain.monitoring import collapse_metrics, metric_names

workspaces = pytest.importorskip(
    "wandb_workspaces.workspaces",
    reason="wandb-workspaces is not installed: pip install '.[dashboard]'",
)
LOGGED_METRICS = {  # test_logger.py and test_collapse.py check that they are logged
    *("loss", "knn", "probe", "lr", "weight_decay", "gradient_norm", "replaced_images"),
    *("images_per_second", "seconds_per_step", "data_wait", "memory_gib", "model_tflops"),
    *("flops_utilization", "teacher_distance", "straggler", "straggler_seconds"),
}


def to_text(metric):
    return str(getattr(metric, "name", metric))


def list_metrics(workspace):
    """Return the metrics in the panels of each section."""
    return {
        section.name: [
            to_text(y) for panel in section.panels for y in getattr(panel, "y", None) or []
        ]
        for section in workspace.sections
    }


def test_every_panel_shows_a_metric_that_is_logged():
    z = torch.randn(16, 4)
    assignments = torch.zeros(16, dtype=torch.int64)
    measurements, _ = collapse_metrics.measure(
        Monitored(z, (z, z), assignments, 5, True), features=z
    )
    logged_names = {metric_names.tracker_name(key) for key in LOGGED_METRICS | measurements.keys()}
    sections = list_metrics(dashboard.build_workspace("p", "e"))
    shown_names = {metric for metrics in sections.values() for metric in metrics}
    assert shown_names == logged_names | {metric_names.SPREAD_CHART}
    assert list(sections) == [*metric_names.GROUPS, "Pictures"]


@pytest.mark.parametrize("prefix", metric_names.TITLE_BY_PREFIX)
def test_one_panel_shows_a_metric_of_all_modules(prefix):
    (network,) = (
        section
        for section in dashboard.build_workspace("p", "e").sections
        if section.name == "Network"
    )
    patterns = [panel.metric_regex for panel in network.panels if panel.metric_regex]
    names = [metric_names.tracker_name(prefix + module) for module in ("backbone", "projector")]
    matches = [sum(bool(re.fullmatch(pattern, name)) for pattern in patterns) for name in names]
    assert matches == [1, 1]


def test_evaluations_and_pictures_have_sections():
    sections = {section.name: section for section in dashboard.build_workspace("p", "e").sections}
    (evaluations,) = sections["Evaluation"].panels
    assert (
        evaluations.metric_regex == "Evaluation/.*" and to_text(evaluations.x) == "evaluated_step"
    )
    assert metric_names.evaluation_name("knn", "clean") == "Evaluation/knn/clean"
    (pictures,) = sections["Pictures"].panels
    assert pictures.media_keys == ["Pictures/views", "Pictures/neighbors"]


def test_a_dry_run_prints_the_view_without_an_account(capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert dashboard.main(["digits", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert (
        json.loads(output)
        and "Collapse/rankme" in output
        and "RankMe" in output
        and "digits" in output
    )


def test_bad_input_is_reported(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments, message in (
        ([], "PROJECT: give the W&B project"),
        (["digits"], "no W&B key was found: run `wandb login`"),
        (["--send", str(tmp_path)], "error: "),
    ):
        assert dashboard.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_nothing_is_created_while_wandb_is_offline(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ValueError, match="W&B is offline or disabled"):
        dashboard.save_workspace("digits", "team")


def test_the_saved_view_is_the_one_that_was_built(monkeypatch):
    saved_workspaces = []

    def save(workspace):
        saved_workspaces.append(workspace)
        return SimpleNamespace(url="its address")

    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(workspaces.Workspace, "save", save)
    assert dashboard.save_workspace("digits", "team") == "its address"
    assert list_metrics(saved_workspaces[0]) == list_metrics(
        dashboard.build_workspace("digits", "team")
    )
