"""Repeat one step of a run and report where it breaks.

    python -m ssl_pretrain.replay RUN STEP

The images and views follow from the seed, the epoch and the indices of the images. The weights are
those of the newest checkpoint before the step, trained on to that step. With `--from-checkpoint`
the checkpoint's own weights are used, for a first look. If the run skipped the step, the images
must be those recorded in its folder `skipped/`, and a rollback before the step is repeated. Nothing
is written.

The step runs in one process with the whole global batch as one micro-batch. A run of several ranks
or micro-batches is therefore repeated to rounding, not bit for bit.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssl_pretrain import build
from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from ssl_pretrain.checkpoint.manifest import read_manifest, verify
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.distributed import process_group
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.schema import COUNT
from ssl_pretrain.views.batch import Batch


def replay(run: Path, step: int, from_checkpoint: bool = False) -> list[str]:
    """Repeat a step and return the lines to print about it.

    Args:
        run: Folder of the run.
        step: Number of the step, counted from 1, as in metrics.jsonl and skipped/.
        from_checkpoint: Use the checkpoint's weights as they are, without training on to the step.

    Raises:
        ValueError: The run has no checkpoint before that step or has not reached it, or the data
            set does not yield the images that were skipped.
    """
    record = _skip_record(run, step)
    _check_reached(run, step)
    path, first = _start(run, step, record)
    verify(path)
    manifest = read_manifest(path)
    config = replace(configuration.from_dict(manifest["config"]), micro_batch_size=0)
    device = process_group.start(config.parallel.threads, config.parallel.deterministic)
    execution = Execution.resolve(config.parallel, device)
    with build.build_loader(config, execution) as loader:
        if record and record["indices"] != loader.indices(step - 1).tolist():
            raise ValueError(
                f"{run}: step {step} skipped other images than the data set gives now; give the "
                "data that the run had"
            )
        method = build.build_method(config, loader.source)
        stepper = build.build_run_stepper(method, config, execution)
        TrainingState(method, stepper.optimizer).restore(path)
        first = step - 1 if from_checkpoint else first
        for steps_done, batch in zip(range(first, step), loader.starting_at(first)):
            progress = Progress(steps_done, manifest["last_step"], loader.steps_per_epoch)
            optim.set_rates(
                stepper.optimizer, config.optim, progress, config.epochs, config.global_batch_size
            )
            if steps_done == step - 1:
                probe = _Probe(method)
            logs = stepper(progress, batch).logs
        lines = [
            f"step {step} of {run}, from {path.name}"
            + (" without the steps between" if from_checkpoint else "")
        ]
        if record:
            lines.append(
                f"  skipped by the run; its {len(record['indices'])} images as recorded in "
                f"skipped/, of epoch {record['epoch']}"
            )
        lines += [f"  {name}: {value.item():.6g}" for name, value in logs.items()]
        lines += [
            f"  view {number} of {loader.source.name(index)} is not finite"
            for number, index in _bad_views(batch)
        ]
        return lines + probe.describe()


def _skip_record(run: Path, step: int) -> dict[str, Any]:
    """Return the run's record of a step that it skipped, empty if it did not skip it."""
    path = run / "skipped" / f"step_{step:08d}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _check_reached(run: Path, step: int) -> None:
    if not list_checkpoints(run):
        return  # `_start` reports it
    manifest = read_manifest(newest_checkpoint(run))
    last = manifest["last_step"]
    if step > last:
        raise ValueError(
            f"STEP: {step} is after the last step of {run}, {last}; give one from 1 to {last}"
        )
    reached = max(manifest["step"], *_recorded_steps(run))
    # The step that ended the run is not logged.
    if step > reached + manifest["config"]["log"]["every_steps"]:
        raise ValueError(
            f"STEP: {run} has come to step {reached} of {last}, not to {step}; give one from 1 to "
            f"{reached}"
        )


def _recorded_steps(run: Path) -> list[int]:
    """Return the steps recorded in skipped/ and metrics.jsonl, and 0."""
    steps = [_step_of(path) for path in run.glob("skipped/step_*.json")]
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line cut short by a kill
                steps.append(int(json.loads(line)["step"]))
    return [0, *steps]


def _start(run: Path, step: int, record: dict[str, Any]) -> tuple[Path, int]:
    """Return the checkpoint that led to a step, and the step after which training continued."""
    paths = {_step_of(path): path for path in list_checkpoints(run)}
    newest = max((saved for saved in paths if saved < step), default=None)
    if newest is None:
        raise ValueError(
            f"{run}: no checkpoint before step {step}; the oldest there is cannot have met that "
            "batch. Give a later step"
        )
    if newest > record.get("rolled_back_after", newest):
        return paths[newest], newest
    restored = record.get("rolled_back_to", newest)
    if restored not in paths:
        raise ValueError(
            f"{run}: step {step} went on from the checkpoint of step {restored}, which is no "
            "longer there. Give a later step"
        )
    return paths[restored], record.get("rolled_back_after", newest)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _bad_views(batch: Batch) -> list[tuple[int, int]]:
    """Return the view's number and the image's index for each view that is not finite."""
    return [
        (number, int(batch.indices[row]))
        for number, view in enumerate(batch.views)
        for row in (~view.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    ]


class _Probe:
    """Hooks that find the first module with a non-finite output and measure gradient norms."""

    def __init__(self, method: nn.Module):
        self._bad_output = ""
        self._squared_norms: dict[str, float] = defaultdict(float)
        for name, module in method.named_modules():
            if name and not list(module.children()):
                module.register_forward_hook(partial(self._check_output, name))
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._add_gradient, name.partition(".")[0]))

    def _check_output(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not self._bad_output and isinstance(output, Tensor) and not output.isfinite().all():
            self._bad_output = f"{name} ({type(module).__name__}), {tuple(output.shape)}"

    def _add_gradient(self, child: str, gradient: Tensor) -> None:
        self._squared_norms[child] += gradient.double().square().sum().item()

    def describe(self) -> list[str]:
        """Return the lines about the step, with one gradient norm per child of the method."""
        return [f"  first output that is not finite: {self._bad_output or 'none'}"] + [
            f"  gradient norm of {name}: {square**0.5:.6g}"
            for name, square in self._squared_norms.items()
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ssl_pretrain.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="output folder of a run")
    parser.add_argument("step", type=COUNT, help="the step, as in metrics.jsonl and skipped/")
    parser.add_argument(
        "--from-checkpoint", action="store_true", help="use its weights as they are"
    )
    options = parser.parse_args(arguments)
    try:
        print("\n".join(replay(options.run, options.step, options.from_checkpoint)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        process_group.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
