"""Write a sharded checkpoint of a billion parameters, and resume on another number of ranks.

    PYTHONPATH=. .venv/bin/python tests/bench/billion.py [--ranks 2] [--resume-ranks 1]

SimCLR with a ViT-g/14 and SGD with momentum on gloo ranks, sharded by FSDP. The views are small,
because only the checkpoint matters. The weights and the momentum are random numbers that depend on
the tensor's name alone. The ranks that resume draw them again and compare every bit. Needs about
13 GB of memory, because every rank first builds the whole network, and 10 GB on the disk of
--folder. Everything is deleted.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.multiprocessing as mp
from measure import build_stepper_halfway, format_mib, versions
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import free_port

from ssl_pretrain.checkpoint.checkpoints import CheckpointConfig, Checkpoints, RunFacts
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods import simclr
from ssl_pretrain.models.backbones import build
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel import memory, wrap
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import Stepper
from ssl_pretrain.views.batch import Batch

IMAGES_PER_RANK = 2
CPU = torch.device("cpu")


def build_sharded_stepper(backbone: str, size: int, num_ranks: int) -> Stepper:
    """Build a stepper and take one step, after which the optimizer has its momentum."""
    method = simclr.Config().build(build(BackboneConfig(name=backbone), size))
    settings = ParallelConfig(strategy="fsdp", threads=1)
    views = [torch.randn(IMAGES_PER_RANK, 3, size, size) for _ in range(2)]
    indices = torch.arange(IMAGES_PER_RANK)
    batch = Batch(Execution.resolve(settings, CPU).place_views(views), indices, indices)
    stepper = build_stepper_halfway(
        method,
        settings,
        OptimConfig(name="sgd", momentum=0.9),
        CPU,
        batch,
        micro_batch_size=IMAGES_PER_RANK,
        global_batch_size=IMAGES_PER_RANK * num_ranks,
    )
    stepper.optimizer.zero_grad(set_to_none=True)
    for parameter in stepper.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepper.optimizer.step()
    stepper.optimizer.zero_grad(set_to_none=True)
    return stepper


def iterate_tensors(stepper: Stepper) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of every parameter and momentum buffer."""
    names = {parameter: name for name, parameter in stepper.model.named_parameters()}
    for parameter, name in names.items():
        yield name, parameter.detach()
    for parameter, entries in stepper.optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.ndim:
                yield f"{names[parameter]}::{key}", value


