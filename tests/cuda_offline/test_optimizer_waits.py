"""The host does not wait for the GPU in a step of any optimizer, the first step included."""

import fake_step
import pytest
from fake_cuda import DEVICE, pretend_cuda
from host_waits import MixedDeviceError

from ssl_pretrain.optim import optimizer_list

NAMES = ["lamb", "adan", *optimizer_list.ENTRIES]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_wait(name):
    overrides = ["optim.betas=[0.98, 0.92, 0.99]"] if name == "adan" else []
    with pretend_cuda():
        run = fake_step.load("simclr_digits", f"optim.name={name}", *overrides)
        stepper, batch = fake_step.build(run)
        for progress in fake_step.STEPS:
            fake_step.take_step(stepper, batch, progress)
        states = [value for state in stepper.optimizer.state.values() for value in state.values()]
        assert states
        assert all(value.device == DEVICE for value in states)


def test_steps_counted_on_the_host_are_found():
    with pretend_cuda():
        stepper, batch = fake_step.build(fake_step.load("simclr_digits", "optim.name=torch:nadam"))
        stepper.optimizer._optimizer.defaults["capturable"] = False
        with pytest.raises(MixedDeviceError, match="where"):
            fake_step.take_step(stepper, batch)
