"""Settings for captions, prompt templates and tokenization."""

from dataclasses import dataclass
from typing import Literal

from ssl_pretrain.schema import setting


@dataclass
class TextConfig:
    """Captions, prompt templates and tokenization."""

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
        "Tokenizer. clip: CLIP's byte-pair encoding, in lower case. Otherwise a tokenizer of the "
        "Hugging Face Hub, by name, such as bert-base-uncased, or by folder.",
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