def draw_shard(name: str, tensor: Tensor) -> Tensor:
    """Return this rank's shard of the random numbers that belong to a name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    numbers = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    if not collectives.is_sharded(tensor):
        return numbers
    shards = numbers.chunk(process_group.world_size())
    rank = process_group.rank()
    return shards[rank] if rank < len(shards) else numbers[:0]


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return collectives.local_tensors([tensor])[0]


def run_rank(rank: int, options: argparse.Namespace, port: int, is_resumed: bool) -> None:
    """Save or resume as one rank. Rank 0 stores the largest results of all ranks."""
    num_ranks = options.resume_ranks if is_resumed else options.ranks
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    process_group.start(num_threads=1, timeout_seconds=1200.0)
    stepper = build_sharded_stepper(options.backbone, options.size, num_ranks)
    state = TrainingState(wrap.unwrap(stepper.model), stepper.optimizer)
    settings, facts = CheckpointConfig(asynchronous=False), RunFacts(2, IMAGES_PER_RANK, "")
    checkpoints = Checkpoints(Path(options.folder), state, settings, facts, {}, 1)
    results = resume(checkpoints, stepper) if is_resumed else save(checkpoints, stepper)
    peak_name = "resume_process_peak_bytes" if is_resumed else "save_process_peak_bytes"
    results[peak_name] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gathered = collectives.gather_objects(results)
    if rank == 0:
        largest = {key: max(result[key] for result in gathered) for key in results}
        torch.save(largest, results_path(Path(options.folder), is_resumed))
    process_group.stop()


def results_path(folder: Path, is_resumed: bool) -> Path:
    """Return the file of the results of the save or of the resume."""
    return folder / ("resume_results.pt" if is_resumed else "save_results.pt")


def save(checkpoints: Checkpoints, stepper: Stepper) -> dict[str, float]:
    """Fill weights and momentum, and measure the save, which waits and thus needs no copy."""
    for name, tensor in iterate_tensors(stepper):
        local_shard(tensor).copy_(draw_shard(name, tensor))
    collectives.barrier()
    start = time.perf_counter()
    added = memory.measure_peak_bytes(lambda: checkpoints.save(1), CPU)
    return {"save_seconds": time.perf_counter() - start, "save_added_bytes": added}


def resume(checkpoints: Checkpoints, stepper: Stepper) -> dict[str, float]:
    """Measure the resume, and compare weights and momentum bit for bit with new draws."""
    collectives.barrier()
    start = time.perf_counter()
    step = 0

    def restore() -> None:
        nonlocal step
        step = checkpoints.resume(lambda **_: None)

    added = memory.measure_peak_bytes(restore, CPU)
    seconds = time.perf_counter() - start
    num_tensors = num_values = 0
    for name, tensor in iterate_tensors(stepper):
        assert torch.equal(local_shard(tensor), draw_shard(name, tensor)), f"{name} differs"
        num_tensors, num_values = num_tensors + 1, num_values + tensor.numel()
    assert step == 1
    return {
        "resume_seconds": seconds,
        "resume_added_bytes": added,
        "num_tensors": num_tensors,
        "num_values": num_values,
    }


def time_plain_write(folder: Path, num_bytes: int = 2**30) -> float:
    """Return the bytes per second of one plain file, fsynced."""
    path, block = folder / "plain", os.urandom(2**24)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return num_bytes / seconds


def main() -> None:
    """Save on some ranks, resume on others, and print the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_giant_patch14_224")
    parser.add_argument("--size", type=int, default=28, help="pixels of a view")
    parser.add_argument("--ranks", type=int, default=2, help="ranks that write")
    parser.add_argument("--resume-ranks", type=int, default=1)
    parser.add_argument("--folder", help="folder on the disk to measure")
    options = parser.parse_args()
    options.folder = tempfile.mkdtemp(dir=options.folder)
    folder = Path(options.folder)
    try:
        mp.spawn(run_rank, (options, free_port(), False), nprocs=options.ranks)
        num_bytes = sum(file.stat().st_size for file in newest_checkpoint(folder).iterdir())
        mp.spawn(run_rank, (options, free_port(), True), nprocs=options.resume_ranks)
        results = [torch.load(results_path(folder, is_resumed)) for is_resumed in (False, True)]
        plain_rate = time_plain_write(folder)
    finally:
        shutil.rmtree(folder)
    print_results(options, *results, num_bytes, plain_rate)


def print_results(
    options: argparse.Namespace,
    saved: dict[str, float],
    resumed: dict[str, float],
    num_bytes: int,
    plain_rate: float,
) -> None:
    """Print the measurements of both runs, and their ratios to a plain write and to a shard.

    Args:
        options: Options of the command line.
        saved: Results of the ranks that saved.
        resumed: Results of the ranks that resumed.
        num_bytes: Size of the checkpoint.
        plain_rate: Bytes per second of one plain file.
    """
    print(versions("timm", "safetensors"))
    print(
        f"{options.backbone}: {resumed['num_values']:,} weights and momenta in "
        f"{resumed['num_tensors']} tensors; checkpoint of {format_mib(num_bytes)}; "
        f"{options.ranks} ranks wrote, {options.resume_ranks} resumed, every bit is equal"
    )
    for name, value in (saved | resumed).items():
        if name.startswith("num_"):
            continue
        text = format_mib(value) if name.endswith("_bytes") else f"{value:,.1f}"
        print(f"{name:26s} {text}, largest of all ranks")
    print(f"one plain file: {plain_rate / 1e9:.2f} GB/s")
    ratios = {
        "save_over_plain_write": saved["save_seconds"] / (num_bytes / plain_rate),
        "resume_over_save": resumed["resume_seconds"] / saved["save_seconds"],
        "save_added_over_shard_bytes": saved["save_added_bytes"] / (num_bytes / options.ranks),
        "resume_added_over_shard_bytes": resumed["resume_added_bytes"]
        / (num_bytes / options.resume_ranks),
    }
    print("ratios:", *(f"{name}={ratio:.3f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
