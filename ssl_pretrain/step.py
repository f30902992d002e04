"""One optimizer step over the global batch, whole or in micro-batches with the same gradient."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import batch_norm, replicas
from ssl_pretrain.parallel import wrap as parallel
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig
from ssl_pretrain.views.batch import Batch


class StepOutput(NamedTuple):
    """Tensors on the device after a step. The host waits for the device if it reads one."""

    embeddings: Embeddings  # detached, of this rank's images, without the transient ones
    targets: Embeddings  # likewise
    logs: dict[str, Tensor]  # scalars


class BackwardOutput(NamedTuple):
    """Embeddings, targets and loss of this rank's images, after the backward pass."""

    embeddings: Embeddings
    targets: Embeddings
    loss: LossOutput


@dataclass(frozen=True)
class Stepper:
    """Take optimizer steps with a method.

    Attributes:
        model: The method, wrapped for the ranks of the run.
        optimizer: Its optimizer, whose rates are set before each step.
        config: How the run is spread over ranks and micro-batches.
        seed: Seed of the run, from which dropout and drop path draw.
        micro_batch_size: Images per forward pass on this rank.
        global_batch_size: Images per step over all ranks.
        optim: Clipping of the gradient.
        execution: Device and formats of the model.
        first_bad_step: Number of the first step, counted from 1, at which an embedding of this
            rank was not finite. One scalar per embedding, -1 while it is finite.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: ParallelConfig
    seed: int
    micro_batch_size: int
    global_batch_size: int
    optim: OptimConfig
    execution: Execution
    first_bad_step: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, progress: Progress, batch: Batch) -> StepOutput:
        """Move the weights by the gradient of one global batch.

        Args:
            progress: Progress of this step.
            batch: This rank's share of the global batch.
        """
        method = self.method
        batch = replace(batch, views=self.execution.place_views(batch.views))
        statistics_before = batch_norm.snapshot_statistics(method)
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # graphs may reuse their outputs' memory
        embeddings, targets, (loss, logs) = self._backward(batch, progress.step)
        self._record_first_bad_step(embeddings, progress.step)
        gradient_norm, skipped = optim.guarded_step(
            self.optimizer,
            self.optim.clip_norm,
            self.optim.clip_by,
            _parameters_under(method, method.frozen(progress)),
        )
        replicas.average_statistics(self.model, self.config, self.global_batch_size)
        batch_norm.restore_statistics(method, statistics_before, skipped > 0)
        method.stepped = 1 - skipped
        method.after_step(progress, embeddings, targets)
        logs = {"loss": loss, **logs, "gradient_norm": gradient_norm, "skipped_steps": skipped}
        return StepOutput(embeddings, targets, logs)

    @property
    def method(self) -> Method:
        """The method inside the wrapped model."""
        method = parallel.unwrap(self.model)
        assert isinstance(method, Method), f"{type(method).__name__} is not a Method"
        return method

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step on this rank."""
        return self.global_batch_size // process_group.world_size() // self.micro_batch_size

    def describe_bad_embeddings(self) -> str:
        """List the embeddings that were not finite, with rank and first step; empty if all were.

        A collective: every rank has to call it.
        """
        on_this_rank = {name: int(step) for name, step in self.first_bad_step.items() if step >= 0}
        return ", ".join(
            f"{name} of rank {rank} since step {step}"
            for rank, first_steps in enumerate(collectives.gather_objects(on_this_rank))
            for name, step in first_steps.items()
        )

    def _record_first_bad_step(self, embeddings: Embeddings, step: int) -> None:
        for name, z in embeddings.items():
            first = self.first_bad_step.setdefault(name, torch.full((), -1, device=z.device))
            first.copy_(torch.where((first < 0) & ~torch.isfinite(z).all(), step + 1, first))

    def _backward(self, batch: Batch, step: int) -> BackwardOutput:
        """Leave the gradient of the global batch's loss in the parameters."""
        if self.num_micro_batches == 1:
            return self._backward_whole(batch, step)
        check_accumulation(self.method, self.config)
        if needs_two_passes(self.method, self.config):
            return self._backward_in_two_passes(batch, step)
        return self._backward_accumulated(batch, step)

    def _backward_whole(self, batch: Batch, step: int) -> BackwardOutput:
        method = self.method
        self._seed(step, 0)
        embeddings = self._embed(batch)
        targets = self._targets(batch)
        output = method.loss(embeddings, targets)
        output.loss.backward()
        return _without_transient(method, embeddings, targets, output)

    def _backward_accumulated(self, batch: Batch, step: int) -> BackwardOutput:
        """Add up the gradients of the micro-batches.

        Exact where images do not couple: the loss is then the mean of the micro-batches' losses.
        """
        method, outputs = self.method, []
        restore_statistics = _averaging_statistics(method, self.num_micro_batches)
        for k, micro_batch in enumerate(self._micro_batches(batch)):
            self._seed(step, k)
            with self._gradients_travel_after_last(k):
                embeddings = self._embed(micro_batch)
                targets = self._targets(micro_batch)
                output = method.loss(embeddings, targets)
                (output.loss / self.num_micro_batches).backward()
            restore_statistics(k)  # after backward, which checks that the buffers are unchanged
            outputs.append(_without_transient(method, embeddings, targets, output))
        logs = concatenate_micro_batches(
            [{name: value[None] for name, value in output.loss.logs.items()} for output in outputs]
        )
        return BackwardOutput(
            concatenate_micro_batches([output.embeddings for output in outputs]),
            concatenate_micro_batches([output.targets for output in outputs]),
            LossOutput(
                torch.stack([output.loss.loss for output in outputs]).mean(),
                {name: values.mean() for name, values in logs.items()},
            ),
        )

    def _backward_in_two_passes(self, batch: Batch, step: int) -> BackwardOutput:
        """Compute the gradient with respect to the embeddings first, then that of the weights.

        The first pass embeds all micro-batches without a graph. The loss over all of them gives the
        gradient with respect to the embeddings. The second pass embeds each micro-batch again and
        sends its rows of that gradient back (GradCache, Gao et al., arXiv:2101.06983).
        """
        method = self.method
        micro_batches = self._micro_batches(batch)
        embeddings, targets = self._embed_without_graph(micro_batches, step)
        statistics = [buffer.clone() for buffer in batch_norm.statistics(method)]
        output = method.loss(embeddings, targets)
        gradients = _gradients(output.loss, embeddings)
        replay_error = output.loss.new_zeros(())  # largest difference between the two passes
        size = len(batch) // self.num_micro_batches
        for k, micro_batch in enumerate(micro_batches):
            self._seed(step, k)
            rows = slice(k * size, (k + 1) * size)
            with self._gradients_travel_after_last(k):
                replayed = self._embed(micro_batch)
                torch.autograd.backward(
                    [replayed[name] for name in gradients],
                    [g[rows].to(replayed[name].dtype) for name, g in gradients.items()],
                )
            for name in gradients:
                difference = (replayed[name].detach() - embeddings[name].detach()[rows]).abs().max()
                replay_error = torch.maximum(replay_error, difference.to(replay_error.dtype))
        with torch.no_grad():  # the second pass moved the statistics a second time
            for buffer, value in zip(batch_norm.statistics(method), statistics):
                buffer.copy_(value)
        output.logs["replay_error"] = replay_error
        return _without_transient(method, embeddings, targets, output)

    def _embed_without_graph(
        self, micro_batches: Sequence[Batch], step: int
    ) -> tuple[Embeddings, Embeddings]:
        """Return the embeddings of all micro-batches, as leaves of a graph, and the targets."""
        method = self.method
        restore_statistics = _averaging_statistics(method, self.num_micro_batches)
        embeddings, targets = [], []
        with torch.no_grad():
            for k, micro_batch in enumerate(micro_batches):
                self._seed(step, k)
                embeddings.append(self._embed(micro_batch))
                targets.append(self._targets(micro_batch))
                restore_statistics(k)  # the student's and the teacher's
        leaves = {
            name: z.requires_grad_() for name, z in concatenate_micro_batches(embeddings).items()
        }
        return leaves, concatenate_micro_batches(targets)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        return [batch.slice(k, self.num_micro_batches) for k in range(self.num_micro_batches)]

    def _gradients_travel_after_last(self, k: int) -> AbstractContextManager[object]:
        is_last = k == self.num_micro_batches - 1
        return nullcontext() if is_last else parallel.without_sync(self.model)

    def _seed(self, step: int, k: int) -> None:
        """Seed dropout and drop path by the slice of the global batch that is computed next.

        Micro-batches on one rank then draw what as many ranks draw.
        """
        slice_of_batch = process_group.rank() * self.num_micro_batches + k
        torch.manual_seed(rng.seed_of(self.seed, step, slice_of_batch))

    def _embed(self, batch: Batch) -> Embeddings:
        with self.execution.forward_context():
            embeddings: Embeddings = self.model(batch)
            return embeddings

    def _targets(self, batch: Batch) -> Embeddings:
        with self.execution.forward_context():
            return self.method.targets(batch)


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


