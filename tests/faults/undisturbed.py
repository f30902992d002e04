"""Fixtures of this folder's tests, to be imported: one configuration, and the run that nobody disturbs."""

from __future__ import annotations

import pytest
import ranks
import tiny
import torch

from ssl_pretrain.checkpoint import state as checkpoint

STEPS = 12  # 4 epochs of 3 steps
# each of three ranks is a group of batch norm: a step then waits for the others a few times instead of a hundred, on a busy machine too
MORE = ("checkpoint.every_epochs=1", "epochs=4", "parallel.bn_group_images=8")


@pytest.fixture
def place(tmp_path):
    """(the YAML, the run's folder)."""
    return tiny.config(tmp_path), tmp_path / "run"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The tensors of three ranks' undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    statuses, said = ranks.run(tiny.config(folder), *MORE)
    assert statuses == [0, 0, 0], said
    return ranks.weights(folder / "run")


@pytest.fixture
def goes_on(place, undisturbed):
    """Starts the run again, without a fault, and compares its end with the undisturbed run's, bit for bit; what it said."""

    def start_again(*arguments, **named):
        statuses, said = ranks.run(place[0], *MORE, *arguments, **named)
        assert statuses == [0] * len(statuses), said
        assert checkpoint.verify(checkpoint.newest(place[1]))["step"] == STEPS
        tensors = ranks.weights(place[1])
        different = [
            name for name, value in undisturbed.items() if not torch.equal(tensors[name], value)
        ]
        assert not different, different
        assert not list((place[1] / "checkpoints").glob(".writing-*"))
        return said

    return start_again
