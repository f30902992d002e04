"""Is the representation alive? Every `every_steps` the embeddings of all ranks are measured, whatever the loss does.

docs/health.md explains each number, what is healthy, and what others did when it was not; `alarms.py` is what judges them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.models.teacher import Teacher
from ssl_pretrain.monitoring import collapse_metrics
from ssl_pretrain.monitoring.collapse_alerts import Alarms
from ssl_pretrain.schema import setting

STUDENT = (
    "z_a",
    "z",
    "queries",
    "p_a",
    "targets",
)  # what a method calls its student's embeddings of the first view
PAIRS = (
    ("z_a", "z_b"),
    ("queries", "target_keys"),
    ("p_a", "target_z_b"),
)  # two views of the same images
SHOWN = 64  # points of a spectrum, bins of a histogram, that are kept


@dataclass
class HealthConfig:
    """When the embeddings are measured, and how the run reacts to collapse."""

    every_steps: int = setting(
        50, "Steps between two measurements. 50 costs under 1 % of the training time. 0: never."
    )
    max_rows: int = setting(
        1024, "Embeddings of all ranks per measurement, which bounds the size of the spectrum."
    )
    on_collapse: Literal["warn", "stop"] = setting(
        "warn",
        "Reaction to collapse. stop: end the run with exit status 2 and keep its checkpoints.",
    )


class Collapsed(RuntimeError):
    """The run was told to stop at an alarm, and there was one."""


class Monitor:
    """Measures a method while it trains. Nothing of the training sees it: no random number, no weight, no mode changes.

    Args:
        first_step: steps done already.
        past: records of metrics.jsonl so far, for rank 0's memory of better days.
        alert: told of each alarm, (title, text), on rank 0.
    """

    def __init__(
        self,
        config: HealthConfig,
        method: Any,
        optimizer: torch.optim.Optimizer,
        first_step: int = 0,
        past: list[dict[str, Any]] | None = None,
        alert: Callable[[str, str], None] = lambda title, text: None,
    ):
        self.config, self.method, self.alert = config, method, alert
        self.alarms = Alarms(past or [])
        self._parts = _parts(method)
        self._num_prototypes = getattr(getattr(method, "config", None), "num_prototypes", None)
        self._features: Tensor | None = None
        self._hook: Any = None
        self._before: dict[str, list[Tensor]] = {}
        self._network: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())
        self._expect(first_step + 1)

    def due(self, step: int) -> bool:
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def at(self, step: int, embeddings: dict[str, Tensor]) -> dict[str, Any]:
        """After a step: its measures where they are due, numbers and (in `plots`) the curves of them; else nothing.

        Raises:
            Collapsed: on every rank alike, at an alarm where the config says stop.
        """
        if not self.due(step):
            self._expect(step + 1)
            return {}
        found, plots = measure(embeddings, self._features, self.config, self._num_prototypes)
        found |= {name: value.double() for name, value in self._network.items()}
        numbers = dict(
            zip(found, torch.stack([value.double().to("cpu") for value in found.values()]).tolist())
        )
        self._expect(step + 1)
        self._judge(step, numbers)
        return {**numbers, "plots": {name: value.tolist() for name, value in plots.items()}}

    def _judge(self, step: int, numbers: dict[str, float]) -> None:
        alarms = self.alarms.judge(step, numbers) if process_group.is_main() else []
        for alarm in alarms:
            self.alert(alarm.title, alarm.text)
        if self.config.on_collapse == "stop":
            ending = collectives.broadcast_object(
                [alarm.text for alarm in alarms if alarm.collapse]
            )
            if ending:
                raise Collapsed(
                    f"step {step}: {ending[0]} Stopped, as health.on_collapse says; the checkpoints before are whole"
                )

    def _expect(self, step: int) -> None:
        """Looks at the coming step if it is to be measured, and at no other."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = (
            self.method.backbone.register_forward_hook(self._keep_features)
            if self.due(step)
            else None
        )
        self._watching, self._features, self._network = self._hook is not None, None, {}

    def _keep_features(self, module: nn.Module, inputs: Any, features: Tensor) -> None:
        self._features = features.detach()

    @torch.no_grad()
    def _before_step(self) -> None:
        if self._watching:
            for part, parameters in self._parts.items():
                moving = [parameter for parameter in parameters if parameter.grad is not None]
                if moving:
                    self._network[f"gradient_norm_{part}"] = collapse_metrics.norm(
                        [p.grad for p in moving if p.grad is not None]
                    )
                self._before[part] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def _after_step(self) -> None:
        """Sizes of the updates relative to the weights, and how far the teacher is."""
        for part, before in self._before.items():
            now = [parameter.detach() for parameter in self._parts[part]]
            change = collapse_metrics.norm(list(torch._foreach_sub(now, before)))
            self._network[f"update_ratio_{part}"] = change / collapse_metrics.norm(before).clamp(
                min=1e-12
            )
        if self._before:
            self._network |= _teacher_distance(self.method)
        self._before = {}


