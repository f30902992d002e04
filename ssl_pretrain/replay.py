"""Repeat one step of a run and report where non-finite values first appear.

    python -m ssl_pretrain.replay RUN STEP

The images and views follow from the seed, the epoch and the indices of the images. Training starts
from the newest checkpoint before the step and continues to the step. With `--from-checkpoint`, the
steps in between are left out for a quick look. If the run skipped the step, the images must match
the record in the run's folder `skipped/`, and a rollback before the step is repeated. The command
writes no files.

The step runs in one process with the whole global batch as one micro-batch. A run on several ranks
or with micro-batches is therefore repeated up to rounding, not bit for bit.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssl_pretrain import build
from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from ssl_pretrain.checkpoint.manifest import read_manifest, verify_checkpoint
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.distributed import process_group
from ssl_pretrain.monitoring import records
from ssl_pretrain.optim import optimizers, schedules
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.schema import POSITIVE_INT
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program


def replay(run: Path, step: int, from_checkpoint: bool = False) -> list[str]:
    """Repeat a step and return the lines of its report.

    Args:
        run: Folder of the run.
        step: Number of the step, counted from 1, as in metrics.jsonl and skipped/.
        from_checkpoint: Leave out the steps between the checkpoint and this step.

    Raises:
        ValueError: If the run has not reached the step or has no checkpoint before it, or if the
            images differ from those that the run skipped.
    """
    record_path = run / "skipped" / f"step_{step:08d}.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
    _require_reached(run, step)
    path, num_steps_done = _starting_point(run, step, record)
    verify_checkpoint(path)
    manifest = read_manifest(path)
    config = replace(configuration.from_dict(manifest["config"]), micro_batch_size=0)
    device = process_group.start(config.parallel.threads, config.parallel.deterministic)
    execution = Execution.resolve(config.parallel, device)
    with build.build_loader(config, execution) as loader:
        if record and record["indices"] != loader.indices(step - 1).tolist():
            raise ValueError(
                f"{run}: the images of step {step} differ from those that the run skipped; restore "
                "the run's data set"
            )
        method = build.build_method(config, loader.source)
        stepper = build.build_run_stepper(method, config, execution)
        TrainingState(method, stepper.optimizer).restore(path)
        num_steps_done = step - 1 if from_checkpoint else num_steps_done
        batches = loader.iterate_from(num_steps_done)
        for index, batch in zip(range(num_steps_done, step), batches):
            progress = schedules.Progress(index, manifest["last_step"], loader.steps_per_epoch)
            optimizers.set_rates(
                stepper.optimizer, config.optim, progress, config.epochs, config.global_batch_size
            )
            if index == step - 1:
                probe = _Probe(method)
            logs = stepper(progress, batch).logs
        shortcut = ", without the steps in between" if from_checkpoint else ""
        lines = [f"step {step} of {run}, from {path.name}{shortcut}"]
        if record:
            lines.append(
                f"  skipped by the run in epoch {record['epoch']}; its {len(record['indices'])} "
                "images match the record in skipped/"
            )
        lines += [f"  {name}: {value.item():.6g}" for name, value in logs.items()]
        lines += [
            f"  view {number} of {loader.source.name(int(batch.indices[row]))} is not finite"
            for number, view in enumerate(batch.views)
            for row in (~view.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        ]
        return lines + probe.describe()


def _require_reached(run: Path, step: int) -> None:
    if not list_checkpoints(run):
        return  # `_starting_point` raises the error
    manifest = read_manifest(newest_checkpoint(run))
    last_step = manifest["last_step"]
    if step > last_step:
        raise ValueError(
            f"STEP: {step} is after the last step of {run}; give a step from 1 to {last_step}"
        )
    newest_step = max(manifest["step"], *_recorded_steps(run))
    # A run may end at a step that it does not log.
    if step > newest_step + manifest["config"]["log"]["every_steps"]:
        raise ValueError(
            f"STEP: {run} has only reached step {newest_step} of {last_step}, so step {step} "
            f"cannot be repeated; give a step from 1 to {newest_step}"
        )


def _recorded_steps(run: Path) -> list[int]:
    """Return 0 and the steps recorded in skipped/ and metrics.jsonl."""
    skipped_steps = [_step_of(path) for path in run.glob("skipped/step_*.json")]
    logged_steps = [record["step"] for record in records.read(run / "metrics.jsonl")]
    return [0, *skipped_steps, *logged_steps]


def _starting_point(run: Path, step: int, record: dict[str, Any]) -> tuple[Path, int]:
    """Return the checkpoint that led to a step, and the step after which training continued."""
    paths = {_step_of(path): path for path in list_checkpoints(run)}
    start = max((saved_step for saved_step in paths if saved_step < step), default=None)
    if start is None:
        raise ValueError(
            f"{run}: no checkpoint before step {step} is left to start from; give a later step"
        )
    if start > record.get("rolled_back_after", start):
        return paths[start], start
    restored_step = record.get("rolled_back_to", start)
    if restored_step not in paths:
        raise ValueError(
            f"{run}: step {step} followed a rollback to the checkpoint of step {restored_step}, "
            "which no longer exists; give a later step"
        )
    return paths[restored_step], record.get("rolled_back_after", start)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


class _Probe:
    """Hooks that find the first module with a non-finite output and measure gradient norms."""

    def __init__(self, method: nn.Module):
        self._first_nonfinite_output = ""
        self._squared_norms: dict[str, float] = defaultdict(float)
        for name, module in method.named_modules():
            if name and not list(module.children()):
                module.register_forward_hook(partial(self._check_output, name))
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._add_gradient, name.partition(".")[0]))

    def _check_output(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        if (
            not self._first_nonfinite_output
            and isinstance(output, Tensor)
            and not output.isfinite().all()
        ):
            self._first_nonfinite_output = (
                f"{name} ({type(module).__name__}), {tuple(output.shape)}"
            )

    def _add_gradient(self, child: str, gradient: Tensor) -> None:
        self._squared_norms[child] += gradient.double().square().sum().item()

    def describe(self) -> list[str]:
        """Return the lines of the report, with one gradient norm per child of the method."""
        return [f"  first output that is not finite: {self._first_nonfinite_output or 'none'}"] + [
            f"  gradient norm of {name}: {squared_norm**0.5:.6g}"
            for name, squared_norm in self._squared_norms.items()
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command-line interface and return the exit status."""
    parser = ArgumentParser(
        prog=program.usage_name("python -m ssl_pretrain.replay"),
        description=__doc__,
    )
    parser.add_argument("run", type=Path, help="output folder of a run")
    parser.add_argument(
        "step", type=POSITIVE_INT, help="step number, as in metrics.jsonl and skipped/"
    )
    parser.add_argument(
        "--from-checkpoint",
        action="store_true",
        help="leave out the steps between the checkpoint and this step",
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
