"""Text encoders: transformers of open_clip and of transformers that return one vector per text."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.system import optional_packages
from ssl_pretrain.system.error_text import first_line

CLIP = "clip"
BERT = "bert"
# Types of transformers' models that encode texts in both directions, whatever their size.
ENCODERS = ("bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra")
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # begin after the padding's
# Rates of dropout in the configurations of these models.
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


@dataclass
class TextEncoderConfig:
    """Network that encodes texts."""

    name: str = setting(
        CLIP,
        "clip: the causal transformer of CLIP, by open_clip. bert: a BERT with random weights, by "
        "transformers. Otherwise the name of a model on the Hugging Face Hub, such as "
        "bert-base-uncased, or its folder, with its weights.",
    )
    width: int = setting(512, "Channels per token of clip and bert.", minimum=1, unit="channels")
    layers: int = setting(12, "Blocks of clip and bert.", minimum=1, unit="blocks")
    heads: int = setting(8, "Attention heads of clip and bert.", minimum=1, unit="heads")
    causal: bool = setting(
        True,
        "clip: let a token attend only to those before it, as in CLIP. With false, it attends to "
        "all, padding included, as in SigLIP.",
    )
    pool: Literal["auto", "end", "first", "last", "mean"] = setting(
        "auto",
        "How the vectors of the tokens are pooled. end: the end token (CLIP). first: the first "
        "(BERT). last: the last one, padding or not (SigLIP). mean: the mean without padding. "
        "auto: end for clip, else first.",
    )
    dropout: float = setting(
        0.1, "Rate of dropout in bert and in models of the Hub.", below=1, unit=DIMENSIONLESS
    )


class TextEncoder(nn.Module):
    """A transformer that maps texts to features (batch, feature_dim).

    Args:
        model: The network. It maps token IDs, and which of them are valid, to one vector per token.
        feature_dim: Width of the features.
        pool: How the vectors of the tokens are pooled: "end", "first", "last" or "mean".
    """

    def __init__(self, model: nn.Module, feature_dim: int, pool: str):
        super().__init__()
        self.model, self.feature_dim, self.pool = model, feature_dim, pool

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Return one vector per text.

        Args:
            ids: Token IDs, int64 (batch, length).
            valid: False for padding, bool of the same shape.
        """
        vectors = self.model(ids, valid)
        if self.pool == "first":
            return vectors[:, 0]
        if self.pool == "last":
            return vectors[:, -1]
        if self.pool == "mean":
            weights = valid.to(vectors.dtype)[:, :, None]
            return (vectors * weights).sum(1) / weights.sum(1).clamp(min=1)
        ends = valid.sum(1).clamp(min=1) - 1
        return vectors[torch.arange(len(ends), device=ends.device), ends]

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Return the names and modules of the network's blocks."""
        return [
            (f"{name}.{block_name}", block)
            for name, stack in self.named_modules()
            if isinstance(stack, nn.ModuleList) and name.endswith(("resblocks", "layer"))
            for block_name, block in stack.named_children()
        ]


class _ClipTransformer(nn.Module):
    """The text transformer of open_clip, with the vectors of all tokens as its output."""

    def __init__(self, config: TextEncoderConfig, vocabulary_size: int, length: int):
        super().__init__()
        from open_clip.transformer import TextTransformer

        self.transformer = TextTransformer(
            context_length=length,
            vocab_size=vocabulary_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=None,
            no_causal_mask=not config.causal,
            pool_type="none",
        )

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Return one vector per token, (batch, length, width)."""
        return self.transformer(ids)


class _HuggingFaceEncoder(nn.Module):
    """An encoder of transformers, with the vectors of all tokens as its output."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Return one vector per token, (batch, length, width)."""
        # transformers inspects a mask of two dimensions on the host, which waits for the device.
        mask = valid[:, None, None, :].expand(-1, -1, ids.shape[1], -1)
        return self.network(input_ids=ids, attention_mask=mask).last_hidden_state


