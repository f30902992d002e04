"""Training and scores of a grid of attentive probes on the tokens of one network."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.eval.attentive_protocols import AttentiveProtocol, ProbeSetting
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.attentive_probes import AttentiveProbes, ProbeOptimizer, ProbeShape
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.frozen.patch_tokens import TokenFunction

MAX_SUMS = 2**28  # numbers in memory for attended sums, `dim` per probe, image and head


class ProbeGrid:
    """One probe per setting, all trained on the same batches.

    Probes share matrix products in groups that fit in memory. Probes with self-attention blocks
    are trained one after another.

    Args:
        shape: Architecture of the probes.
        settings: Learning rate and weight decay of each probe.
        protocol: Training protocol.
        num_steps: Length of the training.
        like: Tensor with the tokens' dtype and device.
    """

    def __init__(
        self,
        shape: ProbeShape,
        settings: Sequence[ProbeSetting],
        protocol: AttentiveProtocol,
        num_steps: int,
        like: Tensor,
    ):
        self.settings, self.protocol, self.num_steps = settings, protocol, num_steps
        sums_per_probe = protocol.batch_size * shape.num_heads * shape.dim
        size = 1 if shape.num_blocks else max(1, MAX_SUMS // sums_per_probe)
        self._groups: list[tuple[Sequence[ProbeSetting], ProbeOptimizer]] = []
        for start in range(0, len(settings), size):
            group = settings[start : start + size]
            probes = AttentiveProbes(shape, len(group), like)
            undecayed = protocol.undecayed(probes.weights)
            optimizer = ProbeOptimizer(probes, protocol.betas, undecayed, protocol.clip_norm)
            self._groups.append((group, optimizer))

    def step(self, tokens: Tensor, labels: Tensor, step: int, global_batch_size: int) -> None:
        """Take one step of every probe on this rank's tokens and labels."""
        for settings, optimizer in self._groups:
            rates = [self.protocol.rates(setting, step, self.num_steps) for setting in settings]
            lrs, decays = zip(*rates)
            optimizer.step(tokens, labels, lrs, decays, global_batch_size)

    @torch.no_grad()
    def outcomes(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return each probe's correctness, then each one's cross entropy, by image, (n, 2P)."""
        correct, losses = list[Tensor](), list[Tensor]()
        for _, optimizer in self._groups:
            logits = optimizer.probes.logits(tokens)
            targets = labels.expand(len(logits), -1)
            correct.append((logits.argmax(2) == targets).float())
            values = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            losses.append(values.float().view(targets.shape))
        return torch.cat([*correct, *losses]).T

    def score_tokens(self, tokens: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
        """Return each probe's accuracy in [0, 1] and mean cross entropy on tokens."""
        size = min(250, self.protocol.batch_size)
        chunks = [self.outcomes(*pair) for pair in zip(tokens.split(size), labels.split(size))]
        return self._means(torch.cat(chunks))

    def score_split(
        self, split: EvaluationSplit, token_function: TokenFunction
    ) -> tuple[list[float], list[float]]:
        """Return each probe's accuracy and mean cross entropy on a split, the same on all ranks."""
        outcomes, _ = features.embed_split(
            partial(self._embed_outcomes, token_function=token_function), split
        )
        return self._means(outcomes)

    def _embed_outcomes(
        self,
        split: EvaluationSplit,
        offset: features.Offset = (0, 0),
        *,
        token_function: TokenFunction,
    ) -> tuple[Tensor, Tensor]:
        run, batches = split.run, []
        for images, labels in split.batches():
            views = features.normalize(run, features.shift(images, *offset))
            tokens = features.compute(run, token_function, views)
            batches.append((self.outcomes(tokens, labels.to(run.device)), labels))
        return features.concatenate(batches, run.device)

    def _means(self, outcomes: Tensor) -> tuple[list[float], list[float]]:
        accuracies, losses = outcomes.double().mean(0).view(2, -1).tolist()
        return accuracies, losses
