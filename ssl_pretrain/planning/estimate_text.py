"""Describe the estimated memory and time of a run on GPUs, for `--plan`."""

from dataclasses import replace

from ssl_pretrain import config
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import order, sources
from ssl_pretrain.optim import library
from ssl_pretrain.parallel.memory import GIB, USABLE_FRACTION
from ssl_pretrain.planning import checkpoint_plan, hardware, measured_shares
from ssl_pretrain.planning.checkpoint_plan import CheckpointPlan
from ssl_pretrain.planning.communication import Cluster
from ssl_pretrain.planning.estimate import Estimate, StepTime
from ssl_pretrain.planning.step_trace import STAND_IN

# Prefixes of times that are lower bounds, and of rates that are then upper bounds.
AT_LEAST, AT_MOST = "at least ", "at most "
AS_STAND_IN = f"is estimated as {STAND_IN}, because its operations depend on values"
NUM_IMAGENET_IMAGES = 1_281_167  # training images of ImageNet-1k


def describe(run: RunConfig, world_size: int) -> list[str]:
    """Describe the memory per GPU and the time per step, by component."""
    gpus_per_node = run.launch.gpus_per_node or world_size
    cluster = Cluster(world_size // gpus_per_node, gpus_per_node)
    estimate = Estimate(run, cluster, hardware.configured_machine(run.plan))
    gpu, kinds = estimate.machine.name, _kinds_of_work(estimate)
    shares = [measured_shares.find_share(gpu, *kind) for kind in kinds]
    is_bound = None in shares and not run.parallel.compile
    roofline_share, color_share = (share.share if share else 1.0 for share in shares)
    estimate.machine = replace(
        estimate.machine, roofline_share=roofline_share, color_share=color_share
    )
    largest, reason = estimate.largest_micro_batch()
    micro_batch_size = (
        config.configured_micro_batch_size(run, world_size) or largest or estimate.local_batch_size
    )
    step, optimizer = estimate.step_time(micro_batch_size), run.optim.name
    nodes = f", {cluster.num_nodes} nodes of {gpus_per_node}" if cluster.num_nodes > 1 else ""
    embedded_twice = ", each embedded twice" if estimate.takes_two_passes(micro_batch_size) else ""
    size = f"{largest:,} {reason}" if largest else f"none, because {reason}"
    lines = [
        f"# on {cluster.num_ranks} x {gpu}{nodes}: rates from data sheets",
        *_describe_memory(estimate, micro_batch_size),
        *([] if library.can_be_traced(optimizer) else [f"optimizer: {optimizer} {AS_STAND_IN}"]),
        f"largest micro-batch: {size}",
        f"micro-batches per rank: {estimate.local_batch_size // micro_batch_size}{embedded_twice}",
        *(measured_shares.describe_share(gpu, *kind) for kind in kinds),
        *_describe_time(estimate, step, is_bound),
        _describe_duration(run, cluster, step, is_bound),
    ]
    optimizer_bytes = estimate.optimizer_trace_and_bytes[1]
    plan = CheckpointPlan.build(estimate.method, optimizer_bytes, estimate.num_shards)
    return [*lines, *checkpoint_plan.describe(run, plan, cluster)]


def _kinds_of_work(estimate: Estimate) -> list[tuple[str, bool]]:
    """Return the network's class and `COLOR`, each with True if that work is compiled."""
    network = getattr(estimate.method.backbone, "model", estimate.method.backbone)
    is_compiled = estimate.run.parallel.compile
    return [(type(network).__name__, is_compiled), (measured_shares.COLOR, False)]


def _describe_memory(estimate: Estimate, micro_batch_size: int) -> list[str]:
    memory = estimate.memory_by_component(micro_batch_size)
    total, capacity = sum(memory.values()), estimate.machine.memory_bytes
    verdict = "fits"
    if total > USABLE_FRACTION * capacity:
        verdict = f"does not fit: a run may fill {USABLE_FRACTION:.0%}"
    activations = estimate.activation_bytes(micro_batch_size) / micro_batch_size / 2**20
    gradients = estimate.gradient_bytes / GIB
    loss = estimate.loss_trace(micro_batch_size).peak_bytes / GIB
    return [
        f"memory per GPU with a micro-batch of {micro_batch_size:,} images: "
        f"{total / GIB:.2f} of {capacity / GIB:.1f} GiB; {verdict}",
        *(f"  {size / GIB:9.3f} GiB  {name}" for name, size in memory.items() if size),
        f"  at the peak of the step: {activations:.1f} MiB of activations per image, "
        f"{gradients:.3f} GiB of gradients, {loss:.3f} GiB in the loss",
    ]


def _describe_time(estimate: Estimate, step: StepTime, is_bound: bool) -> list[str]:
    machine, batch = estimate.machine, estimate.run.global_batch_size
    loader = "waiting for the loader"
    if not machine.decoded_per_core:
        loader = "the loader, not estimated; set plan.decoded_per_core"
    seconds = {
        "forward, teacher, backward": step.compute_seconds,
        "color augmentation of the views": step.color_seconds,
        "loss": step.loss_seconds,
        "optimizer and update of the teacher": step.optimizer_seconds,
        "communication, exposed": step.exposed_seconds,
        loader: step.loader_seconds,
    }
    flops_per_second = step.num_flops / step.total_seconds
    return [
        f"time per step: {AT_LEAST * is_bound}{step.total_seconds * 1e3:,.1f} ms, "
        f"{AT_MOST * is_bound}{batch / step.total_seconds:,.0f} images/s; "
        f"bound by {step.bottleneck}",
        *(f"  {value * 1e3:11.3f} ms  {name}" for name, value in seconds.items()),
        f"  {step.hidden_seconds * 1e3:.3f} ms of communication hidden by the backward pass; "
        f"{flops_per_second / 1e12:,.1f} TFLOP/s per GPU, "
        f"{flops_per_second / machine.matmul_rate:.0%} of its peak",
        f"  {step.arithmetic_share:.0%} of the computation is bound by arithmetic, "
        "the rest by memory",
    ]


def _describe_duration(run: RunConfig, cluster: Cluster, step: StepTime, is_bound: bool) -> str:
    num_known = run.plan.num_images or _count_images(run)
    num_images = num_known or NUM_IMAGENET_IMAGES
    epoch_seconds = order.steps_per_epoch(num_images, run.global_batch_size) * step.total_seconds
    hours = run.epochs * epoch_seconds / 3600
    assumption = "" if num_known else "if it were ImageNet, "
    return (
        f"epochs per day: {AT_MOST * is_bound}{86400 / epoch_seconds:,.1f}; "
        f"the run of {run.epochs} epochs takes {AT_LEAST * is_bound}"
        f"{hours:,.1f} hours, {hours * cluster.num_ranks:,.0f} GPU-hours "
        f"({assumption}{num_images:,} images)"
    )


def _count_images(run: RunConfig) -> int:
    """Return the number of training images, or 0 if the data cannot be read."""
    try:
        return len(sources.open_source(run.data, "train"))
    except (ValueError, OSError):
        return 0