def build(
    config: TextEncoderConfig, vocabulary_size: int, length: int, loads_weights: bool = True
) -> TextEncoder:
    """Build a text encoder, with random weights or those of a model of the Hub.

    Args:
        config: The network.
        vocabulary_size: Number of different tokens.
        length: Tokens per text.
        loads_weights: False for random weights instead of those of a model of the Hub.

    Raises:
        ValueError: If a package is missing, or the network cannot be built or loaded.
    """
    if config.name in (CLIP, BERT) and config.width % config.heads:
        raise ValueError(
            f"text_encoder.heads: {config.heads} heads do not divide text_encoder.width "
            f"{config.width}; give a divisor, such as {config.width // 64 or 1}"
        )
    if config.name == CLIP:
        optional_packages.require("text_encoder.name", "open_clip", "text")
        model: nn.Module = _ClipTransformer(config, vocabulary_size, length)
        pool = "end" if config.pool == "auto" else config.pool
        return TextEncoder(model, config.width, pool)
    optional_packages.require("text_encoder.name", "transformers", "text")
    network = _build_transformers(config, vocabulary_size, length, loads_weights)
    _check_fit(config.name, network.config, vocabulary_size, length)
    pool = "first" if config.pool == "auto" else config.pool
    return TextEncoder(_HuggingFaceEncoder(network), network.config.hidden_size, pool)


def _check_fit(name: str, model_config: Any, vocabulary_size: int, length: int) -> None:
    """Raise ValueError if a network of transformers has too few positions or tokens."""
    num_positions = model_config.max_position_embeddings
    if model_config.model_type in OFFSET_POSITIONS:
        num_positions -= model_config.pad_token_id + 1
    if length > num_positions:
        raise ValueError(
            f"text.length: {length} tokens are more than the {num_positions} of "
            f"text_encoder.name {name}; give at most {num_positions}"
        )
    if vocabulary_size > model_config.vocab_size:
        raise ValueError(
            f"text.tokenizer: it has {vocabulary_size:,} tokens, and text_encoder.name {name} "
            f"knows {model_config.vocab_size:,}; set text.tokenizer to {name}"
        )


def has_dropout(config: TextEncoderConfig) -> bool:
    """Return True if the encoder drops values at random during training."""
    return config.name != CLIP and config.dropout > 0


def build_on_meta(config: TextEncoderConfig, vocabulary_size: int, length: int) -> TextEncoder:
    """Build a text encoder on the meta device, where its weights take no memory.

    The weights of a model of the Hub are not downloaded, only its configuration is.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_random(config, vocabulary_size, length).to("meta")


def build_random(config: TextEncoderConfig, vocabulary_size: int, length: int) -> TextEncoder:
    """Build a text encoder with random weights, also where `build` loads a model of the Hub."""
    return build(config, vocabulary_size, length, loads_weights=False)


def _build_transformers(
    config: TextEncoderConfig, vocabulary_size: int, length: int, loads_weights: bool
) -> Any:
    """Return a network of transformers without its pooling layer."""
    from transformers import BertConfig, BertModel

    if config.name != BERT:
        return _build_from_hub(config, loads_weights)
    return BertModel(
        BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=length,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
        ),
        add_pooling_layer=False,
    )


def _build_from_hub(config: TextEncoderConfig, loads_weights: bool) -> Any:
    """Return an encoder of the Hugging Face Hub, or of a folder."""
    from transformers import AutoConfig, AutoModel

    try:
        settings = AutoConfig.from_pretrained(config.name)
        for name in DROPOUTS:
            if hasattr(settings, name):
                setattr(settings, name, config.dropout)
        if loads_weights:
            network = AutoModel.from_pretrained(config.name, config=settings)
        else:
            network = AutoModel.from_config(settings)
    except Exception as error:  # the library raises many kinds of errors
        reason = first_line(error)
        raise ValueError(
            f"text_encoder.name: {config.name!r} cannot be loaded ({reason}); give clip, bert, the "
            "name of a model on the Hugging Face Hub, or its folder"
        ) from error
    if settings.model_type not in ENCODERS:
        raise ValueError(
            f"text_encoder.name: {config.name} is a model of the type {settings.model_type}, and "
            f"only encoders of texts are supported; choose one of: {', '.join(ENCODERS)}"
        )
    return network
