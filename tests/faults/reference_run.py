"""Fixtures for the fault tests: a configuration, and its run without faults."""

import pytest
import ranks
import tiny
import torch

from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from ssl_pretrain.checkpoint.manifest import verify_checkpoint

STEPS = 12  # 4 epochs of 3 steps
# Each of three ranks is a batch-norm group. A step then waits for the other ranks a few times
# rather than a hundred times, which matters on a busy machine.
OVERRIDES = ("checkpoint.every_epochs=1", "epochs=4", "parallel.bn_group_images=8")


def saved_steps(run):
    """Return the steps of the run's checkpoints."""
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(run)]


@pytest.fixture
def paths(tmp_path):
    """Return the path of a YAML file and the folder of its run."""
    return tiny.write_config(tmp_path), tmp_path / "run"


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Return the tensors of a run of three ranks without faults."""
    folder = tmp_path_factory.mktemp("reference")
    statuses, output = ranks.run(tiny.write_config(folder), *OVERRIDES)
    assert statuses == [0, 0, 0], output
    return ranks.load_tensors(folder / "run")


@pytest.fixture
def resume(paths, reference):
    """Return a function that resumes the run without faults and returns its output.

    The run must end with exactly the tensors of the reference run.
    """
    path, run = paths

    def resume_and_compare(*arguments, **options):
        statuses, output = ranks.run(path, *OVERRIDES, *arguments, **options)
        assert statuses == [0] * len(statuses), output
        assert verify_checkpoint(newest_checkpoint(run))["step"] == STEPS
        tensors = ranks.load_tensors(run)
        names = [name for name, value in reference.items() if not torch.equal(tensors[name], value)]
        assert not names, f"tensors that differ: {names}"
        assert not list((run / "checkpoints").glob(".writing-*"))
        return output

    return resume_and_compare
