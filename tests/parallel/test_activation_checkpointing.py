"""Recomputed blocks train the same weights and save fewer activations."""

from dataclasses import replace
from functools import partial

import networks
import pytest
import torch
from networks import run

from ssl_pretrain.parallel.execution import Execution


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["blocks", "selective"])
@pytest.mark.parametrize("name", ["simclr", "moco_v3"])
def test_recomputed_activations_change_no_bit(name, mode, precision, monkeypatch):
    settings = {"precision": precision, "backbone": {}}
    if name == "moco_v3":
        settings["backbone"] = {"drop_path": 0.3}
    recomputed = run(name, 2, activation_checkpointing=mode, **settings)["state"]
    if mode == "selective" and precision == "bfloat16":
        # This mode casts a block's weights again for each view, so that their gradients are added
        # in float32. With cached casts they are added in bfloat16.
        uncached = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
        monkeypatch.setattr(Execution, "forward_context", lambda self: uncached())
        recomputed = run(name, 2, activation_checkpointing=mode, **settings)["state"]
    stored = run(name, 2, **settings)["state"]
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
