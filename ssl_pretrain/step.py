"""One optimizer step over one global batch: whole, or in parts that leave the same gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods.base import Method
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel import batch_norm, replicas
from ssl_pretrain.parallel import wrap as parallel
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig
from ssl_pretrain.views.batch import Batch

Embeddings = dict[str, Tensor]


@dataclass(frozen=True)
class Stepper:
    """What stays the same from step to step.

    Called with the step's number, its progress and this rank's batch, it moves the weights and returns the step's
    embeddings (local_batch, dim), the targets as `target_<name>`, and its logs, scalars on the device: nothing here waits
    for the accelerator.
    """

    model: nn.Module  # wrapped
    optimizer: torch.optim.Optimizer
    config: ParallelConfig
    seed: int
    micro_batch_size: (
        int  # images fed at once: this rank's share of the global batch, or a part of it that fits
    )
    global_batch_size: int
    optim: OptimConfig
    execution: Execution
    broken: dict[str, Tensor] = field(
        default_factory=dict
    )  # per embedding, the first step at which this rank's was not finite

    def __call__(
        self, step: int, progress: float, batch: Any
    ) -> tuple[Embeddings, dict[str, Tensor]]:
        method: Any = parallel.unwrap(self.model)
        batch = replace(batch, views=self.execution.place_views(batch.views))
        before = batch_norm.snapshot_statistics(method)
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # graphs may reuse the memory of their outputs
        embeddings, targets, loss, logs = self._backward(method)(method, batch, step)
        self._watch(embeddings, step)
        frozen = [
            p
            for name, p in method.named_parameters()
            if name.startswith(tuple(method.frozen(progress)))
        ]
        norm, skipped = optim.guarded_step(
            self.optimizer, self.optim.clip_norm, self.optim.clip_by, frozen
        )
        replicas.average_statistics(self.model, self.config, self.global_batch_size)
        batch_norm.restore_statistics(method, before, skipped > 0)
        method.stepped = 1 - skipped
        method.after_step(progress, embeddings, targets)
        seen = {**embeddings, **{f"target_{name}": value for name, value in targets.items()}}
        return seen, {"loss": loss, **logs, "gradient_norm": norm, "skipped_steps": skipped}

    @property
    def num_parts(self) -> int:
        return self.global_batch_size // process_group.world_size() // self.micro_batch_size

    def _backward(
        self, method: Any
    ) -> Callable[..., tuple[Embeddings, Embeddings, Tensor, dict[str, Tensor]]]:
        if self.num_parts == 1:
            return self._whole
        check_accumulation(method, self.config)
        two = self.config.accumulation == "two_passes" or (
            self.config.accumulation == "auto" and method.couples_batch
        )
        return self._in_two_passes if two else self._accumulated

    def _watch(self, embeddings: Embeddings, step: int) -> None:
        """Remembers, on the device, the first step at which each embedding was not finite."""
        for name, z in embeddings.items():
            first = self.broken.setdefault(name, torch.full((), -1, device=z.device))
            first.copy_(torch.where((first < 0) & ~torch.isfinite(z).all(), step + 1, first))

    def broken_embeddings(self) -> str:
        """Which embeddings of which ranks are not finite, and since which step; empty where none is. Every rank must ask."""
        own = {name: int(first) for name, first in self.broken.items() if first >= 0}
        found = [
            f"{name} of rank {rank} since step {step}"
            for rank, entries in enumerate(collectives.gather_objects(own))
            for name, step in entries.items()
        ]
        return ", ".join(found)

    def _seed(self, step: int, part: int) -> None:
        """Dropout and drop-path by the part of the global batch, so that K parts on one rank draw what K ranks draw."""
        torch.manual_seed(
            rng.seed_of(self.seed, step, process_group.rank() * self.num_parts + part)
        )

    def _embed(self, part: Any) -> Embeddings:
        with self.execution.forward_context():
            return self.model(part)

    def _whole(
        self, method: Any, batch: Any, step: int
    ) -> tuple[Embeddings, Embeddings, Tensor, dict[str, Tensor]]:
        self._seed(step, 0)
        embeddings = self._embed(batch)
        with self.execution.forward_context():
            targets = method.targets(batch)
        loss, logs = method.loss(embeddings, targets)
        loss.backward()
        return _detached(embeddings), targets, loss.detach(), logs

    def _accumulated(
        self, method: Any, batch: Any, step: int
    ) -> tuple[Embeddings, Embeddings, Tensor, dict[str, Tensor]]:
        """Images do not couple: the mean over parts of the parts' losses is the loss."""
        kept = []
        leave = _mean_of_statistics(method, self.num_parts)
        for k in range(self.num_parts):
            part = batch.slice(k, self.num_parts)
            self._seed(step, k)
            with parallel.without_sync(self.model) if k < self.num_parts - 1 else _nothing():
                embeddings = self._embed(part)
                with self.execution.forward_context():
                    targets = method.targets(part)
                loss, logs = method.loss(embeddings, targets)
                (loss / self.num_parts).backward()
            leave(
                k
            )  # not before: backward checks that batch norm's buffers are as its forward left them
            kept.append((_detached(embeddings), targets, {"loss": loss.detach(), **logs}))
        logs = {name: torch.stack([entry[2][name] for entry in kept]).mean() for name in kept[0][2]}
        return (
            _joined([entry[0] for entry in kept]),
            _joined([entry[1] for entry in kept]),
            logs.pop("loss"),
            logs,
        )

    def _in_two_passes(
        self, method: Any, batch: Any, step: int
    ) -> tuple[Embeddings, Embeddings, Tensor, dict[str, Tensor]]:
        """Images couple: embed all parts without a graph, take the loss's gradient by the embeddings once over the whole
        global batch, then embed each part again and send that gradient back (GradCache, arXiv:2101.06983)."""
        parts = [batch.slice(k, self.num_parts) for k in range(self.num_parts)]
        leave = _mean_of_statistics(method, self.num_parts)
        first, targets = [], []
        with torch.no_grad():
            for k, part in enumerate(parts):
                self._seed(step, k)
                first.append(self._embed(part))
                with self.execution.forward_context():
                    targets.append(method.targets(part))
                leave(k)  # of the student and of the teacher
        statistics = [buffer.clone() for buffer in batch_norm.statistics(method)]
        embeddings = {name: z.requires_grad_() for name, z in _joined(first).items()}
        loss, logs = method.loss(embeddings, _joined(targets))
        by_name = dict(
            zip(embeddings, torch.autograd.grad(loss, list(embeddings.values()), allow_unused=True))
        )
        gradients = {
            name: gradient for name, gradient in by_name.items() if gradient is not None
        }  # some are for after_step alone
        replay_error = loss.new_zeros(())
        rows = len(batch) // self.num_parts
        for k, part in enumerate(parts):
            self._seed(step, k)
            with parallel.without_sync(self.model) if k < self.num_parts - 1 else _nothing():
                again = self._embed(part)
                own = slice(k * rows, (k + 1) * rows)
                sent_back = [
                    gradient[own].to(again[name].dtype) for name, gradient in gradients.items()
                ]
                torch.autograd.backward([again[name] for name in gradients], sent_back)
            differences = [
                (again[name].detach() - embeddings[name].detach()[own]).abs().max()
                for name in gradients
            ]
            replay_error = torch.stack(
                [replay_error, *(d.to(replay_error.dtype) for d in differences)]
            ).max()
        with torch.no_grad():  # pass 2 moved them again
            for buffer, kept in zip(batch_norm.statistics(method), statistics):
                buffer.copy_(kept)
        return (
            _detached(embeddings),
            _joined(targets),
            loss.detach(),
            {**logs, "replay_error": replay_error},
        )


