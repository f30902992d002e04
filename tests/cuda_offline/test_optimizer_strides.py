"""Every optimizer state has the strides of its parameter, as the fused CUDA kernels require.

Parallel settings are the defaults, with channels_last weights. States are checked after a step, and
after a resume from a checkpoint, whose tensors are contiguous on disk. Every step on a pretended
GPU checks them too, as its kernels would.
"""

from pathlib import Path
from unittest import mock

import fake_step
import networks
import pytest
import torch
from fake_cuda import DEVICE, pretend_cuda
from fused_optimizers import check_match, strides
from safetensors.torch import load_file
from suites import quick_and_full

from ssl_pretrain.checkpoint import state
from ssl_pretrain.checkpoint.manifest import METHOD_FILE, OPTIMIZER_FILE
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.optim import optimizers
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress

CASES = ["simclr", "dino"]  # a ResNet and a ViT
ADAM_MOMENTS = {"exp_avg", "exp_avg_sq"}
MOMENTS = {
    **dict.fromkeys(("adam", "adamw", "lamb", "torch:nadam", "torch:radam"), ADAM_MOMENTS),
    "adan": ADAM_MOMENTS | {"exp_avg_diff", "previous_gradient"},
    "timm:lion": {"exp_avg"},
    "torch:adadelta": {"square_avg", "acc_delta"},
    "torch:adamax": {"exp_avg", "exp_inf"},
    "torch:rmsprop": {"square_avg"},
}
NAMED = [name for name in MOMENTS if not name.startswith("adam")]
OPTIMIZERS = ["sgd", "lars", "larc", "adamw", "adam", *NAMED]
ADAN = {"name": "adan", "betas": [0.98, 0.92, 0.99]}
SETTINGS = {"base_lr": 0.02, "lr_scaling": "none", "warmup_epochs": 1, "weight_decay": 0.1}


def check_states(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Check the moments of all parameters. At least one weight must be channels_last."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for moment in MOMENTS.get(name, {"momentum_buffer"}):
        check_match(moment, parameters, [optimizer.state[p][moment] for p in parameters])
    assert any(strides(p) != strides(torch.empty(p.shape)) for p in parameters)


@pytest.mark.parametrize("name", quick_and_full(["sgd", "lars", "adamw", "adan"], OPTIMIZERS))
@pytest.mark.parametrize("case", CASES)
def test_states_have_the_strides_of_their_parameters(case, name, tmp_path):
    optimizer = SETTINGS | (ADAN if name == "adan" else {"name": name})
    stepper, sizes = networks.build_case(case, optimizer=optimizer)
    assert not stepper.optimizer.state
    # DINO's last layer has no gradient in the first epoch, which is steps 0 and 1.
    networks.take_step(stepper, sizes, 2)
    check_states(stepper.optimizer, name)
    networks.run(case, 3, tmp_path, optimizer=optimizer)
    (path,) = (tmp_path / "checkpoints").iterdir()
    resumed, _ = networks.build_case(case, optimizer=optimizer)
    TrainingState(resumed.method, resumed.optimizer).restore(path)
    check_states(resumed.optimizer, name)
    resume_on_gpu(path, case, optimizer)


def resume_on_gpu(path: Path, case: str, settings: dict[str, object]) -> None:
    """Load a checkpoint on a pretended GPU and take an optimizer step there."""
    method = networks.build_case(case, optimizer=settings)[0].method
    files = {name: load_file(path / name) for name in (METHOD_FILE, OPTIMIZER_FILE)}
    with pretend_cuda(), mock.patch.object(state, "load_file", lambda file: files[file.name]):
        method = method.to(DEVICE).to(memory_format=torch.channels_last)
        config = OptimConfig(**settings)
        optimizer = optimizers.build(config, method)
        TrainingState(method, optimizer).restore(path)
        optimizers.set_rates(optimizer, config, Progress(5, 20, 2), 10, 8)
        check_states(optimizer, str(settings["name"]))
        for parameter in method.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizers.step_if_finite(optimizer)  # raises an error if a kernel would refuse the state


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_state_with_other_strides_is_found(name):
    with pretend_cuda():
        stepper, batch = fake_step.build(fake_step.load("simclr_digits", f"optim.name={name}"))
        fake_step.take_step(stepper, batch)
        for entries in stepper.optimizer.state.values():
            for key, value in entries.items():
                if value.ndim == 4:
                    entries[key] = value.contiguous()
        with pytest.raises(AssertionError, match=r"strides .* the parameter has"):
            fake_step.take_step(stepper, batch)
