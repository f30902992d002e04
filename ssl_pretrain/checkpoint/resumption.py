"""Resume a run, and recognize one that has nothing left to train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_pretrain.checkpoint import folder, rank_agreement
from ssl_pretrain.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from ssl_pretrain.checkpoint.manifest import read_manifest
from ssl_pretrain.distributed import collectives

# Called with `saved`, the configuration in a manifest, and `path`, its checkpoint. Raises
# ValueError if this run may not continue from it.
Compare = Callable[..., None]


def resume(checkpoints: Checkpoints, compare: Compare) -> int:
    """Prepare the run's folder and restore its newest checkpoint.

    Args:
        checkpoints: The run's checkpoints.
        compare: Compares the checkpoint's configuration with this run's.

    Returns:
        The steps done so far, 0 for a new run.

    Raises:
        ValueError: The run cannot resume with this configuration or these images.
    """
    run, fingerprint = checkpoints.run, checkpoints.facts.data
    folder.prepare_folder(run)
    rank_agreement.check_checkpoints(run)

    def check(manifest: dict[str, Any]) -> None:
        compare(saved=manifest["config"], path=str(folder.checkpoint_path(run, manifest["step"])))
        if manifest.get("data", fingerprint) != fingerprint:
            raise ValueError(
                f"data.root: the training images are not those that {run} was trained on (another "
                f"list of files); give that data set, or a new output with backbone.init={run}"
            )

    return checkpoints.resume(check)


def finished_step(
    run: Path, settings: CheckpointConfig, epochs: float, compare: Compare
) -> int | None:
    """Return the last step of a run that has nothing left to train, None for any other.

    Nothing is written. Only rank 0 reads the checkpoints.

    Raises:
        ValueError: The run has done these epochs already and was configured otherwise.
    """
    if not settings.resume:
        return None
    return collectives.run_on_main(lambda: _finished_step(run, epochs, compare))


def _finished_step(run: Path, epochs: float, compare: Compare) -> int | None:
    path = folder.newest_if_reached(run, epochs)
    if path is None:
        return None
    manifest = read_manifest(path)
    saved_epochs, step = manifest["config"]["epochs"], int(manifest["step"])
    if saved_epochs != epochs:
        raise ValueError(
            f"epochs: {epochs} leaves nothing to train: {run} has reached step {step} with "
            f"epochs={saved_epochs}. Nothing was changed; give epochs={saved_epochs} or more, or a "
            "new output"
        )
    compare(saved=manifest["config"], path=str(path))
    return step