def build_stepper(
    method: Method,
    parallel_config: ParallelConfig,
    optim_config: OptimConfig,
    execution: Execution,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    example: Batch,
    seed: int = 0,
) -> Stepper:
    """Wrap a method, build its optimizer, and return the function that takes optimizer steps.

    Args:
        method: The method, on the CPU.
        parallel_config: How the ranks compute.
        optim_config: The optimizer and its schedules.
        execution: Device and formats.
        micro_batch_size: Images per forward pass on this rank.
        global_batch_size: Images per optimizer step over all ranks.
        example: A micro-batch in the shapes of the run.
        seed: Seed of dropout and drop path.
    """
    model = parallel.wrap(
        method,
        parallel_config,
        execution,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        example=example,
    )
    return Stepper(
        model,
        optim.build(optim_config, method),
        parallel_config,
        seed,
        micro_batch_size,
        global_batch_size,
        optim_config,
        execution,
    )


def check_accumulation(method: Any, config: ParallelConfig) -> None:
    """Refuses parts that would train another loss.

    Raises:
        ValueError: one pass was asked for, and the method's loss couples the images of a batch.
    """
    if config.accumulation == "one_pass" and method.couples_batch:
        name = method.config.name
        raise ValueError(
            f"parallel.accumulation: one_pass does not train {name}: its loss compares the images of a batch with each other, and a sum of "
            "the parts' losses has only each part's own pairs; choose auto or two_passes, which keep those of the whole global batch"
        )


def _mean_of_statistics(method: nn.Module, num_parts: int) -> Callable[[int], None]:
    """A function to call after each part's forward: every part starts from the same running statistics, and the mean
    of what the parts would leave remains after the last."""
    buffers = batch_norm.statistics(method)
    before = [buffer.clone() for buffer in buffers]
    total = [torch.zeros_like(buffer) for buffer in buffers]

    @torch.no_grad()
    def leave(k: int) -> None:
        for buffer, start, sum_ in zip(buffers, before, total):
            sum_ += buffer
            buffer.copy_(sum_ / num_parts if k == num_parts - 1 else start)

    return leave


def _detached(embeddings: Embeddings) -> Embeddings:
    return {name: z.detach() for name, z in embeddings.items()}


def _joined(parts: list[Embeddings]) -> Embeddings:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _nothing() -> Any:
    return torch.enable_grad()
