"""Take an optimizer step over the global batch, as a whole or in micro-batches.

The gradient is the same in both cases.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssl_pretrain import accumulation, rng
from ssl_pretrain.accumulation import StatisticsAverage
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import optimizers, schedules
from ssl_pretrain.parallel import batch_norm, wrap
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.views.batch import Batch


class StepOutput(NamedTuple):
    """Detached tensors on the device. Reading one makes the host wait for the device."""

    embeddings: Embeddings  # this rank's, without the transient ones
    targets: Embeddings  # this rank's, without the transient ones
    logs: dict[str, Tensor]  # scalars


@dataclass(frozen=True)
class Stepper:
    """Callable that takes optimizer steps with a method.

    Attributes:
        model: The method, wrapped for the ranks of the run.
        optimizer: The optimizer of the method. Its learning rates are set before each step.
        parallel_config: Parallel settings of the run.
        seed: Seed of the run, which determines dropout and drop path.
        micro_batch_size: Images per forward pass on this rank.
        global_batch_size: Images per step over all ranks.
        optim_config: Optimizer settings, used for clipping the gradient.
        execution: Device and formats of the model.
        first_nonfinite_steps: For each embedding of this rank, the first step, counted from 1, at
            which it was not finite. The value is -1 while there is no such step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parallel_config: ParallelConfig
    seed: int
    micro_batch_size: int
    global_batch_size: int
    optim_config: optimizers.OptimConfig
    execution: Execution
    first_nonfinite_steps: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, progress: schedules.Progress, batch: Batch) -> StepOutput:
        """Update the weights with the gradient of one global batch.

        Args:
            progress: Progress of this step.
            batch: This rank's share of the global batch.
        """
        method = self.method
        batch = replace(batch, views=self.execution.place_views(batch.views))
        statistics_before = batch_norm.snapshot_statistics(method)
        is_frozen = optimizers.freezes_backbone(self.optim_config, progress)
        frozen_statistics = (
            batch_norm.clone_statistics(backbones.networks(method)) if is_frozen else []
        )
        self.optimizer.zero_grad(set_to_none=True)
        if self.parallel_config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # earlier outputs may be overwritten
        embeddings, targets, logs = self._backward(batch, progress.step)
        self._record_nonfinite_embeddings(embeddings, progress.step)
        frozen_prefixes = (*method.frozen(progress), *(["backbone."] if is_frozen else []))
        gradient_norm, skipped = optimizers.step_if_finite(
            self.optimizer,
            self.optim_config.clip_norm,
            self.optim_config.clip_by,
            [p for name, p in method.named_parameters() if name.startswith(frozen_prefixes)],
        )
        wrap.average_statistics(self.model, self.parallel_config, self.global_batch_size)
        batch_norm.restore_statistics(method, statistics_before, skipped > 0)
        batch_norm.restore_clones(frozen_statistics)
        method.step_taken = 1 - skipped
        method.after_step(progress, embeddings, targets)
        logs |= {"gradient_norm": gradient_norm, "skipped_steps": skipped}
        return StepOutput(embeddings, targets, logs)

    @property
    def method(self) -> Method:
        """The method inside the wrapped model."""
        return wrap.unwrap(self.model)

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches per step on this rank."""
        return self.global_batch_size // process_group.world_size() // self.micro_batch_size

    def describe_nonfinite_embeddings(self) -> str:
        """List the embeddings that were not finite, with rank and first step.

        The text is empty if all were finite. This is a collective that every rank must call.
        """
        local_steps = {
            name: int(step) for name, step in self.first_nonfinite_steps.items() if step >= 0
        }
        return ", ".join(
            f"{name} of rank {rank} since step {step}"
            for rank, first_steps in enumerate(collectives.gather_objects(local_steps))
            for name, step in first_steps.items()
        )

    def _record_nonfinite_embeddings(self, embeddings: Embeddings, step: int) -> None:
        for name, z in embeddings.items():
            first_step = self.first_nonfinite_steps.setdefault(
                name, torch.full((), -1, device=z.device)
            )
            is_first = (first_step < 0) & ~torch.isfinite(z).all()
            first_step.copy_(torch.where(is_first, step + 1, first_step))

    def _backward(self, batch: Batch, step: int) -> StepOutput:
        """Compute the gradient of the global batch's loss with respect to the parameters."""
        if self.num_micro_batches == 1:
            return self._backward_whole_batch(batch, step)
        match accumulation.choose_way(self.method, self.parallel_config):
            case "two_passes":
                return self._backward_in_two_passes(batch, step)
            case "targets_first":
                return self._backward_with_targets_first(batch, step)
            case "one_pass":
                return self._backward_in_one_pass(batch, step)

    def _backward_whole_batch(self, batch: Batch, step: int) -> StepOutput:
        self._seed(step, 0)
        embeddings, targets = self._embed(batch), self._targets(batch)
        targets = self.method.couple_targets(targets)
        output = self.method.loss(embeddings, targets)
        output.loss.backward()
        return _build_output(self.method, embeddings, targets, output)

    def _backward_in_one_pass(self, batch: Batch, step: int) -> StepOutput:
        """Add up the gradients of the micro-batches.

        This is exact if the loss does not compare images with each other, because the loss is then
        the mean of the micro-batches' losses.
        """
        method, outputs = self.method, []
        statistics = StatisticsAverage(method, self.num_micro_batches)
        for k, micro_batch in enumerate(self._micro_batches(batch)):
            self._seed(step, k)
            with self._no_sync_before_last(k):
                embeddings = self._embed(micro_batch)
                targets = self._targets(micro_batch)
                output = method.loss(embeddings, targets)
                (output.loss / self.num_micro_batches).backward()
            statistics.update(k)  # after backward, which checks that the buffers are unchanged
            outputs.append(_build_output(method, embeddings, targets, output))
        return StepOutput(
            accumulation.concatenate([output.embeddings for output in outputs]),
            accumulation.concatenate([output.targets for output in outputs]),
            accumulation.mean_of_logs([output.logs for output in outputs]),
        )

    def _backward_with_targets_first(self, batch: Batch, step: int) -> StepOutput:
        """Couple the targets of all micro-batches, then add up the gradients of the micro-batches.

        Given the coupled targets, the loss is a mean over images, except for terms that compare the
        embeddings named in `Method.compared`. A first pass computes these without a graph. In the
        second pass, each micro-batch replaces its own rows by rows with a graph.
        """
        method, outputs = self.method, []
        micro_batches = self._micro_batches(batch)
        compared, uncoupled = self._embed_without_graph(micro_batches, step, method.compared)
        # With `compared`, the second pass updates the student's statistics a second time.
        final_statistics = batch_norm.clone_statistics([method] if method.compared else [])
        statistics = StatisticsAverage(method, self.num_micro_batches)
        coupled = method.couple_targets(accumulation.concatenate(uncoupled))
        targets = accumulation.split(coupled, uncoupled)
        replay_error = accumulation.ReplayError()
        for k, micro_batch in enumerate(micro_batches):
            self._seed(step, k)
            with self._no_sync_before_last(k):
                embeddings = self._embed(micro_batch)
                replay_error.add(embeddings, compared[k])
                whole = accumulation.insert_rows(embeddings, compared, k)
                output = method.loss(whole, targets[k])
                (output.loss / self.num_micro_batches).backward()
            statistics.update(k)
            outputs.append(_build_output(method, embeddings, targets[k], output))
        batch_norm.restore_clones(final_statistics)
        logs = accumulation.mean_of_logs([output.logs for output in outputs])
        return StepOutput(
            accumulation.concatenate([output.embeddings for output in outputs]),
            method.without_transient({}, coupled)[1],
            logs | replay_error.logs(),
        )

    def _backward_in_two_passes(self, batch: Batch, step: int) -> StepOutput:
        """Compute the gradients of the embeddings first, and then those of the weights.

        The first pass embeds all micro-batches without a graph. The loss over all of them gives the
        gradients with respect to the embeddings. The second pass embeds each micro-batch again and
        backpropagates its rows of these gradients (GradCache, Gao et al., arXiv:2101.06983).
        """
        method = self.method
        micro_batches = self._micro_batches(batch)
        first_pass, uncoupled = self._embed_without_graph(micro_batches, step)
        final_statistics = batch_norm.clone_statistics([method])
        embeddings = accumulation.as_leaves(accumulation.concatenate(first_pass))
        targets = method.couple_targets(accumulation.concatenate(uncoupled))
        output = method.loss(embeddings, targets)
        gradients = accumulation.split(_gradients(output.loss, embeddings), first_pass)
        replay_error = accumulation.ReplayError()
        for k, micro_batch in enumerate(micro_batches):
            self._seed(step, k)
            with self._no_sync_before_last(k):
                replayed = self._embed(micro_batch)
                torch.autograd.backward(
                    [replayed[name] for name in gradients[k]],
                    [g.to(replayed[name].dtype) for name, g in gradients[k].items()],
                )
            replay_error.add(replayed, {name: first_pass[k][name] for name in gradients[k]})
        batch_norm.restore_clones(final_statistics)  # undo the second pass's update
        output.logs.update(replay_error.logs())
        return _build_output(method, embeddings, targets, output)

    def _embed_without_graph(
        self, micro_batches: Sequence[Batch], step: int, names: Collection[str] | None = None
    ) -> tuple[list[Embeddings], list[Embeddings]]:
        """Return the embeddings and the targets of each micro-batch, without a graph.

        Args:
            micro_batches: This rank's micro-batches.
            step: Index of the step.
            names: Names of the embeddings to return, by default all. If there are none, the
                student's forward pass is skipped.
        """
        statistics = StatisticsAverage(self.method, self.num_micro_batches)
        embeddings, targets = [], []
        with torch.no_grad():
            for k, micro_batch in enumerate(micro_batches):
                self._seed(step, k)
                z = {} if names is not None and not names else self._embed(micro_batch)
                embeddings.append({name: z[name] for name in (z if names is None else names)})
                targets.append(self._targets(micro_batch))
                statistics.update(k)  # both the student's and the teacher's
        return embeddings, targets

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        return [batch.slice(k, self.num_micro_batches) for k in range(self.num_micro_batches)]

    def _no_sync_before_last(self, k: int) -> AbstractContextManager[object]:
        """Return a context in which only the last micro-batch averages gradients over ranks."""
        is_last = k == self.num_micro_batches - 1
        return nullcontext() if is_last else wrap.without_sync(self.model)

    def _seed(self, step: int, k: int) -> None:
        """Seed dropout and drop path by the position of micro-batch k in the global batch.

        K micro-batches on one rank then use the same random numbers as K ranks.
        """
        slice_index = process_group.rank() * self.num_micro_batches + k
        torch.manual_seed(rng.derive_seed(self.seed, step, slice_index))

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
    optim_config: optimizers.OptimConfig,
    execution: Execution,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    example: Batch,
    seed: int = 0,
) -> Stepper:
    """Wrap a method for the ranks and build its optimizer.

    Args:
        method: The method, on the CPU.
        parallel_config: Parallel settings of the run.
        optim_config: Settings of the optimizer and its schedules.
        execution: Device and formats of the model.
        micro_batch_size: Images per forward pass on this rank.
        global_batch_size: Images per optimizer step over all ranks.
        example: A micro-batch with the shapes of the run.
        seed: Seed of dropout and drop path.
    """
    model = wrap.wrap(
        method,
        parallel_config,
        execution,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        example=example,
    )
    return Stepper(
        model,
        optimizers.build(optim_config, method),
        parallel_config,
        seed,
        micro_batch_size,
        global_batch_size,
        optim_config,
        execution,
    )


def _gradients(loss: Tensor, embeddings: Embeddings) -> Embeddings:
    """Return the gradient with respect to each embedding that the loss uses.

    Other embeddings are only used by `after_step`.
    """
    gradients = torch.autograd.grad(loss, list(embeddings.values()), allow_unused=True)
    return {name: g for name, g in zip(embeddings, gradients) if g is not None}


def _build_output(
    method: Method, embeddings: Embeddings, targets: Embeddings, loss_output: LossOutput
) -> StepOutput:
    """Detach all tensors and drop those that the method declares as transient."""
    return StepOutput(
        *method.without_transient(embeddings, targets),
        {
            name: value.detach()
            for name, value in {"loss": loss_output.loss, **loss_output.logs}.items()
        },
    )
