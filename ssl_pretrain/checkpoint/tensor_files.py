"""Read and write the safetensors files of a checkpoint.

Rank 0 writes full tensors to method.safetensors and optimizer.safetensors. With FSDP, each rank
writes its shards to its own files, in the safetensors format of torch.distributed.checkpoint.
Entries of the optimizer's state are named `<parameter>::<entry>`. Either kind of checkpoint can be
read on any number of ranks, sharded or not. No file is a pickle.
"""

import inspect
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_pretrain.checkpoint import folder
from ssl_pretrain.checkpoint.manifest import (
    METHOD_FILE,
    describe_files,
    read_manifest,
    verify_checkpoint,
)
from ssl_pretrain.distributed import collectives, process_group

TensorsByFile = dict[str, dict[str, Tensor]]  # tensors by name, by the name of their file
# A file of shards is copied twice in memory before it is written, so that many small files take
# less memory than one large file.
MAX_SHARD_FILE_BYTES = 256 * 2**20


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Verify a checkpoint, and return its manifest and the method's full tensors on the CPU.

    Raises:
        ValueError: If a file is damaged, or this version cannot read the checkpoint's format.
    """
    path = Path(path)
    verify_checkpoint(path)
    manifest = read_manifest(path)
    if (path / METHOD_FILE).exists():
        return manifest, load_file(path / METHOD_FILE)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in read_tensor_metadata(path).items()
        if "::" not in key
    }
    read_into(tensors, path)
    return manifest, tensors


def write_full_tensors(
    path: Path, staging_folder: Path, tensors_by_file: TensorsByFile, manifest: dict[str, Any]
) -> None:
    """Write a checkpoint of full tensors from one process, unless an intact one exists."""
    if not _create_folder(path, staging_folder):
        return
    try:
        for file_name, tensors in tensors_by_file.items():
            save_file(tensors, staging_folder / file_name)
        folder.publish(
            staging_folder, path, manifest, describe_files(sorted(staging_folder.iterdir()))
        )
    except BaseException:
        shutil.rmtree(staging_folder, ignore_errors=True)
        raise


def write_shards(
    path: Path,
    staging_folder: Path,
    tensors_by_file: TensorsByFile,
    manifest: dict[str, Any],
    *,
    group: Any,
) -> None:
    """Write a sharded checkpoint, unless an intact one exists.

    Each rank writes and hashes its own files. Rank 0 writes the manifest. A failure on one rank is
    raised on all ranks, because the others would otherwise wait for it.

    Raises:
        OSError: If a rank could not write.
    """
    if not collectives.run_on_main(lambda: _create_folder(path, staging_folder), group):
        return
    results = collectives.gather_objects(
        _write_own_shard(staging_folder, tensors_by_file, group), group
    )
    problem = next((problem for _, problem in results if problem), None)
    entries = {name: entry for own_entries, _ in results for name, entry in own_entries.items()}

    def publish_or_remove() -> None:
        try:
            if problem is not None:
                raise OSError(problem)
            folder.publish(staging_folder, path, manifest, entries)
        except OSError:
            shutil.rmtree(staging_folder, ignore_errors=True)
            raise

    collectives.run_on_main(publish_or_remove, group)


def _create_folder(path: Path, staging_folder: Path) -> bool:
    """Create the folder to write into. Return False if `path` is an intact checkpoint."""
    folder.discard_if_damaged(path)
    if path.exists():
        return False
    staging_folder.mkdir(parents=True)
    return True


def _write_own_shard(
    staging_folder: Path, tensors_by_file: TensorsByFile, group: Any
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Write this rank's files. Return their entries, and the failures of all ranks or None."""
    dcp = import_dcp_with_safetensors()
    tensors = {name: tensor for file in tensors_by_file.values() for name, tensor in file.items()}
    writer = dcp.HuggingFaceStorageWriter(
        str(staging_folder),
        fqn_to_index_mapping=_divide_into_files(tensors),  # torch uses the mapping of rank 0
        save_distributed=True,
    )
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
        own_files = sorted(staging_folder.glob(f"shard-{process_group.rank() + 1:05d}-*"))
        return describe_files(own_files), None
    except dcp.CheckpointException as error:  # also raised for failures of other ranks
        failures = [f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        return {}, "; ".join(failures)
    except Exception as error:
        return {}, f"rank {process_group.rank()}: {error}"


def _divide_into_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the number of each tensor's file, from 1, by the tensor's name.

    A file holds at most `MAX_SHARD_FILE_BYTES` of this rank, or a single larger shard.
    """
    file_numbers, number, file_bytes = {}, 1, 0
    for name, shard in zip(tensors, collectives.local_tensors(tensors.values())):
        if file_bytes and file_bytes + shard.nbytes > MAX_SHARD_FILE_BYTES:
            number, file_bytes = number + 1, 0
        file_numbers[name] = number
        file_bytes += shard.nbytes
    return file_numbers


def read_tensor_metadata(path: Path) -> dict[str, Any]:
    """Read the size and type of each tensor of a checkpoint, by name, from its files' headers."""
    reader = import_dcp_with_safetensors().HuggingFaceStorageReader(str(path))
    return dict(reader.read_metadata().state_dict_metadata)


def read_into(tensors: dict[str, Tensor], path: Path, group: Any = None) -> None:
    """Read a checkpoint into full or sharded tensors. Without a group, only this process reads."""
    dcp = import_dcp_with_safetensors()
    reader = dcp.HuggingFaceStorageReader(str(path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


def import_dcp_with_safetensors() -> Any:
    """Import torch.distributed.checkpoint and check that it can write shards as safetensors.

    Raises:
        ValueError: If this version of torch would write pickles.
    """
    import torch.distributed.checkpoint as dcp

    writer = getattr(dcp, "HuggingFaceStorageWriter", None)
    if writer is None or "save_distributed" not in inspect.signature(writer).parameters:
        raise ValueError(
            "parallel.strategy: sharded checkpoints need the safetensors storage of "
            f"torch.distributed.checkpoint, which torch {torch.__version__} does not have; install "
            "torch>=2.13, or train with parallel.strategy=ddp"
        )
    return dcp