@torch.no_grad()
def measure(
    embeddings: dict[str, Tensor],
    features: Tensor | None,
    config: HealthConfig,
    num_prototypes: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(numbers, curves) of the embeddings of all ranks: scalars and vectors on the device, the same on every rank.

    Args:
        embeddings: of this rank, (local_batch, dim) each; the targets' names begin with `target_`.
        features: of the backbone, (rows, feature_dim), or None.
        num_prototypes: where there are any.
    """

    def everyones(rows: Tensor) -> Tensor:
        rows = rows.detach()[: max(1, config.max_rows // process_group.world_size())]
        return collectives.gather(
            rows if rows.dtype == torch.float64 or not rows.is_floating_point() else rows.float()
        )

    name = next(name for name in (*STUDENT, *embeddings) if name in embeddings)
    z, broken = _finite(everyones(embeddings[name].flatten(1)))
    found, plots = _of_embeddings(z)
    pair = next((pair for pair in PAIRS if all(name in embeddings for name in pair)), None)
    if pair is not None:
        (z_a, broken_a), (z_b, broken_b) = (_finite(everyones(embeddings[name])) for name in pair)
        found |= _of_pairs(z_a, z_b)
        broken = broken | broken_a | broken_b
    if features is not None:
        kept, broken_features = _finite(everyones(features))
        variances = collapse_metrics.singular_values(collapse_metrics.centred(kept)).square()
        found |= {
            "feature_rank_centered": collapse_metrics.rank_of(variances.sqrt()),
            "alpha_req": collapse_metrics.alpha_req(variances),
        }
        broken = broken | broken_features
    if "assigned" in embeddings or "target_assigned" in embeddings or "scores" in embeddings:
        found |= _of_assignments(embeddings, everyones, num_prototypes)
    return {name: torch.where(broken, torch.nan, value) for name, value in found.items()}, plots


def _of_embeddings(z: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    deviations = collapse_metrics.deviations(z)
    spectrum = collapse_metrics.singular_values(collapse_metrics.centred(z))
    variances = spectrum.square() / max(1, len(z) - 1)
    most = min(len(z) - 1, z.shape[1])
    rank = collapse_metrics.rank_of(spectrum[:most])
    found = {
        "rankme": collapse_metrics.rank_of(collapse_metrics.singular_values(z)),
        "effective_rank_centered": rank,
        "rank_share": rank / most,
        "top5_ratio": variances[:5].sum() / variances.sum().clamp(min=1e-30),
        "embedding_std": deviations.mean(),
        "embedding_std_min": deviations.min(),
        "embedding_scale": z.std(0, unbiased=False).mean(),
        "uniformity": collapse_metrics.uniformity(z),
    }
    shown = torch.linspace(0, most - 1, min(SHOWN, most), device=z.device).round().long()
    return found, {
        "spectrum_index": shown + 1,
        "spectrum": variances[shown],
        "deviations": deviations.sort().values[_spread(len(deviations))],
    }


def _spread(count: int) -> list[int]:
    return [round(i * (count - 1) / (min(SHOWN, count) - 1 or 1)) for i in range(min(SHOWN, count))]


def _of_pairs(z_a: Tensor, z_b: Tensor) -> dict[str, Tensor]:
    rank = collapse_metrics.positive_rank(z_a, z_b)
    return {
        "alignment": collapse_metrics.alignment(z_a, z_b),
        "pair_cosine": F.cosine_similarity(z_a, z_b, dim=1).mean(),
        "positive_rank": rank,
        "positive_chance": 2 * rank / (len(z_a) + 1),
    }


def _of_assignments(
    embeddings: dict[str, Tensor], everyones: Callable[[Tensor], Tensor], num_prototypes: int | None
) -> dict[str, Tensor]:
    if "scores" in embeddings:
        assigned, count = embeddings["scores"][:, 0].argmax(1), embeddings["scores"].shape[-1]
    else:
        assigned, count = (
            embeddings["assigned" if "assigned" in embeddings else "target_assigned"],
            num_prototypes or 1,
        )
    usage, entropy = collapse_metrics.assignments(everyones(assigned), count)
    return {"prototype_usage": usage, "prototype_entropy": entropy}


def _finite(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, or zeros where any is not finite: a decomposition would raise, and the run says so better itself."""
    broken = ~torch.isfinite(rows).all()
    return torch.where(broken, torch.zeros_like(rows), rows), broken


def _parts(method: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters of each top part of a method: backbone, projector, ..."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            found.setdefault(name.partition(".")[0], []).append(parameter)
    return found


def _teacher_distance(method: nn.Module) -> dict[str, Tensor]:
    """|teacher - student| / |student| over the weights that both have; nothing where there is no teacher."""
    teacher = getattr(method, "teacher", None)
    if not isinstance(teacher, Teacher):
        return {}
    student = [
        p.detach()
        for name, _ in teacher.named_children()
        for p in method.get_submodule(name).parameters()
    ]
    own = [parameter.detach() for parameter in teacher.parameters()]
    return {
        "teacher_distance": collapse_metrics.norm(list(torch._foreach_sub(own, student)))
        / collapse_metrics.norm(student).clamp(min=1e-12)
    }
