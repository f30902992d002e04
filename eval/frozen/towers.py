"""The image tower and the text tower of a run, with their projections to the shared space."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import config
from ssl_pretrain.eval import pair_retrieval, run_method
from ssl_pretrain.eval.frozen import features, sentences
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.runs import Run, prepare_for_evaluation
from ssl_pretrain.views import text_recipe, tokenizers
from ssl_pretrain.views.batch import TextSet


@dataclass
class Towers:
    """Networks that embed images and texts in one space.

    Attributes:
        run: The run.
        image_network: Network from normalized views to embeddings (n, dim).
        text_network: Network from tokens to embeddings (n, dim).
        tokenize: The run's tokenizer.
    """

    run: Run
    image_network: nn.Module
    text_network: Callable[[TextSet], Tensor]
    tokenize: tokenizers.Tokenizer

    def embed_images(self, split: EvaluationSplit) -> Tensor:
        """Return the embeddings of a split's images, of length 1, the same on every rank."""
        embed = partial(features.extract, self.image_network)
        return _unit_length("images", features.embed_split(embed, split)[0])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, of length 1, float32 (n, dim)."""
        embeddings = sentences.embed_in_batches(self.run, self.tokenize, self.text_network, texts)
        return _unit_length("texts", embeddings)

    def embed_classes(self, class_names: Sequence[str]) -> Tensor:
        """Return one embedding per class, the mean over the templates, of length 1."""
        text_config = self.run.config.text
        filled = [text_recipe.fill_templates(text_config, name) for name in class_names]
        flat = self.embed_texts([sentence for group in filled for sentence in group])
        per_class = flat.unflatten(0, (len(class_names), len(text_config.templates)))
        return F.normalize(per_class.mean(1), dim=1)


def _unit_length(name: str, embeddings: Tensor) -> Tensor:
    """Return embeddings of length 1. Raise ValueError if one of them is not finite."""
    pair_retrieval.check_finite(name, embeddings)
    return F.normalize(embeddings, dim=1)


def check_method(run: Run, purpose: str) -> None:
    """Raise ValueError unless the run's method has an image tower and a text tower.

    Args:
        run: The run.
        purpose: What the evaluation measures, for the message.
    """
    if not config.pairs_images_with_texts(run.config):
        raise ValueError(
            f"{run.path}: {purpose} needs a text tower, and method {run.config.method.name} has "
            "none; evaluate a run of clip or siglip"
        )


def build_towers(run: Run, is_pretrained: bool = True) -> Towers:
    """Build the towers of a run in evaluation mode.

    Args:
        run: The run, whose method has a text tower.
        is_pretrained: True for the weights of the checkpoint, False for random weights from the
            run's seed, whatever weights the run started with.
    """
    method = run_method.build_method(
        run, is_pretrained, run_method.without_weights(run.config.backbone)
    )
    image_tower = prepare_for_evaluation(method.backbone, run.device)
    method.eval().to(run.device)
    return Towers(
        run,
        nn.Sequential(image_tower, method.image_projection),
        lambda texts: method.text_projection(method.text_encoder(texts.ids, texts.valid)),
        tokenizers.build(run.config.text),
    )
