"""Facts about a run that its checkpoints record beside the configuration."""

from dataclasses import dataclass


@dataclass
class RunFacts:
    """Entries of a checkpoint's manifest that do not follow from the configuration alone.

    Each field is stored under its own name. `schema.RENAMED` lists the names that older
    checkpoints use.
    """

    last_step: int  # optimizer steps of the whole run
    micro_batch_size: int  # images per forward pass on each rank
    data: str  # fingerprint of the training images
    wandb_id: str | None = None  # kept by resumed runs, so that W&B shows one run
