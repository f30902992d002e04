"""Copy the tensors of a method and its optimizer to checkpoints, and restore them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_pretrain.checkpoint import tensor_files
from ssl_pretrain.checkpoint.manifest import METHOD_FILE, OPTIMIZER_FILE
from ssl_pretrain.checkpoint.save_thread import DISK_PATIENCE
from ssl_pretrain.distributed import collectives, process_group

CURRENT_NAMES = {"centre": "center"}  # names of tensors, by the names in old checkpoints


class TrainingState:
    """The method and its optimizer, copied to checkpoints and restored from them.

    Args:
        method: The method without wrappers. Its parameters are full, or sharded by FSDP.
        optimizer: Its parameter groups list the names of their parameters under `names`.
    """

    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.method, self.optimizer = method, optimizer
        self.is_sharded = any(
            collectives.is_sharded(parameter) for parameter in method.parameters()
        )
        if self.is_sharded:
            tensor_files.import_dcp_with_safetensors()  # raises now, not at the first save
        self.group = process_group.new_cpu_group(DISK_PATIENCE) if self.is_sharded else None

    def snapshot(self, copies_host: bool = True) -> tensor_files.TensorsByFile:
        """Copy all tensors to host memory and return them by file and name.

        Args:
            copies_host: Copy tensors that are in host memory too, so that training may continue.
        """
        moments = {
            f"{name}::{key}": value
            for name, parameter in self._trained_parameters().items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return {
            METHOD_FILE: _move_to_host(self.method.state_dict(), copies_host),
            OPTIMIZER_FILE: _move_to_host(moments, copies_host),
        }

    def restore(self, path: Path) -> None:
        """Load a checkpoint into the method and the optimizer, sharded as they are in this run.

        The caller has verified the checkpoint.

        Raises:
            ValueError: If the tensors of the checkpoint differ from the method's.
        """
        if self.is_sharded or not (path / METHOD_FILE).exists():
            self._restore_shards(path)
            return
        weights = load_file(path / METHOD_FILE)
        renamed_weights = {CURRENT_NAMES.get(name, name): value for name, value in weights.items()}
        self.method.load_state_dict(renamed_weights, strict=True)
        self.optimizer.state.clear()  # parameters that were still frozen have no saved entry
        parameters = self._trained_parameters()
        for key, value in load_file(path / OPTIMIZER_FILE).items():
            self._add_moment(parameters, key, value.shape, value.dtype).copy_(value)

    def _restore_shards(self, path: Path) -> None:
        """Read this rank's slices, however the checkpoint was sharded."""
        metadata, tensors = tensor_files.read_tensor_metadata(path), self.method.state_dict()
        for former_name, name in CURRENT_NAMES.items():
            if former_name in metadata and name in tensors:
                tensors[former_name] = tensors.pop(name)
        weight_names = {key for key in metadata if "::" not in key}
        if weight_names != tensors.keys():
            examples = ", ".join(sorted(weight_names ^ tensors.keys())[:3])
            raise ValueError(
                f"{path}: the tensors of the checkpoint differ from this method's, for "
                f"example {examples}. Nothing was loaded; resume with the method that was saved"
            )
        self.optimizer.state.clear()
        parameters = self._trained_parameters()
        for key in metadata.keys() - weight_names:
            entry = metadata[key]
            tensors[key] = self._add_moment(parameters, key, entry.size, entry.properties.dtype)
        tensor_files.read_into(tensors, path, self.group)

    def _add_moment(
        self,
        parameters: dict[str, nn.Parameter],
        key: str,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> Tensor:
        """Add a tensor of zeros to the optimizer's state and return it.

        Its key is `<parameter name>::<state key>`. A tensor with the parameter's shape also gets
        the parameter's memory layout and sharding. The fused optimizer kernels use raw memory, so a
        moment whose layout differs from its weight's would be applied to the wrong elements.

        Raises:
            ValueError: If the method does not train a parameter of this name.
        """
        name, _, state_key = key.rpartition("::")
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"the checkpoint has optimizer state for {name!r}, which this method does not "
                "train; resume with the method that was saved"
            )
        if shape == parameter.shape:
            moment = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            moment = torch.zeros(shape, dtype=dtype, device=parameter.device)
        self.optimizer.state[parameter][state_key] = moment
        return moment

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"])
        }


def _move_to_host(tensors: dict[str, Tensor], copies_host: bool) -> dict[str, Tensor]:
    """Return contiguous tensors in host memory, none of which share memory with each other."""
    host_tensors, storages = {}, set[int]()
    for key, value in tensors.items():
        storage = collectives.local_tensors([value])[0].untyped_storage().data_ptr()
        needs_copy = copies_host or storage in storages  # safetensors refuses tied tensors
        host_tensors[key] = value.detach().to("cpu", copy=needs_copy).contiguous()
        storages.add(storage)
    return host_tensors
