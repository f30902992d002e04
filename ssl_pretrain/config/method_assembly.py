"""Build the method of a run from a backbone, a text encoder, or both."""

from collections.abc import Callable

from ssl_pretrain.config.run_config import RunConfig
from ssl_pretrain.data import text_maker
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.methods.base import Method, SentenceMethodConfig, TextMethodConfig
from ssl_pretrain.methods.image_text_pairs import ImageTextConfig
from ssl_pretrain.models import backbones, text_encoders
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.text_encoders import TextEncoder, TextEncoderConfig
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.schema.image_sizes import ImageSize
from ssl_pretrain.views import recipe, tokenizers
from ssl_pretrain.views.text_recipe import TextConfig

BuildBackbone = Callable[[BackboneConfig, ImageSize], Backbone]
BuildTextEncoder = Callable[[TextEncoderConfig, int, int], TextEncoder]


def assemble_method(
    config: RunConfig,
    build_backbone: BuildBackbone = backbones.build,
    build_text_encoder: BuildTextEncoder = text_encoders.build,
) -> Method:
    """Build the method on top of the networks that it takes.

    Args:
        config: Configuration of the run.
        build_backbone: Function that builds the backbone for views of a size, on the CPU or the
            meta device. It is called if the method takes images.
        build_text_encoder: Function that builds the text encoder, on the CPU or the meta device. It
            is called if the method takes texts.

    Raises:
        ValueError: If a package is missing, or the tokenizer or the text encoder cannot be built.
    """
    method = config.method
    if isinstance(method, SentenceMethodConfig):
        return method.build_for_sentences(_text_encoder(config, build_text_encoder))
    backbone = build_backbone(config.backbone, recipe.crop_per_view(config.views)[0].size)
    if isinstance(method, TextMethodConfig):
        return method.build_with_texts(backbone, _text_encoder(config, build_text_encoder))
    return method.build(backbone)


def _text_encoder(config: RunConfig, build: BuildTextEncoder) -> TextEncoder:
    vocabulary_size = tokenizers.vocabulary_size(config.text)
    return build(config.text_encoder, vocabulary_size, config.text.length)


def takes_images(config: RunConfig) -> bool:
    """Return True if the method takes images, alone or with texts."""
    return not isinstance(config.method, SentenceMethodConfig)


def pairs_images_with_texts(config: RunConfig) -> bool:
    """Return True if the method has an image tower and a text tower, such as CLIP."""
    return isinstance(config.method, ImageTextConfig)


def text_settings(config: RunConfig) -> TextConfig | None:
    """Return how texts are made, or None if the method takes none."""
    return config.text if _num_texts(config) else None


def text_lengths(config: RunConfig) -> list[int]:
    """Return the number of tokens of each text of an item that the method takes."""
    return [config.text.length] * _num_texts(config)


def check_number_of_texts(config: RunConfig, source: Source) -> None:
    """Raise ValueError if the items of a source have another number of texts than the method takes.

    Images with captions, or with the names of their classes in templates, have one text.
    """
    num_taken = _num_texts(config)
    num_given = text_maker.count_texts(source, config.text)
    if num_taken and num_given and num_taken != num_given:
        raise ValueError(
            f"data.text_columns: {source.full_path} has {num_given} texts per item, and method "
            f"{config.method.name} takes {num_taken}; name as many columns as it takes"
        )


def _num_texts(config: RunConfig) -> int:
    method = config.method
    return method.num_texts if isinstance(method, TextMethodConfig | SentenceMethodConfig) else 0
