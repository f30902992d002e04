"""Answers of the service, as the OpenAPI page describes them."""

from dataclasses import dataclass
from typing import Any


@dataclass
class EmbedAnswer:
    """The vector of an image."""

    vector: list[float]
    dimension: int


@dataclass
class SimilarityAnswer:
    """The cosine of the vectors of two images, from -1 to 1."""

    cosine: float


@dataclass
class Neighbor:
    """An image of the index, and its score by the metric of the index."""

    id: str
    score: float


@dataclass
class NeighborsAnswer:
    """The nearest images of the index, nearest first."""

    neighbors: list[Neighbor]


@dataclass
class StateAnswer:
    """State of the service: "live" or "ready"."""

    state: str


@dataclass
class ErrorAnswer:
    """Error in a request, and its remedy."""

    error: str
    remedy: str


# Examples of the OpenAPI page.
EMBED = EmbedAnswer(vector=[0.0132, 0.871, 0.0004], dimension=3)
SIMILARITY = SimilarityAnswer(cosine=0.9312)
NEIGHBORS = NeighborsAnswer([Neighbor("photos/cat.jpg", 0.9621), Neighbor("b.jpg", 0.9417)])
ERROR_EXAMPLES: dict[int, dict[str, Any]] = {
    408: {
        "error": "The body did not arrive within 30 seconds.",
        "remedy": "Send it faster, or start the service with a larger --timeout.",
    },
    413: {
        "error": "image: 60,000 x 60,000 pixels exceed the limit of 50,000,000.",
        "remedy": "Send a smaller copy, or start the service with a larger --max-pixels.",
    },
    415: {
        "error": "image: is not a known image format. It looks like a PDF.",
        "remedy": "Send JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF, PNM or .npy.",
    },
    422: {
        "error": "image: cannot be read as an image: image file is truncated.",
        "remedy": "Open it in an image viewer, save it again, and send that copy.",
    },
    503: {
        "error": "64 images wait already, which is the limit.",
        "remedy": "Try again in a second.",
    },
}
ERROR_SUMMARIES = {
    408: "The body arrived too slowly.",
    413: "Too many bytes or pixels.",
    415: "Not an image.",
    422: "A damaged image, a wrong field, or a wrong parameter.",
    503: "No capacity at the moment. Try again after the seconds in Retry-After.",
}
