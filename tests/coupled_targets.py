"""A method that combines teacher outputs of the whole batch, as DINOv2 does, for tests and benches.

The student sees images with masked patches. It predicts the teacher's prototypes for the image and
for its masked patches, which Sinkhorn-Knopp balances over the batch. KoLeo spreads the student's
class tokens. Prototypes, weights and masks are small. No shipped method needs all of this yet.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import sinkhorn_offsets
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, Monitored
from ssl_pretrain.models.components import Backbone, Teacher
from ssl_pretrain.views.batch import Batch, MaskSet

PATCH, GRID = 4, 4  # pixels and patches along a side
NUM_PATCHES = GRID**2
MAX_MASKED = 8
TEACHER_TEMPERATURE, TEMPERATURE = 0.07, 0.1


class Tokens(nn.Module):
    """Two layers with batch norm on patches, and their mean as the class token."""

    num_features = 7

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, PATCH, stride=PATCH)
        self.norm = nn.BatchNorm2d(7)
        self.mixer = nn.Linear(NUM_PATCHES, NUM_PATCHES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.conv(images)).relu().flatten(2)
        return (tokens + self.mixer(tokens).tanh()).transpose(1, 2)


class CoupledTargets(Method):
    """The method, in miniature."""

    couples = "targets"
    compared = ("class_token",)
    transient = ("class_logits", "patch_logits")

    def __init__(self, num_prototypes: int = 11, koleo_weight: float = 0.1):
        config = SimpleNamespace(name="coupled_targets")
        super().__init__(config, Backbone(Tokens()))
        self.koleo_weight = koleo_weight
        self.mask_token = nn.Parameter(torch.randn(3, 1, 1))
        self.head = nn.Linear(7, 5)
        self.prototypes = nn.Linear(5, num_prototypes, bias=False)
        self.teacher = Teacher(backbone=self.backbone, head=self.head, prototypes=self.prototypes)
        if not koleo_weight:
            self.compared = ()

    def forward(self, batch: Batch) -> Embeddings:
        masks = batch.masks_named("masked")[0]
        grid = masks.as_grid(NUM_PATCHES).view(-1, 1, GRID, GRID)
        pixels = grid.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        tokens = self.backbone(torch.where(pixels, self.mask_token, batch.views[0]))
        rows = masks.indices[:, 0, :, None].expand(-1, -1, tokens.shape[2])
        class_token = tokens.mean(1)
        return {
            "class_token": class_token,
            "class_logits": self.prototypes(F.normalize(self.head(class_token), dim=-1)),
            "patch_logits": self.prototypes(F.normalize(self.head(tokens.gather(1, rows)), dim=-1)),
        }

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        masks = batch.masks_named("masked")[0]
        tokens = self.teacher.backbone(batch.views[0])
        rows = masks.indices[:, 0, :, None].expand(-1, -1, tokens.shape[2])
        return {
            "class_bottleneck": F.normalize(self.teacher.head(tokens.mean(1)), dim=-1),
            "patch_bottleneck": F.normalize(self.teacher.head(tokens.gather(1, rows)), dim=-1),
            "valid": masks.valid[:, 0],
        }

    @torch.no_grad()
    def couple(self, targets: Embeddings) -> Embeddings:
        prototypes = self.teacher.prototypes.weight
        return {
            "class": sinkhorn_offsets(
                targets["class_bottleneck"], prototypes, temperature=TEACHER_TEMPERATURE
            ),
            "patch": sinkhorn_offsets(
                targets["patch_bottleneck"].flatten(0, 1),
                prototypes,
                targets["valid"].flatten(),
                temperature=TEACHER_TEMPERATURE,
            ),
        }

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        prototypes, valid = self.teacher.prototypes.weight, targets["valid"]
        errors = []
        for kind in ("class", "patch"):
            logits = targets[f"{kind}_bottleneck"] @ prototypes.T / TEACHER_TEMPERATURE
            q = F.softmax(logits + targets["coupled"][kind], dim=-1)
            p = F.log_softmax(embeddings[f"{kind}_logits"] / TEMPERATURE, dim=-1)
            errors.append(-(q * p).sum(-1))
        class_error, patch_errors = errors
        # Images without masked patches count as 0.
        weights = valid.to(patch_errors.dtype) / valid.sum(1, keepdim=True).clamp(min=1)
        loss = class_error.mean() + (patch_errors * weights).sum(1).mean()
        koleo_loss = koleo(embeddings["class_token"]) if self.koleo_weight else 0.0
        return LossOutput(
            loss + self.koleo_weight * koleo_loss, {"class_error": class_error.mean()}
        )

    @torch.no_grad()
    def after_step(self, progress, embeddings: Embeddings, targets: Embeddings) -> None:
        assert targets["coupled"].keys() == {"class", "patch"}
        self.teacher.update(self, 0.9, self.step_taken)

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        return Monitored(embeddings["class_token"])


def koleo(z: Tensor) -> Tensor:
    """Return minus the mean logarithm of each row's distance to its nearest one, on all ranks."""
    z = F.normalize(z, dim=-1)
    rows = collectives.gather(z)
    first = process_group.rank() * len(z)
    own = torch.arange(len(z)) + first
    similarities = z.detach() @ rows.detach().T
    similarities[torch.arange(len(z)), own] = -2
    nearest = rows[similarities.argmax(1)]
    return -((z - nearest).norm(dim=1) + 1e-8).log().mean()


def random_batch(step: int, num_images: int) -> Batch:
    """Return images with up to eight masked patches. Every other image has none."""
    generator = torch.Generator().manual_seed(step)
    size = PATCH * GRID
    views = [torch.randn(num_images, 3, size, size, dtype=torch.float64, generator=generator)]
    order = torch.rand(num_images, NUM_PATCHES, generator=generator).argsort(1)
    counts = torch.randint(1, MAX_MASKED + 1, (num_images, 1), generator=generator)
    counts[1::2] = 0
    valid = torch.arange(MAX_MASKED)[None] < counts
    indices = torch.where(valid, order[:, :MAX_MASKED], 0)
    numbers = torch.arange(num_images)
    return Batch(views, numbers, numbers, (MaskSet("masked", 0, indices[:, None], valid[:, None]),))


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return replace(batch, views=[view.to(dtype) for view in batch.views])
