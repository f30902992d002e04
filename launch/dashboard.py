"""Save a view of runs in Weights & Biases: `python -m ssl_pretrain.launch.dashboard PROJECT`."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from ssl_pretrain.checkpoint.manifest import read_manifest
from ssl_pretrain.fault_tolerance.run_lock import find_holder
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.monitoring.wandb import evaluations
from ssl_pretrain.monitoring.wandb import run as wandb_run
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import optional_packages, program

VIEW_NAME = "ssl_pretrain"
# Only useful when something is wrong, or logged once.
HIDDEN_METRICS = ("skipped_steps", "replay_error", "compile_seconds")
OPEN_SECTIONS = (metric_names.LEARNING, metric_names.COLLAPSE)
PICTURES = [metric_names.VIEWS_PICTURE, metric_names.NEIGHBORS_PICTURE]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = ArgumentParser(
        prog=program.usage_name("python -m ssl_pretrain.launch.dashboard"),
        description="Create a saved view of a project's runs, with sections for learning, "
        "collapse, evaluations, network, speed and pictures. This needs a W&B key and the package "
        "wandb-workspaces.",
        epilog="""examples:
  %(prog)s ssl_pretrain --entity my-team
  %(prog)s ssl_pretrain --dry-run      print the view as JSON, without an account
  %(prog)s --send runs/simclr          send the evaluations of a finished run""",
    )
    parser.add_argument(
        "project", nargs="?", default="", help="W&B project: log.project of the runs"
    )
    parser.add_argument("--entity", default="", help="team or user (default: the API key's owner)")
    parser.add_argument("--dry-run", action="store_true", help="print the view without creating it")
    parser.add_argument("--send", metavar="RUN", type=Path, help="only send this run's evaluations")
    options = parser.parse_args(arguments)
    try:
        if options.send is not None:
            send_evaluations(options.send)
        elif not options.project:
            raise ValueError("PROJECT: give the W&B project, such as ssl_pretrain, or --send RUN")
        elif options.dry_run:
            workspace = build_workspace(options.project, options.entity or "nobody")._to_model()
            print(json.dumps(workspace.model_dump(by_alias=True), indent=1, default=str))
        else:
            print(save_workspace(options.project, options.entity))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def require_packages() -> None:
    """Raise ValueError with the install line if wandb-workspaces is not installed."""
    optional_packages.require("dashboard", "wandb-workspaces", "dashboard")


def build_workspace(project: str, entity: str) -> Any:
    """Build the dashboard as a W&B workspace, without saving it.

    Raises:
        ValueError: If wandb-workspaces is not installed.
    """
    require_packages()
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    contents: dict[str, list[Any]] = {group: [] for group in metric_names.GROUPS}
    for key, curve in metric_names.METRICS.items():
        if key not in HIDDEN_METRICS:
            name = metric_names.tracker_name(key)
            contents[curve.group].append(panels.LinePlot(title=curve.title, x="step", y=[name]))
    spread = metric_names.SPREAD_CHART
    contents[metric_names.COLLAPSE].append(
        panels.LinePlot(title="spread of the dimensions", x="step", y=[spread])
    )
    # One panel per kind of metric, with one line per module.
    for prefix, title in metric_names.TITLE_BY_PREFIX.items():
        regex = f"{metric_names.NETWORK}/{prefix}.*"
        contents[metric_names.NETWORK].append(
            panels.LinePlot(title=title.strip(", "), x="step", metric_regex=regex)
        )
    contents[metric_names.EVALUATION] = [
        panels.LinePlot(
            title="evaluations at their step",
            x="evaluated_step",
            metric_regex=f"{metric_names.EVALUATION}/.*",
        )
    ]
    contents["Pictures"] = [panels.MediaBrowser(media_keys=PICTURES)]
    sections = [
        workspaces.Section(name=name, panels=content, is_open=name in (*OPEN_SECTIONS, "Pictures"))
        for name, content in contents.items()
    ]
    return workspaces.Workspace(name=VIEW_NAME, entity=entity, project=project, sections=sections)


def save_workspace(project: str, entity: str = "") -> str:
    """Save the dashboard to W&B and return its URL.

    Raises:
        ValueError: If there is no key, W&B is offline or disabled, or W&B refuses the dashboard.
    """
    require_packages()
    if not wandb_run.has_api_key():
        raise ValueError(
            "no W&B key was found: run `wandb login` or set WANDB_API_KEY; --dry-run needs no key"
        )
    if wandb_run.resolve_mode("online")[0] != "online":
        raise ValueError(
            "W&B is offline or disabled (WANDB_MODE, WANDB_DISABLED or `wandb offline`); "
            "change that setting, or use --dry-run"
        )
    try:
        import wandb

        team_or_user = entity or wandb.Api().default_entity or ""
        return str(build_workspace(project, team_or_user).save().url)
    except Exception as error:  # the library raises errors of many types
        owner = entity or "your account"
        raise ValueError(
            f"W&B did not accept the dashboard of {owner}/{project}: {error}"
        ) from None


def send_evaluations(run: Path) -> None:
    """Send the results in RUN/eval/ to the run's W&B page, each at the step of its checkpoint.

    Results are sent only once. The run must not be training, because the client of a training run
    sends the results along with its records.

    Raises:
        ValueError: If the run has no checkpoint, or was not logged to W&B.
    """
    manifest = read_manifest(newest_checkpoint(run))
    if not manifest.get("wandb_id"):
        raise ValueError(
            f"{run}: this run was not logged to W&B (log.wandb), so it has no page there; read its "
            f"results in {run / 'eval'} and {run / 'report.html'}"
        )
    if next(evaluations.unsent_results(run), None) is None:
        return
    settings = manifest["config"]["log"]
    mode = settings["wandb"]
    if mode not in ("online", "offline"):
        mode = "online" if wandb_run.has_api_key() else "offline"
    client = wandb_run.start(
        mode,
        run,
        run_id=manifest["wandb_id"],
        print_line=lambda line: print(line, flush=True),
        project=settings["project"],
        name=settings["name"],
        config=manifest["config"],
        tags=list(settings["tags"]),
        group=settings.get("group", ""),  # runs of earlier versions have none
    )
    if client is not None:
        client.close()


def send_evaluations_unless_training(run: Path) -> None:
    """Send the results if the run has a W&B page and is not training. Print an error, if any."""
    if find_holder(run) is None and any(_has_wandb_page(path) for path in list_checkpoints(run)):
        try:
            send_evaluations(run)
        except (ValueError, OSError) as error:  # the evaluations are complete without W&B
            print(
                f"W&B: the results were not sent ({error}); they are in {run / 'eval'}", flush=True
            )


def _has_wandb_page(checkpoint: Path) -> bool:
    """Return True if the checkpoint belongs to a run that was logged to W&B."""
    with suppress(ValueError):
        return bool(read_manifest(checkpoint).get("wandb_id"))
    return False


if __name__ == "__main__":
    sys.exit(main())
