"""A ready dashboard in Weights & Biases: python -m ssl_pretrain.launch.dashboard PROJECT"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.fault_tolerance import run_lock
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.monitoring.wandb import run as wandb_run

NAME = "ssl_pretrain"
PARTS = (
    "backbone",
    "projector",
    "predictor",
    "head",
    "prototypes",
)  # of the methods, as their gradients are named
HIDDEN = (
    "skipped_steps",
    "replay_error",
)  # of use when something is wrong: not on the first screen
SPREAD = f"{metric_names.COLLAPSE}/spread of the dimensions"
PICTURES = ("Pictures/views", "Pictures/nearest neighbours")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ssl_pretrain.launch.dashboard",
        description="Creates a saved view of a project's runs: learning, collapse, evaluations, network, speed and pictures, each "
        "with its curves. It needs W&B's key and the package wandb-workspaces.",
        epilog="""examples:
  python -m ssl_pretrain.launch.dashboard ssl_pretrain --entity my-team
  python -m ssl_pretrain.launch.dashboard ssl_pretrain --dry-run            what would be created, as JSON, without an account
  python -m ssl_pretrain.launch.dashboard --send runs/simclr                the evaluations of a run that has ended, to its own W&B run""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("project", nargs="?", default="", help="of W&B: the runs' log.project")
    parser.add_argument("--entity", default="", help="team or user (default: the key's own)")
    parser.add_argument("--dry-run", action="store_true", help="print it, and create nothing")
    parser.add_argument("--send", metavar="RUN", type=Path, help="send a run's evaluations instead")
    options = parser.parse_args(arguments)
    try:
        if options.send is not None:
            send_evaluations(options.send)
        elif not options.project:
            raise ValueError("PROJECT: give the W&B project, such as ssl_pretrain, or --send RUN")
        elif options.dry_run:
            built = build(options.project, options.entity or "nobody")._to_model()
            print(json.dumps(built.model_dump(by_alias=True), indent=1, default=str))
        else:
            print(create(options.project, options.entity))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def panels() -> dict[str, list[str]]:
    """The keys of metrics.jsonl in each section, a panel each; the network's are one panel a list of parts."""
    found: dict[str, list[str]] = {group: [] for group in metric_names.GROUPS}
    for key, curve in metric_names.CURVES.items():
        if key not in HIDDEN:
            found[curve.group].append(key)
    return found


def build(project: str, entity: str) -> Any:
    """The workspace, not saved.

    Raises:
        ValueError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panel
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise ValueError(
            "the dashboard needs wandb-workspaces: pip install 'ssl_pretrain[dashboard]'"
        ) from None

    def plot(title: str, keys: list[Any], x: str = "step") -> Any:
        return panel.LinePlot(title=title, x=x, y=keys)

    sections = []
    for group, keys in panels().items():
        shown = [plot(metric_names.of(key).title, [metric_names.name(key)]) for key in keys]
        if group == metric_names.COLLAPSE:
            shown.append(plot("spread of the dimensions", [SPREAD]))
        if group == metric_names.NETWORK:
            for prefix, title in metric_names.PREFIXES.items():
                shown.append(
                    plot(title.strip(", "), [metric_names.name(prefix + part) for part in PARTS])
                )
        if group == metric_names.EVALUATION:
            shown = [
                panel.LinePlot(
                    title="evaluations at their step",
                    x="evaluated_step",
                    metric_regex=f"{metric_names.EVALUATION}/.*",
                )
            ]
        sections.append(
            workspaces.Section(
                name=group,
                panels=shown,
                is_open=group in (metric_names.LEARNING, metric_names.COLLAPSE),
            )
        )
    sections.append(
        workspaces.Section(
            name="Pictures", panels=[panel.MediaBrowser(media_keys=list(PICTURES))], is_open=True
        )
    )
    return workspaces.Workspace(name=NAME, entity=entity, project=project, sections=sections)


def create(project: str, entity: str = "") -> str:
    """Saves the dashboard at W&B and returns its address.

    Raises:
        ValueError: no key, or W&B refuses; says what to do.
    """
    if not wandb_run.has_key():
        raise ValueError(
            "W&B has no key here: run `wandb login`, or set WANDB_API_KEY; --dry-run needs none"
        )
    if wandb_run.mode_of("online")[0] != "online":
        raise ValueError(
            "W&B was told to send nothing (WANDB_MODE, WANDB_DISABLED or `wandb offline`); undo that, or give --dry-run"
        )
    try:
        return str(build(project, entity or _own_entity()).save().url)
    except Exception as error:  # whatever the client raises: no network, no such project, no rights
        raise ValueError(
            f"W&B did not take the dashboard of {entity or 'your account'}/{project}: {error}"
        ) from None


def _own_entity() -> str:
    """The key's default team or user, as W&B says."""
    import wandb

    return wandb.Api().default_entity or ""


def send_evaluations(run: Path) -> None:
    """Sends RUN/eval/ to the run's own W&B run, each at the step it judged; what was sent already is not sent again.

    For a run that nobody trains any more: while it is trained, its own client takes them along with its records.

    Raises:
        ValueError: the run has no checkpoint, or was not logged to W&B.
    """
    manifest = checkpoint.verify(checkpoint.newest(run))
    if not manifest.get("wandb_id"):
        raise ValueError(
            f"{run}: was not logged to W&B (log.wandb); its numbers are in {run / 'eval'} and in eval.report's page"
        )
    if next(wandb_run.unsent(run), None) is None:
        return
    settings = manifest["config"]["log"]
    asked = (
        settings["wandb"]
        if settings["wandb"] in ("online", "offline")
        else "online"
        if wandb_run.has_key()
        else "offline"
    )
    mode, line = wandb_run.mode_of(asked)
    if line:
        print(line, flush=True)
    if mode == "off":
        return
    wandb_run.WandbRun(
        run, mode=mode, project=settings["project"], name=settings["name"] or run.resolve().name, run_id=manifest["wandb_id"],
        config=manifest["config"], tags=list(settings["tags"]),
    ).close()  # fmt: skip


def send(run: Path) -> None:
    """Sends the results to the run's own W&B page, if it has one and no training does it, or says why not."""
    if run_lock.holder(run) is not None or not any(
        _wandb_id(path) for path in checkpoint.checkpoints(run)
    ):
        return
    try:
        send_evaluations(run)
    except (ValueError, OSError) as error:  # the numbers are on disk, and the evaluations go on
        print(f"W&B: the results were not sent ({error}); they are in {run / 'eval'}", flush=True)


def _wandb_id(path: Path) -> str | None:
    with suppress(OSError, ValueError):
        return json.loads((path / checkpoint.MANIFEST).read_text()).get("wandb_id")
    return None


if __name__ == "__main__":
    sys.exit(main())
