"""Measure collapse and network metrics every `health.every_steps` steps, for every method.

docs/health.md explains each metric and its healthy values. `collapse_alerts.py` decides which
values raise an alert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods.base import Embeddings, Method
from ssl_pretrain.models.components import Teacher
from ssl_pretrain.monitoring import collapse_metrics
from ssl_pretrain.monitoring.collapse_alerts import AlertHistory
from ssl_pretrain.monitoring.records import Measurements
from ssl_pretrain.schema import setting


@dataclass
class HealthConfig:
    """Settings of the collapse metrics and their alerts."""

    every_steps: int = setting(
        50,
        "Steps between two measurements, or 0 for none. 50 costs under 1 % of the training time.",
    )
    max_rows: int = setting(
        1024, "Largest number of embeddings per measurement, over all ranks.", unit="embeddings"
    )
    on_collapse: Literal["warn", "stop"] = setting(
        "warn",
        "What to do after an alert. stop ends the run with exit status 2. warn lets it continue.",
    )


class CollapseError(RuntimeError):
    """An alert was raised in a run with `health.on_collapse` set to `stop`."""


class CollapseMonitor:
    """Monitor of a method during training. It changes no random number, weight or mode.

    Args:
        config: The `health` section of the configuration.
        method: The method. The features of its backbone are measured too.
        optimizer: The method's optimizer, whose steps are measured too.
        num_steps_done: Number of steps that the run has already done.
        past_records: Earlier records of a resumed run, on rank 0.
        raise_alert: Called with the title and the text of each alert, on rank 0.
    """

    def __init__(
        self,
        config: HealthConfig,
        method: Method,
        optimizer: torch.optim.Optimizer,
        num_steps_done: int = 0,
        past_records: list[dict[str, Any]] | None = None,
        raise_alert: Callable[[str, str], None] = lambda title, text: None,
    ):
        self.config, self.method, self.raise_alert = config, method, raise_alert
        self.alert_history = AlertHistory(past_records or [])
        self._network = NetworkMonitor(method, optimizer)
        self._features: Tensor | None = None
        self._hook: RemovableHandle | None = None
        self._prepare(num_steps_done + 1)

    def is_due(self, step: int) -> bool:
        """Return True if this step is measured."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def measure(self, step: int, embeddings: Embeddings, targets: Embeddings) -> Measurements:
        """Measure a finished step, if a measurement is due.

        Raises:
            CollapseError: If an alert is raised and `health.on_collapse` is `stop`. Every rank
                raises it.
        """
        if not self.is_due(step):
            self._prepare(step + 1)
            return Measurements()
        metrics, curves = collapse_metrics.measure(
            self.method.monitored(embeddings, targets), self._features, self.config.max_rows
        )
        metrics |= self._network.metrics
        values = torch.stack([value.double().to("cpu") for value in metrics.values()]).tolist()
        measurements = Measurements(
            dict(zip(metrics, values)), {name: curve.tolist() for name, curve in curves.items()}
        )
        self._prepare(step + 1)
        self.check(step, measurements.metrics)
        return measurements

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raise the alerts of a measurement, and end the run if it is configured to stop."""
        alerts = self.alert_history.update(step, metrics) if process_group.is_main() else []
        for alert in alerts:
            self.raise_alert(alert.title, alert.text)
        if self.config.on_collapse == "stop":
            texts = collectives.broadcast_object([alert.text for alert in alerts])
            if texts:
                raise CollapseError(
                    f"{texts[0]} Stopped because health.on_collapse is stop. "
                    "The checkpoints are intact"
                )

    def _prepare(self, step: int) -> None:
        """Observe a step that is about to start, if it is due."""
        if self._hook is not None:
            self._hook.remove()
        self._features = self._hook = None
        if self.is_due(step):
            self._hook = self.method.backbone.register_forward_hook(self._store_features)
        self._network.observe(self.is_due(step))

    def _store_features(self, module: nn.Module, inputs: Any, features: Tensor) -> None:
        self._features = features.detach()


class NetworkMonitor:
    """Monitor of gradients, weight updates and the teacher's distance from the student.

    Attributes:
        metrics: Scalars on the device from the last step, empty unless it was observed.
    """

    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer):
        self.metrics: dict[str, Tensor] = {}
        self._method = method
        self._is_observing = False
        # Trained parameters, by submodule of the method, such as backbone.
        self._modules: dict[str, list[nn.Parameter]] = {}
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                self._modules.setdefault(name.partition(".")[0], []).append(parameter)
        self._old_parameters: dict[str, list[Tensor]] = {}
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    def observe(self, is_due: bool) -> None:
        """Discard the metrics of the last step, and observe the next one if it is due."""
        self._is_observing, self.metrics = is_due, {}

    @torch.no_grad()
    def _before_step(self) -> None:
        if not self._is_observing:
            return
        for module, parameters in self._modules.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                self.metrics[f"gradient_norm_{module}"] = norm(gradients)
            self._old_parameters[module] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def _after_step(self) -> None:
        for module, old in self._old_parameters.items():
            new = [parameter.detach() for parameter in self._modules[module]]
            self.metrics[f"update_ratio_{module}"] = relative_distance(new, old)
        teacher = getattr(self._method, "teacher", None)
        if self._old_parameters and isinstance(teacher, Teacher):
            student = [
                parameter.detach()
                for name, _ in teacher.named_children()
                for parameter in self._method.get_submodule(name).parameters()
            ]
            weights = [parameter.detach() for parameter in teacher.parameters()]
            self.metrics["teacher_distance"] = relative_distance(weights, student)
        self._old_parameters = {}


def relative_distance(tensors: list[Tensor], reference: list[Tensor]) -> Tensor:
    """Return the norm of the difference divided by the norm of the reference."""
    difference = norm(list(torch._foreach_sub(tensors, reference)))
    return difference / norm(reference).clamp(min=1e-12)


def norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together. Shards count as their whole tensors."""
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return total.full_tensor() if hasattr(total, "full_tensor") else total
