"""Build the method of a run from a backbone and, for methods with texts, a text encoder."""

from collections.abc import Callable

from ssl_pretrain.config.run_config import RunConfig
from ssl_pretrain.methods.base import Method, TextMethodConfig
from ssl_pretrain.methods.image_text_pairs import ImageTextConfig
from ssl_pretrain.models import text_encoders
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.text_encoders import TextEncoder, TextEncoderConfig
from ssl_pretrain.views import tokenizers
from ssl_pretrain.views.text_recipe import TextConfig


def assemble_method(
    config: RunConfig,
    backbone: Backbone,
    build_text_encoder: Callable[[TextEncoderConfig, int, int], TextEncoder] = text_encoders.build,
) -> Method:
    """Build the method on top of a backbone, with a text encoder if it takes texts.

    Args:
        config: Configuration of the run.
        backbone: The backbone of the run.
        build_text_encoder: Function that builds the text encoder, on the CPU or the meta device.

    Raises:
        ValueError: If a package is missing, or the tokenizer or the text encoder cannot be built.
    """
    if not isinstance(config.method, TextMethodConfig):
        return config.method.build(backbone)
    vocabulary_size = tokenizers.vocabulary_size(config.text)
    text_encoder = build_text_encoder(config.text_encoder, vocabulary_size, config.text.length)
    return config.method.build_with_texts(backbone, text_encoder)


def text_settings(config: RunConfig) -> TextConfig | None:
    """Return how texts are made, or None if the method takes none."""
    return config.text if isinstance(config.method, TextMethodConfig) else None


def pairs_images_with_texts(config: RunConfig) -> bool:
    """Return True if the method has an image tower and a text tower, such as CLIP."""
    return isinstance(config.method, ImageTextConfig)


def text_lengths(config: RunConfig, method: Method) -> list[int]:
    """Return the number of tokens of each text that the method takes."""
    return [config.text.length] * method.num_texts
