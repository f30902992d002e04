"""The exported network of a service, run by ONNX Runtime and checked before the first request."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

import ssl_pretrain
from ssl_pretrain.eval.embedding.embedding_network import describe_transform
from ssl_pretrain.eval.embedding.weights_digest import digest_of_tensors
from ssl_pretrain.eval.export import load_transform
from ssl_pretrain.eval.exporting import onnx
from ssl_pretrain.eval.exporting.reference import REFERENCE_FILE, WEIGHTS, read_arguments
from ssl_pretrain.eval.frozen import named_features
from ssl_pretrain.eval.image_transform import ImageTransform

Precision = Literal["float", "int8"]
FILES: dict[Precision, str] = {"float": onnx.FLOAT_MODEL, "int8": onnx.INT8_MODEL}
MIN_INT8_COSINE = 0.9  # between the features of 8 and 32 bits of a reference image
# Largest accepted effect of the other images of a batch, relative to the largest feature.
BATCH_TOLERANCE = 1e-4
_EXPORT_REMEDY = "write it with `ssl-pretrain export RUN OUT --format onnx`"


@dataclass(frozen=True)
class ServedNetwork:
    """A network that maps normalized images to features.

    Attributes:
        folder: Folder of the export.
        precision: "float" or "int8".
        arguments: Content of the export's timm.json.
        transform: Transform of the images.
        dim: Numbers per vector.
        takes_batches: False if the vector of an image would depend on the other images of its
            batch, as with the activation ranges of an 8-bit ViT.
    """

    folder: Path
    precision: Precision
    arguments: dict[str, Any]
    transform: ImageTransform
    dim: int
    takes_batches: bool
    _session: onnx.ImageEmbedder

    @classmethod
    def load(cls, folder: Path, precision: Precision) -> "ServedNetwork":
        """Load a network and compare its features with those of the export.

        Raises:
            ValueError: If a file is missing, or the features differ.
        """
        file = folder / FILES[precision]
        arguments = read_arguments(folder)
        if not file.is_file():
            raise ValueError(
                f"{folder}: {file.name} is missing, which --model {precision} needs; "
                f"{_EXPORT_REMEDY}"
            )
        try:
            session = onnx.open_session(file)
        except Exception as error:  # ONNX Runtime has no common type for damaged files
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file}: cannot be loaded: {reason}; {_EXPORT_REMEDY}") from None
        reference = load_file(folder / REFERENCE_FILE)
        features = session(reference["images"])
        _check_features(file, precision, features, reference["features"])
        return cls(
            folder=folder,
            precision=precision,
            arguments=arguments,
            transform=load_transform(folder),
            dim=features.shape[1],
            takes_batches=_is_independent(session, reference["images"], features),
            _session=session,
        )

    def embed(self, images: list[torch.Tensor]) -> np.ndarray:
        """Return the features, float32 (n, dim), of normalized images (channels, height, width)."""
        batches = [torch.stack(images)] if self.takes_batches else [image[None] for image in images]
        return np.concatenate([self._session(batch).numpy() for batch in batches])

    def facts(self) -> dict[str, Any]:
        """Return what identifies the network, as values of JSON."""
        arguments = self.arguments
        return {
            "network": arguments["architecture"],
            "method": arguments["method"],
            "checkpoint": arguments["checkpoint"],
            "step": arguments["step"],
            "dimension": self.dim,
            "model": self.precision,
            "weights_sha256": arguments["sha256"],
            "input": arguments["input"],
            "versions": {
                "ssl_pretrain": ssl_pretrain.__version__,
                "onnxruntime": version("onnxruntime"),
            },
        }

    def provenance(self) -> dict[str, Any]:
        """Return what an index must have been made with: weights, feature and transform."""
        return {
            "weights_sha256": digest_of_tensors(load_file(self.folder / WEIGHTS)),
            "feature": named_features.POOLED,
            "transform": describe_transform(self.transform),
        }


def _check_features(
    file: Path, precision: Precision, features: torch.Tensor, expected: torch.Tensor
) -> None:
    """Raise ValueError unless these are the exported features, up to the precision."""
    if features.shape != expected.shape:
        raise ValueError(
            f"{file}: its features have shape {tuple(features.shape)}, and the exported ones "
            f"{tuple(expected.shape)}, so it is another network; {_EXPORT_REMEDY}"
        )
    if precision == "float":
        difference = (features - expected).abs().max().item()
        if not difference <= onnx.TOLERANCE * expected.abs().max().item():
            raise ValueError(
                f"{file}: the features of the reference images differ from the exported ones by "
                f"{difference:.2g}, so it is another network; {_EXPORT_REMEDY}"
            )
        return
    cosine = torch.cosine_similarity(features, expected).min().item()
    if not cosine >= MIN_INT8_COSINE:
        raise ValueError(
            f"{file}: the features of the reference images have a cosine of {cosine:.3f} with the "
            f"exported ones, and at least {MIN_INT8_COSINE:g} is expected; start with --model "
            f"float, or {_EXPORT_REMEDY}"
        )


def _is_independent(
    session: onnx.ImageEmbedder, images: torch.Tensor, features: torch.Tensor
) -> bool:
    """Return True if the features of a batch are those of its images one by one."""
    alone = torch.cat([session(image[None]) for image in images])
    difference = (features - alone).abs().max().item()
    return difference <= BATCH_TOLERANCE * alone.abs().max().item()
