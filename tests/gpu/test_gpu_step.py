"""An optimizer step on a GPU never blocks the host and equals a step on a CPU."""

import copy
from dataclasses import replace

import pytest
import torch
from on_cuda import NEEDS_CUDA, cuda, forbid_synchronization  # noqa: F401
from small_methods import build_method, random_batch

from ssl_pretrain import methods
from ssl_pretrain.methods.base import Method
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import Stepper, build_stepper

HALFWAY = Progress(50, 100, 1)
FIRST_STEP, SECOND_STEP = Progress(10, 100, 10), Progress(11, 100, 10)

pytestmark = NEEDS_CUDA

NUM_IMAGES = 16
OPTIM = {
    "lars": OptimConfig(name="lars"),
    "adamw": OptimConfig(name="adamw", base_lr=1e-3, clip_norm=3.0),
    "sgd": OptimConfig(name="sgd"),
}


def build_test_stepper(
    method: Method,
    device: torch.device,
    settings: ParallelConfig,
    recipe: OptimConfig,
    num_images: int = NUM_IMAGES,
) -> Stepper:
    example = random_batch(method.config.name, num_images).to(device)
    step = build_stepper(
        method,
        settings,
        recipe,
        Execution.resolve(settings, device),
        micro_batch_size=num_images,
        global_batch_size=NUM_IMAGES,
        example=example,
    )
    optim.set_rates(step.optimizer, recipe, HALFWAY, 100, NUM_IMAGES)
    return step


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("name", methods.names())
def test_a_step_never_blocks_the_host(name, num_micro_batches, cuda, forbid_synchronization):
    method = build_method(name)
    settings = ParallelConfig(bn_group_images=NUM_IMAGES // num_micro_batches)
    step = build_test_stepper(
        method, cuda, settings, OPTIM["lars"], NUM_IMAGES // num_micro_batches
    )
    batch = random_batch(name, NUM_IMAGES).to(cuda)
    step(FIRST_STEP, batch)  # the first step may block, because it allocates and compiles
    with forbid_synchronization():
        logs = step(SECOND_STEP, batch).logs
    assert torch.isfinite(logs["loss"]).item()


@pytest.mark.parametrize("recipe", OPTIM)
def test_the_optimizer_updates_weights_as_on_a_cpu(recipe, cuda):
    cpu_model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    gpu_model = copy.deepcopy(cpu_model).to(cuda)
    for module in (cpu_model, gpu_model):
        optimizer = optim.build(OPTIM[recipe], module)
        optim.set_rates(optimizer, OPTIM[recipe], HALFWAY, 100, 256)
        for number in range(5):
            for position, parameter in enumerate(module.parameters()):
                generator = torch.Generator().manual_seed(10 * number + position)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(
                    parameter.device
                )
            optim.step_if_finite(optimizer, OPTIM[recipe].clip_norm)
    for ours, expected in zip(gpu_model.parameters(), cpu_model.parameters()):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_fused_adamw_equals_plain_adamw(cuda):
    weights = torch.randn(1000, device=cuda)
    results = []
    for fused in (True, False):
        parameter = torch.nn.Parameter(weights.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, fused=fused)
        for number in range(10):
            parameter.grad = torch.randn(
                1000, generator=torch.Generator(cuda).manual_seed(number), device=cuda
            )
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_nonfinite_gradient_changes_nothing(cuda):
    method = build_method("simclr")
    step = build_test_stepper(method, cuda, ParallelConfig(), OPTIM["lars"])
    step(FIRST_STEP, random_batch("simclr", NUM_IMAGES).to(cuda))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    batch = random_batch("simclr", NUM_IMAGES).to(cuda)
    batch.views[0][0] = float("nan")
    logs = step(SECOND_STEP, batch).logs
    assert logs["skipped_steps"].item() == 1
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]) or "num_batches" in name, name


@pytest.mark.parametrize("name", ["simclr", "moco_v3", "dino"])
def test_float32_losses_equal_those_of_a_cpu(name, cuda):
    losses = []
    torch.backends.cudnn.allow_tf32 = False
    try:
        for device in (torch.device("cpu"), cuda):
            step = build_test_stepper(
                build_method(name), device, ParallelConfig(precision="float32"), OPTIM["lars"]
            )
            batch = random_batch(name, NUM_IMAGES).to(device)
            losses.append(
                [
                    step(replace(FIRST_STEP, step=number), batch).logs["loss"].item()
                    for number in range(3)
                ]
            )
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_bfloat16_is_close_to_float32_and_weights_stay_float32(cuda):
    losses = {}
    for precision in ("float32", "auto"):
        method = build_method("simclr")
        step = build_test_stepper(method, cuda, ParallelConfig(precision=precision), OPTIM["lars"])
        embeddings, _, logs = step(FIRST_STEP, random_batch("simclr", NUM_IMAGES).to(cuda))
        losses[precision] = logs["loss"].item()
        assert embeddings["z_a"].dtype == (torch.bfloat16 if precision == "auto" else torch.float32)
        assert all(
            parameter.dtype == parameter.grad.dtype == torch.float32
            for parameter in method.parameters()
        )
    assert losses["auto"] == pytest.approx(losses["float32"], rel=0.02)


def test_collectives_of_one_rank_over_nccl_are_the_identity(cuda, tmp_path):
    import torch.distributed as dist

    from ssl_pretrain.distributed import collectives
    from ssl_pretrain.losses.contrastive import nt_xent

    z = [torch.randn(8, 16, device=cuda, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(nt_xent(*z, temperature=0.1), z)
    dist.init_process_group(
        "nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        gathered = collectives._Gather.apply(z[0], None)
        reduced = collectives._ReduceSum.apply(z[0], None)
        gradients = torch.autograd.grad(nt_xent(*z, temperature=0.1), z)
        (gather_gradient,) = torch.autograd.grad(gathered.square().sum(), [z[0]])
    finally:
        dist.destroy_process_group()
    assert torch.equal(gathered, z[0]) and torch.equal(reduced, z[0])
    torch.testing.assert_close(gather_gradient, 2 * z[0])
    torch.testing.assert_close(gradients, expected)
