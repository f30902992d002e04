"""Collapse metrics of a run, measured every `health.every_steps` whatever the loss is.

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
from ssl_pretrain.monitoring import batch_metrics
from ssl_pretrain.monitoring.collapse_alerts import AlertHistory
from ssl_pretrain.monitoring.measurements import Measurements
from ssl_pretrain.monitoring.network_metrics import NetworkMonitor
from ssl_pretrain.schema import setting


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


class CollapseError(RuntimeError):
    """An alert was raised in a run that stops at alerts."""


class CollapseMonitor:
    """Monitor of a method while it trains. No random number, weight or mode changes.

    Args:
        config: The `health` section of the configuration.
        method: The method, whose backbone's outputs are measured too.
        optimizer: Its optimizer, whose steps are measured too.
        first_step: Steps that the run has done already.
        past_records: Records of a resumed run so far, on rank 0.
        raise_alert: Called with the title and the text of each alert, on rank 0.
    """

    def __init__(
        self,
        config: HealthConfig,
        method: Method,
        optimizer: torch.optim.Optimizer,
        first_step: int = 0,
        past_records: list[dict[str, Any]] | None = None,
        raise_alert: Callable[[str, str], None] = lambda title, text: None,
    ):
        self.config, self.method, self.raise_alert = config, method, raise_alert
        self.history = AlertHistory(past_records or [])
        self._network = NetworkMonitor(method, optimizer)
        self._features: Tensor | None = None
        self._hook: RemovableHandle | None = None
        self._prepare(first_step + 1)

    def due(self, step: int) -> bool:
        """Return True if this step is measured."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def measure(self, step: int, embeddings: Embeddings, targets: Embeddings) -> Measurements:
        """Measure a step that has ended, if it is due.

        Raises:
            CollapseError: On every rank, at an alert, if `health.on_collapse` is `stop`.
        """
        if not self.due(step):
            self._prepare(step + 1)
            return Measurements()
        metrics, curves = batch_metrics.measure(
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
        alerts = self.history.check(step, metrics) if process_group.is_main() else []
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
        """Observe the coming step if it is due, and no other."""
        if self._hook is not None:
            self._hook.remove()
        due = self.due(step)
        self._features = None
        self._hook = self.method.backbone.register_forward_hook(self._keep) if due else None
        self._network.observe(due)

    def _keep(self, module: nn.Module, inputs: Any, features: Tensor) -> None:
        self._features = features.detach()
