"""Components shared by the methods: backbones, MLPs, teachers and queues."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives
from ssl_pretrain.models import tokens
from ssl_pretrain.models.timm_networks import input_channels, timm
from ssl_pretrain.models.tokens import Tokens
from ssl_pretrain.optim import schedules
from ssl_pretrain.schema.image_sizes import ImageSize


class Backbone(nn.Module):
    """A timm model that maps images (batch, C, height, width) to features (batch, feature_dim).

    Args:
        model: The network.
        feature_dim: Width of the features. None for timm's `num_features`.
        image_size: Size in pixels of the images that the network is built for.
    """

    def __init__(
        self, model: nn.Module, feature_dim: int | None = None, image_size: ImageSize = 224
    ):
        super().__init__()
        self.model, self.image_size = model, image_size
        self.feature_dim: int = feature_dim or model.num_features  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features of the images."""
        return self.model(images)

    def tokens(
        self,
        images: Tensor,
        *,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
        kept: Tensor | None = None,
        valid: Tensor | None = None,
        layers: Sequence[int] = (),
        normalize: bool = True,
    ) -> Tokens:
        """Return one vector per patch, and the class token and registers.

        Networks without patches give the positions of their last feature map instead. Their
        feature maps are neither normalized nor masked.

        Args:
            images: Images of shape (B, C, height, width).
            masked: Patches that `mask_token` replaces before positions are added, bool (B, N).
                Patches are numbered row by row.
            mask_token: The method's vector for masked patches, (D,).
            kept: Numbers of the patches that go through the blocks, int64 (B, L). The others are
                dropped after positions are added.
            valid: False for padding among `kept`, which no token attends to, bool (B, L).
            layers: Numbers of blocks whose outputs are also returned, from the end if negative.
            normalize: Apply the network's final norm to all outputs. Networks that normalize after
                pooling apply that norm.

        Raises:
            ValueError: If the network has no such tokens, or the masks do not fit its patches.
        """
        return tokens.compute(
            self.model,
            self.embed_patches,
            images,
            masked=masked,
            mask_token=mask_token,
            kept=kept,
            valid=valid,
            layers=layers,
            normalize=normalize,
        )

    def embed_patches(
        self, images: Tensor, masked: Tensor | None, mask_token: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the input of a vision transformer's blocks, and its rotary angles or None."""
        return tokens.embed_patches(self.model, images, masked, mask_token)

    def find_token_problem(self) -> str:
        """Return why `tokens` is not possible for this network, or an empty string if it is."""
        return tokens.find_problem(self.model, self.image_size)

    @property
    def num_channels(self) -> int:
        """Number of channels of the images."""
        return input_channels(self.model)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class tokens and registers."""
        return tokens.num_prefix_tokens(self.model)

    @property
    def token_dim(self) -> int:
        """Width of the tokens."""
        return tokens.token_dim(self.model)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels. For feature maps this is the stride."""
        return tokens.patch_size(self.model)

    def grid(self, image_size: ImageSize) -> tuple[int, int]:
        """Return the number of rows and columns of patches in images of `image_size` pixels."""
        return tokens.grid(self.model, image_size)


def mlp(
    in_dim: int,
    *dims: int,
    batch_norm: bool = True,
    last_batch_norm: bool = False,
    last_affine: bool = True,
    last_shift: bool = True,
    hidden_bias: bool = False,
    last_bias: bool = True,
    init_std: float | None = None,
) -> nn.Sequential:
    """Build linear layers with ReLU between them, (rows, in_dim) -> (rows, dims[-1]).

    Args:
        in_dim: Width of the input.
        dims: Widths of the layers.
        batch_norm: Normalize the hidden layers.
        last_batch_norm: Normalize the output too.
        last_affine: Give the output's norm a scale and a shift.
        last_shift: Give the output's norm a shift. SimCLR's norm has only a scale (`center=False`).
        hidden_bias: Give hidden layers a bias even if a norm follows and cancels it, as the authors
            of BYOL, SwAV and VICReg do.
        last_bias: Give the last layer a bias if no norm follows it.
        init_std: Standard deviation of the initial weights. None for torch's default.

    Raises:
        ValueError: If there are no widths, or one is not positive.
    """
    if not dims or min(in_dim, *dims) < 1:
        raise ValueError(f"mlp: widths must be positive, got in_dim={in_dim}, dims={dims}")
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(zip((in_dim, *dims), dims)):
        is_last = i == len(dims) - 1
        has_norm = last_batch_norm if is_last else batch_norm
        has_bias = last_bias and not has_norm if is_last else hidden_bias or not has_norm
        layer = nn.Linear(width_in, width_out, bias=has_bias)
        if init_std is not None:
            nn.init.normal_(layer.weight, std=init_std)
            if has_bias:
                nn.init.zeros_(layer.bias)
        layers.append(layer)
        if has_norm:
            norm = nn.BatchNorm1d(width_out, affine=not is_last or last_affine)
            if is_last and last_affine and not last_shift:
                norm.register_parameter("bias", None)
            layers.append(norm)
        if not is_last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def simclr_projector(in_dim: int, *dims: int) -> nn.Sequential:
    """Build SimCLR's projector, (rows, in_dim) -> (rows, dims[-1]).

    Batch norm follows every linear layer, so none has a bias. The last norm has no shift.
    """
    return mlp(in_dim, *dims, last_batch_norm=True, last_shift=False, init_std=0.01)


class Teacher(nn.Module):
    """Copies of a student's modules, applied in order and not trained by gradients.

    The parameters are a moving average of the student's. The buffers are the teacher's own, because
    the authors of BYOL, DINO and MoCo run the teacher's batch norm in training mode on its own
    features. Dropout, drop path and the random coordinates of rotary positions are off, even if the
    student uses them.

    The average is kept in float32 if the student's parameters have half precision, which would
    round the small updates of a high momentum away. Such a teacher is applied under autocast.

    Args:
        modules: The student's modules by name, in the order in which they are applied.
    """

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, copy.deepcopy(module).requires_grad_(False))
        for parameter in self.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        for module in self.modules():
            if isinstance(module, timm.layers.DropPath):
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
            tokens.disable_position_augmentation(module)

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """Apply the teacher's modules in order to views of shape (batch, C, height, width)."""
        for module in self.children():
            views = module(views)
        return views

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float, step_taken: Tensor | float) -> None:
        """Set the weights to momentum * teacher + (1 - momentum) * student.

        Teacher and student are sharded alike, or not at all, so each rank updates its own shards.

        Args:
            student: Module with the same submodules under the same names.
            momentum: Weight of the teacher in the average.
            step_taken: 1 to update, 0 to change nothing. If it is a tensor, the host does not wait
                for its value.
        """
        for name, module in self.named_children():
            weights = _shards(module)
            student_weights = [
                weight.to(teacher_weight.dtype)
                for weight, teacher_weight in zip(_shards(student.get_submodule(name)), weights)
            ]
            updates = list(torch._foreach_sub(student_weights, weights))
            factor = torch.as_tensor(step_taken, dtype=weights[0].dtype, device=weights[0].device)
            torch._foreach_mul_(updates, (1.0 - momentum) * factor)
            torch._foreach_add_(weights, updates)

    @torch.no_grad()
    def reinitialize(self) -> None:
        """Give the teacher its own initial weights, with the same distributions as the student's.

        The elements of each weight tensor are permuted at random.
        """
        for parameter in self.parameters():
            if parameter.ndim > 1:
                order = torch.randperm(parameter.numel(), device=parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _shards(module: nn.Module) -> list[Tensor]:
    return collectives.local_tensors(parameter.detach() for parameter in module.parameters())


def rising_momentum(progress: schedules.Progress, start: float) -> float:
    """Return a teacher's momentum, which rises from `start` to 1 along half a cosine.

    BYOL (Grill et al., NeurIPS 2020, arXiv:2006.07733, section 3.3), DINO and MoCo v3 use it.
    """
    return schedules.cosine(progress.fraction, start=start, final=1.0)


class Queue(nn.Module):
    """The latest rows that all ranks pushed, in the order of the global batch.

    The oldest rows are overwritten first. The queue is the same on all ranks.

    Args:
        size: Number of rows.
        shape: Shape of a row.
        random: Start with random rows of unit length, as MoCo and NNCLR do, instead of zeros, as
            SwAV does.
    """

    rows: Tensor  # (size, *shape)
    position: Tensor  # index of the oldest row
    filled: Tensor  # number of rows that came from images

    def __init__(self, size: int, *shape: int, random: bool = True):
        super().__init__()
        rows = F.normalize(torch.randn(size, *shape), dim=-1) if random else None
        self.register_buffer("rows", torch.zeros(size, *shape) if rows is None else rows)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor, step_taken: Tensor | float) -> None:
        """Replace the oldest rows with the new rows of all ranks.

        Args:
            rows: New rows of this rank, shape (local_batch, *shape).
            step_taken: 1 to push, 0 to change nothing. If it is a tensor, the host does not wait
                for its value.
        """
        new_rows = collectives.gather(rows.detach().to(self.rows.dtype))
        num_new, size = len(new_rows), len(self.rows)
        check_queue_size(size, num_new)
        indices = torch.arange(num_new, device=new_rows.device) + self.position
        is_pushed = torch.as_tensor(step_taken, device=new_rows.device) > 0
        old_rows = self.rows.index_select(0, indices)
        self.rows.index_copy_(0, indices, torch.where(is_pushed, new_rows, old_rows))
        self.position.copy_((self.position + num_new * is_pushed) % size)
        self.filled.copy_((self.filled + num_new * is_pushed).clamp(max=size))


def check_queue_size(queue_size: int, global_batch_size: int) -> None:
    """Raise ValueError unless whole global batches fill the queue exactly."""
    if queue_size < 1 or queue_size % global_batch_size:
        lower = queue_size // global_batch_size * global_batch_size
        multiples = (
            f"the nearest multiples are {lower} and {lower + global_batch_size}"
            if lower
            else f"the smallest is {global_batch_size}"
        )
        raise ValueError(
            f"method.queue_size: {queue_size} is not a multiple of global_batch_size "
            f"{global_batch_size}; {multiples}"
        )