def needs_two_passes(method: Method, config: ParallelConfig) -> bool:
    """Return True if micro-batches of this method are embedded twice."""
    chosen = config.accumulation == "auto" and method.couples == "embeddings"
    return chosen or config.accumulation == "two_passes"


def check_accumulation(method: Method, config: ParallelConfig) -> None:
    """Refuse micro-batches that would train another loss.

    Raises:
        ValueError: `parallel.accumulation` is one pass and the method's loss compares images, or
            the loss couples the targets of different images.
    """
    if method.couples == "targets":
        raise ValueError(
            f"micro_batch_size: {method.config.name} cannot be trained in micro-batches, because "
            "its loss couples the targets of different images; set micro_batch_size=0"
        )
    if config.accumulation == "one_pass" and method.couples == "embeddings":
        raise ValueError(
            f"parallel.accumulation: one_pass does not train {method.config.name}: this loss "
            "compares images across the whole batch. Summing the losses of micro-batches would "
            "drop the pairs between them. Set auto or two_passes, which keep all pairs"
        )


def concatenate_micro_batches(outputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the rows of the micro-batches, name by name."""
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


def _gradients(loss: Tensor, embeddings: Embeddings) -> Embeddings:
    """Return the gradient with respect to each embedding that the loss uses.

    The others are only there for `after_step`.
    """
    gradients = torch.autograd.grad(loss, list(embeddings.values()), allow_unused=True)
    return {name: g for name, g in zip(embeddings, gradients) if g is not None}


def _without_transient(
    method: Method, embeddings: Embeddings, targets: Embeddings, output: LossOutput
) -> BackwardOutput:
    """Detach everything and drop what the method does not keep."""
    return BackwardOutput(
        {name: z.detach() for name, z in embeddings.items() if name not in method.transient},
        {name: z for name, z in targets.items() if name not in method.transient},
        LossOutput(
            output.loss.detach(), {name: value.detach() for name, value in output.logs.items()}
        ),
    )


def _parameters_under(method: Method, prefixes: Sequence[str]) -> list[Tensor]:
    return [p for name, p in method.named_parameters() if name.startswith(tuple(prefixes))]


def _averaging_statistics(method: Method, num_micro_batches: int) -> Callable[[int], None]:
    """Return a function to call after each micro-batch, which averages batch norm's statistics.

    Every micro-batch starts from the same running statistics. After the last one they become the
    mean of what each micro-batch alone would have left.
    """
    buffers = batch_norm.statistics(method)
    start = [buffer.clone() for buffer in buffers]
    totals = [torch.zeros_like(buffer) for buffer in buffers]

    @torch.no_grad()
    def restore(k: int) -> None:
        for buffer, initial, total in zip(buffers, start, totals):
            total += buffer
            is_last = k == num_micro_batches - 1
            buffer.copy_(total / num_micro_batches if is_last else initial)

    return restore
