"""A training step on a pretended GPU never makes the host wait and never mixes devices.

The step is that of `Stepper` in two micro-batches, with autocast on: forward pass, targets, loss,
backward pass, masked optimizer step, batch norm's snapshots and `after_step`.
"""

import fake_step
import numpy as np
import pytest
import torch
from fake_cuda import DEVICE, pretend_cuda
from host_waits import HostWaitError, MixedDeviceError, RefuseHostWaits
from suites import quick_and_full

from ssl_pretrain import methods
from ssl_pretrain.step import Stepper
from ssl_pretrain.views import masks
from ssl_pretrain.views.mask_recipe import Mask
from ssl_pretrain.views.recipe import Crop, ViewsConfig

# Methods that couple the images of a batch in different ways.
STEMS = quick_and_full(
    [f"{name}_cifar10" for name in ("simclr", "moco", "byol", "vicreg", "swav", "ijepa", "cpc")],
    [*fake_step.SMALL, *fake_step.IMAGENET],
)


def test_every_method_has_a_configuration():
    names = {fake_step.load(stem).method.name for stem in fake_step.SMALL}
    assert sorted(names) == methods.names()


@pytest.mark.parametrize("stem", STEMS)
def test_a_step_in_two_micro_batches_never_waits(stem, monkeypatch):
    run, passes = fake_step.load(stem), []
    for name in ("_backward_in_one_pass", "_backward_in_two_passes"):
        original = getattr(Stepper, name)
        monkeypatch.setattr(
            Stepper,
            name,
            lambda *arguments, name=name, original=original: (
                passes.append(name) or original(*arguments)
            ),
        )
    with pretend_cuda():
        stepper, batch = fake_step.build(run, num_micro_batches=2)
        if stepper.method.couples == "targets":
            with pytest.raises(ValueError, match="cannot be trained in micro-batches"):
                fake_step.take_step(stepper, batch)
            return
        output = fake_step.take_step(stepper, batch)
    assert {value.device for value in output.logs.values()} == {DEVICE}
    takes_two = stepper.method.couples == "embeddings"
    assert passes == ["_backward_in_two_passes" if takes_two else "_backward_in_one_pass"]


def test_masks_reach_the_gpu_and_become_grids_without_a_wait():
    views = ViewsConfig({"global": Crop(count=1, mask=Mask("multiblock"))})
    position = masks.Position(0, 0, 0, np.arange(4), first_slot=0, global_batch_size=4)
    mask_sets = masks.draw(views, position)
    with pretend_cuda(), RefuseHostWaits():
        blank = masks.blank(views, 4, DEVICE)
        for mask_set in (*blank, *(mask_set.upload(DEVICE) for mask_set in mask_sets)):
            grid = mask_set.as_grid(196)
            assert (grid.device, grid.shape) == (DEVICE, (4, 196))


def add_cpu_tensor(z):
    return z + torch.ones(z.shape)


def index_with_a_mask(z):
    return z[z > 0].sum() + z


def index_with_a_list(z):
    return z[[0, 1]].sum() + z


FAULTS = {
    "item": (lambda z: z * z.sum().item(), HostWaitError, "_local_scalar_dense"),
    "if": (lambda z: z if z.sum() > 0 else -z, HostWaitError, "_local_scalar_dense|is_nonzero"),
    "tolist": (lambda z: z * z[0].tolist()[0], HostWaitError, "to the CPU|_local_scalar_dense"),
    "boolean index": (index_with_a_mask, HostWaitError, "boolean mask|nonzero"),
    "nonzero": (lambda z: z + z.nonzero().sum(), HostWaitError, "nonzero"),
    "masked_select": (lambda z: z + z.masked_select(z > 0).sum(), HostWaitError, "masked_select"),
    "unique": (lambda z: z + z.unique().sum(), HostWaitError, "unique"),
    "copy to the CPU": (lambda z: z + z.cpu().sum().to(DEVICE), HostWaitError, "to the CPU"),
    "copy from pageable memory": (
        lambda z: z * torch.tensor([2.0], device=DEVICE),
        HostWaitError,
        "not in pinned memory",
    ),
    "synchronize": (lambda z: torch.cuda.synchronize() or z, HostWaitError, "synchronize"),
    "CPU tensor": (add_cpu_tensor, MixedDeviceError, "mixes devices"),
    "list of indices": (index_with_a_list, HostWaitError, "not in pinned memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_loss_is_found(fault):
    change, error, message = FAULTS[fault]
    with pretend_cuda():
        stepper, batch = fake_step.build(fake_step.load("simclr_digits"))
        loss = stepper.method.loss
        stepper.method.loss = lambda embeddings, targets: loss(
            {**embeddings, "z_a": change(embeddings["z_a"])}, targets
        )
        with pytest.raises(error, match=message):
            fake_step.take_step(stepper, batch)


class WaitInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.sum().item()


def test_a_wait_in_a_backward_pass_is_found():
    with pretend_cuda():
        z = torch.ones(3, device=DEVICE, requires_grad=True)
        loss = WaitInBackward.apply(z).sum()
        with RefuseHostWaits(), pytest.raises(HostWaitError, match="_local_scalar_dense"):
            loss.backward()
