"""Resume a run, and recognize one that has nothing left to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_pretrain.checkpoint import rank_agreement
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.checkpoint.state import CheckpointConfig
from ssl_pretrain.distributed import collectives, process_group

# Called with `saved`, the configuration in a manifest, and `path`, its checkpoint. Raises ValueError
# if this run may not go on from it.
Compare = Callable[..., None]


def resume(
    state: checkpoint.State,
    run: Path,
    settings: CheckpointConfig,
    fingerprint: str,
    compare: Compare,
) -> int:
    """Prepare the run's folder and load its newest checkpoint.

    Args:
        state: The state to load into.
        run: The run's folder.
        settings: Says whether to resume.
        fingerprint: Fingerprint of the training images.
        compare: Compares the checkpoint's configuration with this run's.

    Returns:
        The steps done so far, 0 for a new run.

    Raises:
        ValueError: The run cannot resume with this configuration or these images.
    """
    checkpoint.prepare(run)
    rank_agreement.check_checkpoints(
        run, lambda: [path / checkpoint.MANIFEST for path in checkpoint.checkpoints(run)]
    )

    def check(manifest: dict[str, Any]) -> None:
        path = checkpoint.folder_of(run, manifest["step"])
        compare(saved=manifest["config"], path=str(path))
        if manifest.get("data", fingerprint) != fingerprint:
            raise ValueError(
                f"data.root: the training images are not those that {run} was trained on (another "
                f"list of files); give that data set, or a new output with backbone.init={run}"
            )

    return state.resume(run, settings, check)


def finished_step(
    run: Path, settings: CheckpointConfig, epochs: float, compare: Compare
) -> int | None:
    """Return the last step of a run that has nothing left to train, None for any other.

    Nothing is written. Only rank 0 reads the checkpoints.

    Raises:
        ValueError: The run has done these epochs already and was configured otherwise.
    """
    step = problem = None
    if process_group.is_main() and settings.resume:
        try:
            step = _finished_step(run, epochs, compare)
        except ValueError as error:
            problem = str(error)
    step, problem = collectives.broadcast_object((step, problem))
    if problem:
        raise ValueError(problem)
    return step


def _finished_step(run: Path, epochs: float, compare: Compare) -> int | None:
    path = checkpoint.last_that_reached(run, epochs)
    if path is None:
        return None
    manifest = checkpoint.opened(path, verified=True)
    saved_epochs, step = manifest["config"]["epochs"], int(manifest["step"])
    if saved_epochs != epochs:
        raise ValueError(
            f"epochs: {epochs} leaves nothing to train: {run} has reached step {step} with "
            f"epochs={saved_epochs}. Nothing was changed; give epochs={saved_epochs} or more, or a "
            "new output"
        )
    compare(saved=manifest["config"], path=str(path))
    return step
