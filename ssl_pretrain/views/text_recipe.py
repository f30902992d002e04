"""Settings of texts: the captions of images, sentences, and their tokens."""

from dataclasses import dataclass
from typing import Literal

from ssl_pretrain.schema import setting


@dataclass
class TextConfig:
    """Captions of images, and sentences."""

    captions: Literal["stored", "class_names"] = setting(
        "stored",
        "Captions of the images. stored: those of the data set, one of which is drawn per epoch. "
        "class_names: the class of each image in one of the templates.",
    )
    templates: list[str] = setting(
        ["a photo of a {}."],
        "Sentences in which {} stands for a class, for captions=class_names and for zero-shot "
        "classification.",
    )
    tokenizer: str = setting(
        "clip",
        "Tokenizer. clip: the byte pairs of CLIP, in lower case. Otherwise the name of a tokenizer "
        "on the Hugging Face Hub, such as bert-base-uncased, or its folder.",
    )
    length: int = setting(
        77,
        "Tokens per text, including those that mark its start and end. Longer texts are cut.",
        minimum=3,
        maximum=8192,
        unit="tokens",
    )


def check(config: TextConfig) -> None:
    """Raise ValueError unless every template has a place for the class."""
    if not config.templates:
        raise ValueError(
            "text.templates: no template is given; give at least one, such as 'a photo of a {}.'"
        )
    for template in config.templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"text.templates: {template!r} must contain {{}} once, in place of the class, as "
                "in 'a photo of a {}.'"
            )


def fill_templates(config: TextConfig, class_name: str) -> list[str]:
    """Return the sentences about a class, one per template."""
    return [template.replace("{}", class_name) for template in config.templates]
