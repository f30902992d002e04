"""Build and resume checkpoints of a small network, for the tests of this folder."""

from torch import nn

from ssl_pretrain.checkpoint.checkpoints import CheckpointConfig, Checkpoints, RunFacts
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig


def build_linear_state() -> TrainingState:
    """Return the state of an untrained method with a linear backbone."""
    method = nn.Module()
    method.backbone = nn.Linear(3, 2)
    return TrainingState(method, optim.build(OptimConfig(), method))


def build_checkpoints(run, state, config=None, last_step=100, steps_per_epoch=1, **settings):
    """Return the checkpoints of a run with the given settings of `CheckpointConfig`."""
    facts = RunFacts(last_step, micro_batch_size=8, data="abc")
    checkpoint_config = CheckpointConfig(**settings)
    return Checkpoints(run, state, checkpoint_config, facts, config or {}, steps_per_epoch)


def resume(run, state) -> int:
    """Restore the newest checkpoint of a run and return its step."""
    return build_checkpoints(run, state).resume(check_config=lambda saved_config, path: None)
