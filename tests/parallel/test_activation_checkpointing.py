"""Recomputed blocks train the same weights and save fewer activations."""

from dataclasses import replace

import networks
import pytest
import torch
from networks import run


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["blocks", "selective"])
@pytest.mark.parametrize("name", ["simclr", "moco_v3"])
def test_recomputed_activations_change_no_bit(name, mode, precision):
    backbone = {"drop_path": 0.3} if name == "moco_v3" else {}
    stored, recomputed = (
        run(name, 2, backbone=backbone, precision=precision, activation_checkpointing=choice)[
            "state"
        ]
        for choice in ("none", mode)
    )
    assert all(torch.equal(recomputed[key], value) for key, value in stored.items())


def _measure_saved_bytes(mode):
    """Return the bytes that autograd saves outside of blocks in one forward pass.

    Tensors saved inside recomputed blocks do not pass these hooks.
    """
    stepper, sizes = networks.build_case("moco_v3", activation_checkpointing=mode)
    byte_counts = []

    def pack(tensor):
        byte_counts.append(tensor.numel() * tensor.element_size())
        return tensor

    batch = networks.random_batch(0, sizes)
    batch = replace(batch, views=stepper.execution.place_views(batch.views))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stepper.model(batch)
    return sum(byte_counts)


def test_recomputed_blocks_save_fewer_bytes():
    assert _measure_saved_bytes("blocks") < 0.6 * _measure_saved_bytes("none")
