"""The tensors that a resumed run needs: those of the method and those of the optimizer."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_pretrain.checkpoint import tensor_files
from ssl_pretrain.checkpoint.manifest import METHOD_FILE, OPTIMIZER_FILE
from ssl_pretrain.checkpoint.save_thread import DISK_PATIENCE
from ssl_pretrain.distributed import collectives, process_group

FORMER_NAMES = {"centre": "center"}  # tensors of methods: name in old checkpoints, present name


class TrainingState:
    """The method and its optimizer, copied to checkpoints and restored from them.

    Args:
        method: Unwrapped. Its parameters are whole, or sharded by FSDP.
        optimizer: Its parameter groups list the parameters' names under `names`.
    """

    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.method, self.optimizer = method, optimizer
        self.sharded = any(collectives.is_sharded(parameter) for parameter in method.parameters())
        if self.sharded:
            tensor_files.sharded_storage()
        self.group = process_group.new_cpu_group(DISK_PATIENCE) if self.sharded else None

    def snapshot(self) -> tensor_files.Files:
        """Return copies of all tensors in host memory, by file."""
        moments = {
            f"{name}::{key}": value
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"])
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return {
            METHOD_FILE: _copies(self.method.state_dict()),
            OPTIMIZER_FILE: _copies(moments),
        }

    def restore(self, path: Path) -> None:
        """Load a checkpoint into the method and the optimizer, sharded as they are in this run.

        The caller has verified the checkpoint.

        Raises:
            ValueError: The checkpoint has other tensors than this method.
        """
        if self.sharded or not (path / METHOD_FILE).exists():
            self._restore_shards(path)
            return
        weights = load_file(path / METHOD_FILE)
        present_weights = {FORMER_NAMES.get(name, name): value for name, value in weights.items()}
        self.method.load_state_dict(present_weights, strict=True)
        self._clear_moments()
        for key, value in load_file(path / OPTIMIZER_FILE).items():
            self._new_moment(key, value.shape, value.dtype).copy_(value)

    def _restore_shards(self, path: Path) -> None:
        """Read the slices that this rank holds, however the checkpoint was sharded."""
        shapes, tensors = tensor_files.read_shapes(path), self.method.state_dict()
        for former_name, name in FORMER_NAMES.items():
            if former_name in shapes and name in tensors:
                tensors[former_name] = tensors.pop(name)
        weights = {key for key in shapes if "::" not in key}
        if weights != tensors.keys():
            differing = ", ".join(sorted(weights ^ tensors.keys())[:3])
            raise ValueError(
                f"{path}: the checkpoint has other tensors than this method, such as {differing}. "
                "Nothing was loaded"
            )
        self._clear_moments()
        for key in shapes.keys() - weights:
            tensors[key] = self._new_moment(key, shapes[key].size, shapes[key].properties.dtype)
        tensor_files.fill(tensors, path, self.group)

    def _clear_moments(self) -> None:
        """Forget the optimizer's state, also of parameters that were frozen at the checkpoint."""
        self.optimizer.state.clear()

    def _new_moment(self, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Add zeros to the optimizer's state for an entry named `<parameter>::<entry>`.

        An entry of the parameter's shape also gets its memory layout and its sharding. The fused
        optimizer kernels walk raw memory, so a moment in another layout than its weight would be
        applied to the wrong elements.
        """
        name, _, entry = key.rpartition("::")
        parameter = self._parameter(name)
        if shape == parameter.shape:
            moment = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            moment = torch.zeros(shape, dtype=dtype, device=parameter.device)
        self.optimizer.state[parameter][entry] = moment
        return moment

    def _parameter(self, name: str) -> nn.Parameter:
        for group in self.optimizer.param_groups:
            if name in group["names"]:
                parameter: nn.Parameter = group["params"][group["names"].index(name)]
                return parameter
        raise ValueError(
            f"the checkpoint has an optimizer state for {name!r}, which this method does not train"
        )


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
