"""Repeat one step of a run and say where it breaks: python -m ssl_pretrain.replay RUN STEP

The images and views are drawn again from the seed, the epoch and the numbers of the images. The weights
are those of the newest checkpoint before STEP, trained on to that step. With `--from-checkpoint` the
checkpoint's own weights are taken, for a first look. For a step that the run skipped, the images have to
be those noted in its folder `skipped/`, and a rollback before that step is repeated. Nothing is written.

The step runs in one process, which feeds the whole global batch at once. A run of several ranks, or one
that was fed in micro-batches, is therefore repeated to rounding, not bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssl_pretrain import config as configuration
from ssl_pretrain.build import build_method, build_run_stepper
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.data import loader
from ssl_pretrain.distributed import process_group
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.schema import COUNT


def replay(run: Path, step: int, from_checkpoint: bool = False) -> list[str]:
    """Repeat step `step` and return the lines to print about it.

    Args:
        run: The run's folder.
        step: Number of the step, from 1, as metrics.jsonl and skipped/ count.
        from_checkpoint: Take the checkpoint's weights as they are, without training on to the step.

    Raises:
        ValueError: The run has no checkpoint before that step, has not come to it, or the data set now gives other
            images than were skipped.
    """
    skipped = _noted(run, step)
    _check_step(run, step)
    start, first = _where_to_start(run, step, skipped)
    manifest = checkpoint.opened(start)
    config = replace(configuration.from_dict(manifest["config"]), micro_batch_size=0)
    device = process_group.start(config.parallel.threads, config.parallel.deterministic)
    execution = Execution.resolve(config.parallel, device)
    with loader.build(
        config.data, config.views, seed=config.seed, global_batch_size=config.global_batch_size, device=device,
        view_dtype=execution.view_dtype,
    ) as batches:  # fmt: skip
        method = build_method(config, batches.source)
        method.num_steps, method.steps_per_epoch = manifest["last_step"], batches.steps_per_epoch
        stepper = build_run_stepper(method, config, execution)
        if skipped and skipped["indices"] != batches.indices(step - 1).tolist():
            raise ValueError(
                f"{run}: step {step} skipped other images than the data set gives now; give the data that the run had"
            )
        checkpoint.State(method, stepper.optimizer, {}, {}).load(start)
        first = step - 1 if from_checkpoint else first
        watch = _Watch()
        for now, batch in zip(range(first, step), batches.starting_at(first)):
            progress = now / manifest["last_step"]
            optim.set_rates(
                stepper.optimizer, config.optim, progress, config.epochs, config.global_batch_size
            )
            if now == step - 1:
                watch.begin(method)
            _, logs = stepper(now, progress, batch)
        lines = [
            f"step {step} of {run}, from {start.name}"
            + (" without the steps between" if from_checkpoint else "")
        ]
        if skipped:
            lines.append(
                f"  skipped by the run; its {len(skipped['indices'])} images as noted in skipped/, of epoch {skipped['epoch']}"
            )
        lines += [f"  {name}: {value.item():.6g}" for name, value in logs.items()]
        broken_views = [
            (number, batches.source.name(int(batch.indices[row])))
            for number, view in enumerate(batch.views)
            for row in (~view.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        ]
        lines += [f"  view {number} of {name} is not finite" for number, name in broken_views]
        lines.append(f"  first output that is not finite: {watch.broken or 'none'}")
        return lines + [
            f"  gradient norm of {name}: {norm:.6g}" for name, norm in watch.gradients.items()
        ]


def _noted(run: Path, step: int) -> dict[str, Any]:
    """Return the run's note about a step that it skipped, empty if it did not skip it."""
    note = run / "skipped" / f"step_{step:08d}.json"
    return json.loads(note.read_text()) if note.exists() else {}


def _check_step(run: Path, step: int) -> None:
    """Raise ValueError for a step that the run has not come to, or never will."""
    if step < 1:
        raise ValueError(f"STEP: {step} is no step; they are counted from 1")
    found = checkpoint.checkpoints(run)
    if not found:
        return  # `_where_to_start` reports it
    manifest = checkpoint.opened(checkpoint.newest(run), verified=True)
    last = manifest["last_step"]
    if step > last:
        raise ValueError(
            f"STEP: {step} is after the last step of {run}, {last}; give one from 1 to {last}"
        )
    reached = max(manifest["step"], *_steps_seen(run))
    if (
        step > reached + manifest["config"]["log"]["every_steps"]
    ):  # a step that ended the run is not logged
        raise ValueError(
            f"STEP: {run} has come to step {reached} of {last}, not to {step}; give one from 1 to {reached}"
        )


def _steps_seen(run: Path) -> list[int]:
    """Return the steps that metrics.jsonl and skipped/ tell of, at least 0."""
    seen = [0]
    for path in run.glob("skipped/step_*.json"):
        seen.append(int(path.stem.removeprefix("step_")))
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # cut off by a kill
                seen.append(int(json.loads(line)["step"]))
    return seen


def _where_to_start(run: Path, step: int, skipped: dict[str, Any]) -> tuple[Path, int]:
    """Return the checkpoint whose weights led to that step, and the step after which training went on from them."""
    found = {int(path.name.removeprefix("step_")): path for path in checkpoint.checkpoints(run)}
    before = [saved for saved in found if saved < step]
    if not before:
        raise ValueError(
            f"{run}: no checkpoint before step {step}; the oldest there is cannot have met that batch. Give a later step"
        )
    newest = max(before)
    if newest > skipped.get("rolled_back_after", newest):
        return found[newest], newest
    back = skipped.get("rolled_back_to", newest)
    if back not in found:
        raise ValueError(
            f"{run}: step {step} went on from the checkpoint of step {back}, which is no longer there. Give a later step"
        )
    return found[back], skipped.get("rolled_back_after", newest)


class _Watch:
    """Hooks that find the first module with a non-finite output and the gradient norm of each part of the network."""

    def __init__(self) -> None:
        self.broken = ""
        self.gradients: dict[str, float] = {}
        self._squares: dict[str, float] = {}

    def begin(self, method: nn.Module) -> None:
        for name, module in method.named_modules():
            if name and not list(module.children()):
                module.register_forward_hook(self._look(name))
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._add(name.partition(".")[0]))

    def _look(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self.broken and isinstance(output, Tensor) and not output.isfinite().all():
                self.broken = f"{name} ({type(module).__name__}), {tuple(output.shape)}"

        return hook

    def _add(self, part: str) -> Any:
        def hook(gradient: Tensor) -> None:
            self._squares[part] = (
                self._squares.get(part, 0.0) + gradient.double().square().sum().item()
            )
            self.gradients = {name: square**0.5 for name, square in self._squares.items()}

        return hook


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m ssl_pretrain.replay", description=__doc__, formatter_class=raw
    )
    parser.add_argument("run", type=Path, help="the output folder of a run")
    parser.add_argument(
        "step", type=COUNT, help="the step to repeat, as metrics.jsonl and skipped/ number them"
    )
    parser.add_argument(
        "--from-checkpoint", action="store_true", help="with the checkpoint's own weights"
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
